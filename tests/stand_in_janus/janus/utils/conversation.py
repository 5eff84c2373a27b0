"""The chat format as an object that is filled turn by turn."""


class Conversation:
    def __init__(self):
        self.system, self.turns = "", []

    def set_system_message(self, system: str) -> None:
        self.system = system

    def append_message(self, role: str, message: str) -> None:
        self.turns.append((role, message))

    def get_prompt(self) -> str:
        said = [f"{self.system}\n\n"] if self.system else []
        ends = ("\n\n", "<｜end▁of▁sentence｜>")
        said += [f"{role}: {text}{ends[i % 2]}" if text else f"{role}:" for i, (role, text) in enumerate(self.turns)]
        return "".join(said)


def get_conv_template(name: str) -> Conversation:
    assert name == "deepseek"
    return Conversation()
