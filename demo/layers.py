"""What every layer says: the search for one example, and the most probable tokens of each layer at one place."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from demo.device import Device, Emit
from dola_runtime import compute_logprobs_from_hidden
from generation_inference import (
    default_sampling,
    format_image_prompt,
    format_question,
    image_geometry,
    pack_prompts,
    tokens_to_images,
)
from janus.dola.layer_search.examples import Example
from janus.dola.layer_search.metrics import ALPHAS, measure, metric_names
from janus.dola.layer_search.tasks import Task, answers_task, image_task

TOP = 5
AROUND = 5
"""Codes, in x and in y, among which one is turned to pixels: the VQ decoder looks around each."""


class Curve(NamedTuple):
    """Mean probability of the true tokens: of the baseline, and by alpha, as text, of the mask and of layers 1..N-1."""

    baseline: float
    apc_only: dict[str, float]
    dola: dict[str, list[float]]


class Lens(NamedTuple):
    """One place of an example. `rows[j - 1]` are layer j's most probable tokens as (id, name, probability).

    Of a painting also the picture that its codes make, and what each code in `rows` would look like there.
    """

    place: int
    places: int
    true: int
    name: str
    rows: list[list[tuple[int, str, float]]]
    picture: Image.Image | None = None
    swatches: dict[int, Image.Image] | None = None


class Found(NamedTuple):
    curve: Curve | None
    lens: Lens


def look(
    device: Device, session: str, head: str, text: str, answer: str, picture: Path | None, place: int, with_curve: bool
) -> Found:
    """All layers at one place of a painting ("gen_head") or of an answer ("lm_head"); also the curve over all places.

    Raises ValueError for a place that the example does not have, and Stopped.
    """
    if head == "gen_head":
        if picture is None:
            raise ValueError("picture: none is given, and its codes are what is read")
        example: Example = {"prompt": text, "image": picture}
    else:
        example = {"question": text, "answer": answer} | ({} if picture is None else {"image": picture})
    (found,) = device.stream(session, partial(read_layers, device, head, example, place, with_curve))
    return found


def read_layers(device: Device, head: str, example: Example, place: int, with_curve: bool, emit: Emit) -> None:
    model, processor = device.model, device.processor

    def encode(texts: Sequence[str]):
        return pack_prompts(processor, [format_image_prompt(processor, text) for text in texts], model.device)

    if head == "gen_head":
        task = image_task(model, processor, default_sampling(model)["cfg_weight"], encode)
    else:
        task = answers_task(model, processor, partial(format_question, processor))
    curve = draw_curve(task, example) if with_curve else None
    emit()
    lens, true_tokens = read_place(task, example, place)
    if head == "gen_head":
        (painted,) = tokens_to_images(model, true_tokens[None])
        codes = sorted({token for row in lens.rows for token, _, _ in row} | {lens.true})
        swatches = paint_codes(device, true_tokens, place, codes)
        lens = lens._replace(picture=painted, swatches=dict(zip(codes, swatches, strict=True)))
    emit(Found(curve, lens))


def draw_curve(task: Task, example: Example) -> Curve:
    values = measure(task, [example], range(1, task.num_layers), ALPHAS)[0, metric_names([example]).index("prob")]
    rows: Any = dict(zip(map("{:g}".format, ALPHAS), values.tolist(), strict=True))
    return Curve(
        float(values[0, 0]),
        {alpha: row[1] for alpha, row in rows.items()},
        {alpha: row[2:] for alpha, row in rows.items()},
    )


@torch.inference_mode()
def read_place(task: Task, example: Example, place: int) -> tuple[Lens, torch.Tensor]:
    """What the layers say at a place, counted from 1, and the true tokens of all places `[T]`."""
    reading = next(iter(task.read([example])))
    forced, places = reading.forced, len(reading.forced.places[0])
    if not 1 <= place <= places:
        raise ValueError(f"token: expected 1 to {places}, got {place}")
    at = forced.places[0][place - 1]
    log_q = torch.cat(
        [
            compute_logprobs_from_hidden(forced.hidden[1:-1, at, None], reading.ln_out, reading.phi),
            compute_logprobs_from_hidden(forced.hidden[-1:, at, None], None, reading.phi),
        ]
    )
    top = log_q[:, 0].exp().topk(TOP)
    true = int(forced.targets[at])
    rows = [
        [(token, task.name_token(example, token), p) for token, p in zip(*row, strict=True)]
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    lens = Lens(place, places, true, task.name_token(example, true), rows)
    return lens, forced.targets[forced.places[0]]


def paint_codes(device: Device, true_tokens: torch.Tensor, place: int, codes: Sequence[int]) -> list[Image.Image]:
    """The patch that each code would make at a place (from 1) of a picture `[T]`, among the codes around it."""
    patch = image_geometry(device.model, device.processor)[1]
    grid = true_tokens.view(2 * [math.isqrt(len(true_tokens))])
    side = min(AROUND, len(grid))
    y, x = divmod(place - 1, len(grid))
    top, left = (min(max(at - side // 2, 0), len(grid) - side) for at in (y, x))
    tokens = grid[top : top + side, left : left + side].repeat(len(codes), 1, 1)
    tokens[:, y - top, x - left] = torch.tensor(codes, device=tokens.device)
    y, x = (y - top) * patch, (x - left) * patch
    return [picture.crop((x, y, x + patch, y + patch)) for picture in tokens_to_images(device.model, tokens.flatten(1))]
