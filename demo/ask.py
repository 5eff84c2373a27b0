"""Questions about a picture: a conversation with the baseline and one with DoLa, token by token, and candidates."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from demo.device import Device, Emit
from inference import answer_batch
from janus.dola.files import load_image
from janus.dola.fusion import TowerPrior
from janus.dola.inputs import pixel_values
from janus.dola.rerank import (
    build_text_bank,
    rerank_with_dola_static_siglip,
    siglip_temperature,
    tower_depth,
    vision_layer,
)
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
    turn = Turn(question)

    def answer(side: str, tell: Callable[[str], None], **how: Any) -> str:
        said = [text for turn in turns for text in (turn.question, getattr(turn, side))]
        asked = ([] if picture is None else [picture], [*said, question])
        options = {"streamer": Told(device.tokenizer, tell), "max_new_tokens": max_new_tokens}
        return answer_batch(device.model, device.processor, [asked], **how, **options)[0].text.strip()

    turn = turn._replace(baseline=answer("baseline", lambda text: emit(Turn(question, text))))
    turn = turn._replace(dola=answer("dola", lambda text: emit(Turn(question, turn.baseline, text)), dola=contrast))
    emit(turn)
    if picture is not None and candidates:
        siglip, tokenizer = device.text_encoder
        bank, tau = build_text_bank(siglip, tokenizer, candidates), siglip_temperature(siglip)
        rows = rank(device, picture, candidates, bank, tau, switches)
        prior = TowerPrior(switches, [candidates], [bank], tau)
        fused = answer("dola", lambda _: emit(), dola=contrast, prior=prior)
        layer = vision_layer(device.model.vision_model.vision_tower, switches)
        emit(Ranking(sorted(rows, key=lambda row: -row[2]), layer, fused))


def rank(
    device: Device, picture: Path, candidates: Sequence[str], bank: torch.Tensor, tau: float, switches: DoLaSwitches
) -> list[tuple[str, float, float]]:
    """Each candidate with the tower's q_N and p_hat of it."""
    tower = device.model.vision_model.vision_tower
    pixels = pixel_values(device.processor.image_processor, [load_image(picture)]).to(next(tower.parameters()))
    q_N, p_hat = (
        rerank_with_dola_static_siglip(tower, pixels, bank, layer, switches.alpha_V, tau, gamma=switches.gamma_V)[0]
        for layer in (tower_depth(tower), vision_layer(tower, switches))
    )
    return list(zip(candidates, q_N.tolist(), p_hat.tolist(), strict=True))
