"""The page: its parts, and what happens when they are used. The work itself is in paint, ask and layers."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from demo import ask, inputs, layers, paint, show
from demo.device import Device, Stopped
from dola_runtime import DEFAULT_ALPHA, pick_static_layer_index
from generation_inference import default_sampling, num_image_tokens
from janus.dola.memory import is_out_of_memory
from janus.dola.scorers import READ_BY

EXAMPLES = Path(__file__).parent / "examples"
PROMPTS = (
    "a large red circle on a white background",
    "a yellow star above a blue diamond on a black background",
    "a green triangle left of a red cross on a gray background",
)
QUESTIONS = (
    ("star_above_diamond.png", "What is above the blue diamond?"),
    ("large_red_circle.png", "What colour is the object?"),
    ("triangle_left_of_cross.png", "How many objects are there?"),
)
ANSWERS = (
    ("star_above_diamond.png", "What is above the blue diamond?", "a yellow star"),
    (
        "triangle_left_of_cross.png",
        "What is in the image?",
        "a green triangle left of a red cross on a gray background",
    ),
)
CANDIDATES = "a large red circle on a white background\na small blue square on a gray background"
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress": "minimal"}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LONGEST_QUEUE = 16
FIT = """(kind) => {
  const update = (visible, value) => ({__type__: 'update', visible, ...(value ? {value} : {})})
  const usual = USUAL[kind]
  return [update(!!usual, usual), update(!['off', 'baseline'].includes(kind)), update(!!usual)]
}"""
"""What a kind of decoding has, shown at once."""
SCROLL = "() => {{ if (innerWidth < 800) document.getElementById('{}').scrollIntoView({{behavior: 'smooth'}}) }}"
"""On a phone the pictures stand below the form."""
READY, STOPPED = show.status(""), show.status("Stopped")


# --- errors, and what is uploaded ------------------------------------------------------------------------------------


@contextmanager
def one_line() -> Iterator[None]:
    """What a visitor can mend becomes one line in the page; anything else is a defect, and goes to the log."""
    try:
        yield
    except Stopped:
        raise gr.Error("the work was stopped", title="Stopped", print_exception=False) from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        told = error.strerror if isinstance(error, OSError) else f"{error}"  # a file's name is the server's own affair
        line = " ".join(f"{told}".split()) or "out of memory"
        raise gr.Error(show.escape(line[:300], quote=False), print_exception=False) from None


def telling(status: gr.HTML | None = None) -> Callable[[Callable], Callable]:
    """A handler that yields: its errors are one line, and `status` no longer says that work goes on."""

    def decorate(handler: Callable) -> Callable:
        @wraps(handler)
        def steps(*args) -> Iterator[Any]:
            try:
                with one_line():
                    yield from handler(*args)
            except Exception as error:
                stopped = isinstance(error.__context__, Stopped)
                if status is not None:
                    yield {status: STOPPED if stopped else READY}
                if status is None or not stopped:
                    raise

        return steps

    return decorate


def upload(label: str) -> Any:
    """A place for a picture, which a handler is given as a file that was checked before anything reads it."""
    picture: Any = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        format="png",
        height=240,
        buttons=[],
    )
    move = picture.async_move_resource_to_block_cache

    def read(payload) -> Path | None:
        if payload is None:
            return None
        with one_line():
            if not payload.path or (payload.url or "").startswith("data:"):
                raise ValueError("picture: expected an uploaded file")
            return inputs.check_picture(payload.path)

    async def move_files_alone(path):
        with one_line():
            if f"{path}".lower().startswith(("http:", "https:")):  # nothing is fetched for a visitor
                raise ValueError("picture: expected an uploaded file")
        return await move(path)

    picture.preprocess, picture.async_move_resource_to_block_cache = read, move_files_alone
    return picture


def examples(rows: list[list[str]], fill: list[Any], names: Sequence[str]) -> None:
    gr.Examples(rows, fill, label="Try", example_labels=list(names), api_visibility="private")


def contrast_row(device: Device, kind: str, kinds: tuple[str, ...], label: str) -> list[Any]:
    """The four values of a decoding; the ones that its kind does not have are hidden."""
    layer = pick_static_layer_index(device.num_layers)
    with gr.Row(elem_classes="contrast"):
        shown = "off", "baseline", "APC only"
        kind_of = gr.Dropdown(list(kinds), value=kind, label=label, min_width=120, scale=2, filterable=False)
        layers_of = gr.Textbox(f"{layer}", label="layers", min_width=70, scale=1, visible=kind not in shown)
        alpha = gr.Number(DEFAULT_ALPHA, label="α", minimum=0, maximum=1, step=0.05, min_width=70, scale=1)
        gamma = gr.Number(1, label="γ", minimum=-100, maximum=100, step=0.1, min_width=70, scale=1)
    alpha.visible, gamma.visible = kind not in shown[:2], kind not in shown

    several = ",".join(f"{j}" for j in range(1, device.num_layers) if j % max(1, device.num_layers // 4) == 0)
    usual = {"one layer": f"{layer}", "early exit": several}
    kind_of.change(
        None, [kind_of], [layers_of, alpha, gamma], js=FIT.replace("USUAL", json.dumps(usual)), api_visibility="private"
    )
    return [kind_of, layers_of, alpha, gamma]


# --- paint -----------------------------------------------------------------------------------------------------------


class PaintTab:
    def __init__(self, device: Device):
        self.device, self.painted = device, gr.State(None, time_to_live=3600)
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=2, min_width=320):
                self.prompt = gr.Textbox(PROMPTS[1], label="Prompt", lines=2, max_length=inputs.LONGEST_PROMPT)
                examples([[prompt] for prompt in PROMPTS], [self.prompt], PROMPTS)
                kinds, rows = inputs.KINDS, []
                rows.append(contrast_row(device, "baseline", kinds[1:], "First decoding"))
                rows.append(contrast_row(device, "one layer", kinds, "Second"))
                with gr.Accordion("Two more from the same noise", open=False):
                    rows += [contrast_row(device, "off", kinds, label) for label in ("Third", "Fourth")]
                self.rows = [part for row in rows for part in row]
                with gr.Row():
                    own, most = default_sampling(device.model), inputs.MOST_IMAGES
                    self.images = gr.Number(2, label="Pictures", precision=0, minimum=1, maximum=most, min_width=90)
                    self.seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=inputs.LARGEST_SEED, min_width=90
                    )
                    self.guidance = gr.Number(own["cfg_weight"], label="Guidance", minimum=0, step=0.5, min_width=90)
                    self.temperature = gr.Number(own["temperature"], label="Temperature", step=0.1, min_width=110)
                    self.scorer = gr.Dropdown(["none", *READ_BY], label="Best by", min_width=110, filterable=False)
                with gr.Row():
                    start = gr.Button("Paint", variant="primary", elem_id="paint", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop-painting", min_width=120)
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(READY, elem_id="paint-status")
                self.grid = gr.HTML(show.EMPTY, elem_id="pictures")
                with gr.Column(visible=False) as self.results:
                    with gr.Row():
                        self.left = gr.Dropdown([], label="Left", min_width=200, filterable=False)
                        self.right = gr.Dropdown([], label="Right", min_width=200, filterable=False)
                    self.slider = gr.ImageSlider(
                        label="Left and right",
                        show_label=False,
                        format="png",
                        interactive=False,
                        elem_id="slider",
                        max_height=420,
                        buttons=[],
                    )
                    gr.HTML(show.WHERE)
                    self.where = gr.Image(
                        label="Where DoLa acted",
                        show_label=False,
                        format="png",
                        interactive=False,
                        elem_id="where",
                        buttons=["fullscreen"],
                    )
                    with gr.Row():
                        self.to_ask = gr.Button("Ask about the right one", size="sm")
                        self.to_layers = gr.Button("Look inside the right one", size="sm")
                        self.archive = gr.DownloadButton("Download all of it", size="sm", elem_id="download")
                    with gr.Accordion("Command and settings", open=False):
                        self.command = gr.Code(
                            label="The same files",
                            language="shell",
                            wrap_lines=True,
                            lines=2,
                            max_lines=6,
                            elem_id="command",
                        )
                        self.settings = gr.Code(label="run.json", language="json", lines=4, max_lines=16)
        choose = [self.painted, self.left, self.right], [self.slider, self.where]
        for side in (self.left, self.right):
            side.input(self.look_closer, *choose, **AT_ONCE)
        values = [self.prompt, self.seed, self.guidance, self.temperature, self.images, self.scorer]
        found = [self.painted, self.results, self.left, self.right, self.slider, self.where, self.archive]
        outputs = [self.status, self.grid, self.command, self.settings, *found]
        painting = start.click(
            telling(self.status)(self.run),
            [*values, *self.rows],
            outputs,
            show_progress_on=self.status,
            api_visibility="private",
            **QUEUED,
        )
        start.click(None, js=SCROLL.format("paint-status"), api_visibility="private")
        stop.click(stopper(device), None, [self.status], cancels=[painting], **AT_ONCE)
        self.offer_api(values)

    def run(self, request: gr.Request, prompt, seed, guidance, temperature, images, scorer, *rows):
        words = read_words(self.device, prompt, seed, guidance, temperature, images, scorer, inputs.write_specs(rows))
        growth = show.Growth(int(images))
        yield {self.status: show.status("Painting …"), self.grid: show.EMPTY, self.results: gr.Column(visible=False)}
        for step in paint.paint(self.device, str(request.session_hash), words):
            if isinstance(step, paint.Growing):
                told = f"Painting {step.labels[step.variant]}: {100 * step.drawn:.0f}% drawn"
                yield {self.status: show.status(told), self.grid: growth.show(step)}
            else:
                yield self.finished(step)

    def finished(self, painted: paint.Painted) -> dict[Any, Any]:
        names = [picture.name for of_variant in painted.pictures for picture in of_variant]
        first, last = painted.pictures[0], painted.pictures[min(1, len(painted.pictures) - 1)]
        left = max(first, key=lambda picture: picture.best)
        right = last[first.index(left)] if not left.best else max(last, key=lambda picture: picture.best)
        slider, where = self.look_closer(painted, left.name, right.name)
        return {
            self.status: show.status(f"{len(names)} pictures, {len(painted.labels)} decodings, one noise"),
            self.grid: show.show_painted(painted),
            self.painted: painted,
            self.results: gr.Column(visible=True),
            self.left: gr.Dropdown(names, value=left.name),
            self.right: gr.Dropdown(names, value=right.name),
            self.slider: slider,
            self.where: where,
            self.command: painted.command,
            self.settings: json.dumps(painted.settings, indent=1, ensure_ascii=False),
            self.archive: f"{painted.archive}",
        }

    def look_closer(self, painted: paint.Painted | None, left: str, right: str):
        with one_line():
            if painted is None:
                raise ValueError("this picture is no longer here: paint it again")
            one, other = painted.find(left), painted.find(right)
            return (f"{one.file}", f"{other.file}"), paint.show_where(painted, other)

    def offer_api(self, values: list[Any]) -> None:
        def paint_files(request: gr.Request, prompt, seed, guidance, temperature, images, scorer, decodings):
            words = read_words(
                self.device, prompt, seed, guidance, temperature, images, scorer, inputs.check_specs(decodings)
            )
            for step in paint.paint(self.device, str(request.session_hash), words):
                if isinstance(step, paint.Growing):
                    yield None, "", {"painting": step.labels[step.variant], "drawn": round(step.drawn, 3)}
                else:
                    files = [f"{picture.file}" for of_variant in step.pictures for picture in of_variant]
                    yield files, step.command, step.settings

        with gr.Column(visible=False):
            decodings = gr.JSON(["baseline", "dola"], label="decodings, as --compare takes them")
            files = gr.File(file_count="multiple", label="pictures")
            told = [files, gr.Textbox(label="command"), gr.JSON(label="settings")]
            gr.Button().click(telling()(paint_files), [*values, decodings], told, api_name="paint", **QUEUED)


def read_words(device: Device, prompt, seed, guidance, temperature, images, scorer, specs: list[str]) -> list[str]:
    """What the visitor asked for, checked, as options of the command."""
    inputs.check_text("prompt", prompt, inputs.LONGEST_PROMPT)
    seed = inputs.check_count("seed", seed, inputs.LARGEST_SEED, least=0)
    images = inputs.check_count("pictures", images, inputs.MOST_IMAGES)
    guidance, temperature = inputs.check_sampling(guidance, temperature)
    scorer = inputs.check_scorer(scorer)
    return paint.command_words(prompt, seed, guidance, temperature, images, specs, scorer, device.args)


def stopper(device: Device) -> Callable:
    def stop(request: gr.Request) -> str:
        device.stop(str(request.session_hash))
        return STOPPED

    return stop


# --- ask -------------------------------------------------------------------------------------------------------------


class AskTab:
    def __init__(self, device: Device):
        self.device, self.turns = device, gr.State([], time_to_live=3600)
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=2, min_width=320):
                self.picture = upload("Picture")
                self.question = gr.Textbox(
                    label="Question", placeholder="What is in the image?", max_length=inputs.LONGEST_QUESTION
                )
                pairs = [[f"{EXAMPLES / name}", question] for name, question in QUESTIONS]
                asked = [question for _, question in QUESTIONS]
                examples(pairs, [self.picture, self.question], asked)
                self.row = contrast_row(device, "one layer", inputs.KINDS[2:], "DoLa")
                with gr.Accordion("Candidates", open=False):
                    self.candidates = gr.Textbox(
                        label="What the picture may show, a line each", lines=3, placeholder=CANDIDATES
                    )
                    self.lambda_mm = gr.Slider(0, 1, 0.7, step=0.05, label="Fusion λ")
                self.longest = gr.Slider(1, inputs.MOST_TOKENS, 64, step=1, label="Longest answer, tokens")
                with gr.Row():
                    start = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    stop = gr.Button("Stop", min_width=90)
                    anew = gr.Button("New chat", min_width=90)
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(READY, elem_id="ask-status")
                with gr.Row():
                    self.chats = [
                        gr.Chatbot(
                            label=name,
                            height=360,
                            render_markdown=False,
                            elem_id=name.lower(),
                            min_width=150,
                            buttons=[],
                        )
                        for name in ("Baseline", "DoLa")
                    ]
                self.ranking = gr.HTML("", elem_id="ranking")
        inputs_of = [self.turns, self.picture, self.question, self.longest, self.candidates, self.lambda_mm, *self.row]
        outputs = [self.status, *self.chats, self.ranking, self.turns, self.question]
        handler, how = telling(self.status)(self.run), {"show_progress_on": self.status, "api_visibility": "private"}
        asking: list[Any] = [
            listen(handler, inputs_of, outputs, **how, **QUEUED) for listen in (start.click, self.question.submit)
        ]
        start.click(None, js=SCROLL.format("ask-status"), api_visibility="private")
        stop.click(stopper(device), None, [self.status], cancels=asking, **AT_ONCE)
        cleared = [self.turns, *self.chats, self.ranking]
        for listen in (anew.click, self.picture.change):
            listen(lambda: ([], [], [], ""), None, cleared, **AT_ONCE)
        self.offer_api()

    def run(self, request: gr.Request, turns, picture, question, longest, candidates, lambda_mm, *row):
        if len(turns) >= inputs.MOST_TURNS:
            raise ValueError(f"a conversation has at most {inputs.MOST_TURNS} questions: begin a new one")
        spec = inputs.write_spec(*row)
        yield {self.status: show.status("Reading …"), self.question: ""}
        turn = ask.Turn("")
        for step in self.answers(request, picture, turns, question, spec, longest, candidates, lambda_mm):
            if isinstance(step, ask.Turn):
                turn = step
                shown = dict(zip(self.chats, map(chat, [[*turns, turn]] * 2, ("baseline", "dola")), strict=True))
                yield {self.status: show.status("Answering …"), **shown}
            else:
                yield {self.ranking: show.show_ranking(step, lambda_mm)}
        yield {self.status: READY, self.turns: [*turns, turn]}

    def answers(self, request: gr.Request, picture, turns, question, spec, longest, candidates, lambda_mm):
        return ask.ask(
            self.device,
            str(request.session_hash),
            picture,
            turns,
            inputs.check_text("question", question, inputs.LONGEST_QUESTION),
            inputs.read_contrast(spec),
            inputs.check_count("longest answer", longest, inputs.MOST_TOKENS),
            inputs.check_candidates(candidates),
            lambda_mm,
        )

    def offer_api(self) -> None:
        def answer(request: gr.Request, picture, question, decoding, max_new_tokens, candidates, lambda_mm):
            turn, ranking = ask.Turn(""), None
            steps = self.answers(request, picture, [], question, decoding, max_new_tokens, candidates, lambda_mm)
            for step in steps:
                if isinstance(step, ask.Turn):
                    turn = step
                else:
                    ranking = step._asdict()
                yield turn.baseline, turn.dola, ranking

        with gr.Column(visible=False):
            decoding = gr.Textbox("dola", label="decoding, as --compare takes it")
            texts = gr.Textbox(label="baseline"), gr.Textbox(label="DoLa"), gr.JSON(label="ranking")
            values = [self.picture, self.question, decoding, self.longest, self.candidates, self.lambda_mm]
            gr.Button().click(telling()(answer), values, list(texts), api_name="ask", **QUEUED)


def chat(turns: list[ask.Turn], side: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", getattr(turn, side)))
        if text
    ]


# --- layers ----------------------------------------------------------------------------------------------------------

HEADS = {"a painting": "gen_head", "an answer": "lm_head"}


class LayersTab:
    def __init__(self, device: Device):
        self.device = device
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=2, min_width=320):
                self.head = gr.Radio(list(HEADS), value="a painting", label="Read each layer's say on")
                self.text = gr.Textbox(label="Prompt", max_length=inputs.LONGEST_PROMPT)
                self.answer = gr.Textbox(label="True answer", visible=False, max_length=inputs.LONGEST_ANSWER)
                self.picture = upload("Picture")
                prompts = [["a painting", PROMPTS[1], "", f"{EXAMPLES / QUESTIONS[0][0]}"]]
                answers = [["an answer", question, true, f"{EXAMPLES / name}"] for name, question, true in ANSWERS]
                values = [self.head, self.text, self.answer, self.picture]
                named = [PROMPTS[1], *(f"{question} {true}" for _, question, true in ANSWERS)]
                examples([*prompts, *answers], values, named)
                start = gr.Button("Read the layers", variant="primary", elem_id="read")
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(READY, elem_id="layers-status")
                self.curve = gr.HTML("", elem_id="curve")
                self.place = gr.Slider(1, 2, 1, step=1, label="Token", visible=False, elem_id="place")
                self.lens = gr.HTML("", elem_id="lens")

        def fit(head: str):
            painting = head == "a painting"
            return gr.Textbox(label="Prompt" if painting else "Question"), gr.Textbox(visible=not painting)

        self.head.change(fit, [self.head], [self.text, self.answer], **AT_ONCE)
        outputs = [self.status, self.curve, self.place, self.lens]
        private = {"show_progress_on": self.status, "api_visibility": "private"}
        start.click(telling(self.status)(self.read), values, outputs, **private, **QUEUED)
        start.click(None, js=SCROLL.format("layers-status"), api_visibility="private")
        self.place.input(self.move, [*values, self.place], [self.lens], trigger_mode="always_last", **private, **QUEUED)
        with gr.Column(visible=False):
            found = gr.JSON(label="curve and lens")
            place = gr.Number(1, label="token", precision=0)
            gr.Button().click(telling()(self.find), [*values, place], [found], api_name="layers", **QUEUED)

    def look(self, request: gr.Request, head, text, answer, picture, place, with_curve: bool) -> layers.Found:
        if head not in HEADS:
            raise ValueError(f"expected one of {', '.join(HEADS)}")
        inputs.check_text("prompt or question", text, inputs.LONGEST_PROMPT)
        if HEADS[head] == "lm_head":
            inputs.check_text("true answer", answer, inputs.LONGEST_ANSWER)
        place = inputs.check_count("token", place, 1 << 16)
        session = str(request.session_hash)
        return layers.look(self.device, session, HEADS[head], text, answer, picture, place, with_curve)

    def read(self, request: gr.Request, head, text, answer, picture):
        yield {self.status: show.status("Reading every layer …")}
        found = self.look(request, head, text, answer, picture, 1, True)
        assert found.curve is not None
        yield {
            self.status: READY,
            self.curve: show.show_curve(found.curve),
            self.place: gr.Slider(1, found.lens.places, 1, visible=True),
            self.lens: show.show_lens(found.lens),
        }

    def move(self, request: gr.Request, head, text, answer, picture, place):
        with one_line():
            return show.show_lens(self.look(request, head, text, answer, picture, place, False).lens)

    def find(self, request: gr.Request, head, text, answer, picture, token):
        found = self.look(request, head, text, answer, picture, token, True)
        assert found.curve is not None
        lens = found.lens._asdict()
        yield {
            "curve": found.curve._asdict(),
            "lens": {key: lens[key] for key in ("place", "places", "true", "name", "rows")},
        }


# --- the page --------------------------------------------------------------------------------------------------------


def build_page(device: Device) -> gr.Blocks:
    tokens = num_image_tokens(device.model, device.processor)
    facts = f"{Path(device.args.model).name} · {device.num_layers} layers · {tokens} tokens a picture"
    with gr.Blocks(title="Janus with DoLa", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<header><h1>Janus <span>with DoLa</span></h1><p>{show.escape(facts)}</p></header>")
        with gr.Tabs() as tabs:
            with gr.Tab("Paint", id="paint"):
                painting = PaintTab(device)
            with gr.Tab("Ask", id="ask"):
                asking = AskTab(device)
            with gr.Tab("Layers", id="layers"):
                looking = LayersTab(device)

        def take(painted: paint.Painted | None, name: str) -> tuple[str, str]:
            with one_line():
                if painted is None:
                    raise ValueError("paint something first")
                return f"{painted.find(name).file}", painted.prompt

        def to_ask(painted, name):
            return take(painted, name)[0], gr.Tabs(selected="ask")

        def to_layers(painted, name):
            return *take(painted, name), "a painting", gr.Tabs(selected="layers")

        chosen = [painting.painted, painting.right]
        painting.to_ask.click(to_ask, chosen, [asking.picture, tabs], **AT_ONCE)
        filled = [looking.picture, looking.text, looking.head, tabs]
        painting.to_layers.click(to_layers, chosen, filled, **AT_ONCE)
    return page.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=1)
