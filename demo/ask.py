"""Questions about a picture: a conversation with the baseline and one with DoLa, token by token, and candidates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from demo.device import Device, Emit
from generation_inference import render_chat
from inference import decode_answers
from janus.dola.files import load_image
from janus.dola.fusion import VisionPriorLogitsProcessor, first_token_ids, vision_prior
from janus.dola.inputs import pixel_values
from janus.dola.logits_processor import DoLaLogitsProcessor
from janus.dola.rerank import build_text_bank, rerank_with_dola_static_siglip, siglip_temperature, vision_layer
from janus.dola.switches import DoLaSwitches


class Turn(NamedTuple):
    """A question, and the answers to it so far."""

    question: str
    baseline: str = ""
    dola: str = ""


class Ranking(NamedTuple):
    """Candidates with the tower's probabilities, without and with DoLa, and the answer that both towers give."""

    rows: list[tuple[str, float, float]]
    layer: int
    fused: str


class Told(BaseStreamer):
    """Tells of an answer's text after each of its tokens."""

    def __init__(self, tokenizer, tell: Callable[[str], None]):
        self.tokenizer, self.tell = tokenizer, tell
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()
        self.tell(self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip())

    def end(self) -> None:
        pass


def ask(
    device: Device,
    session: str,
    picture: Path | None,
    turns: Sequence[Turn],
    question: str,
    contrast: dict[str, Any],
    max_new_tokens: int,
    candidates: Sequence[str],
    lambda_mm: float,
) -> Iterator[Turn | Ranking]:
    """The turn as its answers grow, and with candidates their ranking behind it.

    Either side answers after its own answers to the `turns` before. Raises ValueError as the parts do, and Stopped.
    """
    if candidates and picture is None:
        raise ValueError("candidates: they are ranked on a picture, and there is none")
    switches = DoLaSwitches(lambda_mm=lambda_mm)
    work = partial(answer_both, device, picture, turns, question, contrast, max_new_tokens, candidates, switches)
    yield from device.stream(session, work)


def answer_both(
    device: Device,
    picture: Path | None,
    turns: Sequence[Turn],
    question: str,
    contrast: dict[str, Any],
    max_new_tokens: int,
    candidates: Sequence[str],
    switches: DoLaSwitches,
    emit: Emit,
) -> None:
    llm, turn = device.model.language_model, Turn(question)

    def answer(side: str, processors: Sequence[LogitsProcessor], tell: Callable[[str], None]) -> str:
        said = [text for turn in turns for text in (turn.question, getattr(turn, side))]
        batch = prepare_chat(device, picture, [*said, question])
        options: Any = {"streamer": Told(device.tokenizer, tell), "max_new_tokens": max_new_tokens}
        return decode_answers(device.model, device.processor, batch, processors, **options)[0][0].strip()

    with DoLaLogitsProcessor(llm, use_dola=False) as off:
        turn = turn._replace(baseline=answer("baseline", [off], lambda text: emit(Turn(question, text))))
    with DoLaLogitsProcessor(llm, **contrast) as dola:
        turn = turn._replace(dola=answer("dola", [dola], lambda text: emit(Turn(question, turn.baseline, text))))
        emit(turn)
        if picture is not None and candidates:
            p_base, p_hat, layer = rank(device, picture, candidates, switches)
            words = [first_token_ids(device.tokenizer, candidate) for candidate in candidates]
            r_V = vision_prior(p_hat, words, llm.lm_head.weight.shape[0], switches.mm_topk_for_T)
            prior = VisionPriorLogitsProcessor(r_V, switches.lambda_mm, 0.0 if dola.on else switches.alpha_L)
            rows = list(zip(candidates, p_base.tolist(), p_hat.tolist(), strict=True))
            fused = answer("dola", [dola, prior], lambda _: emit())
            emit(Ranking(sorted(rows, key=lambda row: -row[2]), layer, fused))


def prepare_chat(device: Device, picture: Path | None, turns: Sequence[str]):
    """Questions and answers by turns, the last one a question, behind the picture, as a batch of one."""
    first, *others = turns
    images = [] if picture is None else [load_image(picture)]
    if images:
        first = f"{device.processor.image_tag}\n{first}"
    prompt = render_chat(device.processor, [first, *others], device.processor.system_prompt)
    batch = device.processor(prompt=prompt, images=images, force_batchify=True)
    weight = device.model.language_model.get_input_embeddings().weight
    return batch.to(weight.device, weight.dtype)


def rank(
    device: Device, picture: Path, candidates: Sequence[str], switches: DoLaSwitches
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tower's q_N and p_hat of the candidates, `[C]` each, and the layer it was contrasted with."""
    siglip, tokenizer = device.text_encoder
    tower, bank = device.model.vision_model.vision_tower, build_text_bank(siglip, tokenizer, candidates)
    pixels = pixel_values(device.processor.image_processor, [load_image(picture)]).to(next(tower.parameters()))
    tau, layer = siglip_temperature(siglip), vision_layer(tower, switches)
    off = vision_layer(tower, replace(switches, use_dola_siglip_static=False))
    p_base, p_hat = (
        rerank_with_dola_static_siglip(tower, pixels, bank, j, switches.alpha_V, tau, gamma=switches.gamma_V)[0]
        for j in (off, layer)
    )
    return p_base, p_hat, layer
