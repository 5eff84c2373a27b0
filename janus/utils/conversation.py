"""Chat messages as the string that Janus was trained on, and the images they name."""

from collections.abc import Sequence
from typing import Any

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
EOS = "<｜end▁of▁sentence｜>"


def render_conversation(messages: Sequence[dict[str, Any]], system_prompt: str = "") -> str:
    """The "deepseek" chat format: `role: content` turns, a blank line after the user, the eos after the assistant.

    A last turn of empty content is the assistant's to write and renders as `role:`.
    """
    rendered = f"{system_prompt}\n\n" if system_prompt else ""
    for i, message in enumerate(messages):
        content = message["content"].strip()
        separator = EOS if i % 2 else "\n\n"
        rendered += f"{message['role']}: {content}{separator}" if content else f"{message['role']}:"
    return rendered.strip()
