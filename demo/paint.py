"""Painting as the command does it, told of while it runs: the same files, and pictures of the tokens so far."""

import argparse
import math
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from demo.device import Device, Emit
from generation_inference import Decoding, Draft, format_question, num_image_tokens, tokens_to_images
from janus.dola.cli import DEFAULT_MODEL
from janus.dola.files import RunLog, load_image
from janus.dola.painting import PaintingRun, is_run_file, read_trace, variant_folders
from janus.dola.pictures import layer_map, where_map
from janus.dola.prompt_files import Prompt
from janus.dola.scorers import Reader, make_scorer
from run_batch_prompts import (
    build_parser,
    decode_and_write,
    make_decoding,
    painting_settings,
    read_scorer,
    read_variants,
    sample_variant,
)

SECONDS_BETWEEN = 0.3
"""Between partial pictures: turning codes to pixels takes time from drawing them."""


class Growing(NamedTuple):
    """Where painting is: the variant at work, how much of it is drawn (0 to 1), its pictures so far."""

    labels: list[str]
    variant: int
    drawn: float
    pictures: list[Image.Image]


class Picture(NamedTuple):
    """A finished picture. `where` is its trace; `score` and `best` are those of its scorer."""

    name: str
    file: Path
    where: Path
    score: float | None
    best: bool


class Painted(NamedTuple):
    """A finished run: its pictures variant by variant, and the files that tell of it."""

    prompt: str
    labels: list[str]
    pictures: list[list[Picture]]
    command: str
    settings: dict[str, Any]
    archive: Path

    def find(self, name: str) -> Picture:
        """Raises ValueError where there is none of this name, or no longer."""
        for picture in (picture for of_variant in self.pictures for picture in of_variant):
            if picture.name == name and picture.file.is_file():
                return picture
        raise ValueError("this picture is no longer here: paint it again")


# --- the command that does the same ----------------------------------------------------------------------------------


def command_words(
    prompt: str,
    seed: int,
    guidance: float,
    temperature: float,
    images: int,
    specs: Sequence[str],
    scorer: str | None,
    model: argparse.Namespace,
) -> list[str]:
    """The options of `run_batch_prompts.py` that paint the same files."""
    words = [f"--prompt={prompt}", "--compare", *specs, "--seed", f"{seed}", "--cfg_weight", f"{guidance}"]
    words += ["--temperature", f"{temperature}", "--format", "png", "--trace"]
    if scorer is None:
        words += ["--parallel_size", f"{images}"]
    else:
        words += ["--best_of", f"{images}", "--scorer", scorer, "--keep_all"]
    usual = {"model": DEFAULT_MODEL, "device": "auto", "dtype": "auto"}
    return words + [
        f"--{name}={getattr(model, name)}" for name, value in usual.items() if getattr(model, name) != value
    ]


# --- painting --------------------------------------------------------------------------------------------------------


def paint(device: Device, session: str, words: Sequence[str]) -> Iterator[Growing | Painted]:
    """Partial pictures, then the finished run. Raises ValueError as the command does, and Stopped."""
    parser = build_parser()
    args = parser.parse_args(list(words))
    decodings = {name: make_decoding(device.model, **values) for name, values in read_variants(parser, args).items()}
    settings = painting_settings(args, device.model, read_scorer(parser, args), decodings)
    yield from device.stream(session, partial(paint_run, device, words, args.prompt[0], settings, decodings))


def paint_run(
    device: Device,
    words: Sequence[str],
    prompt: str,
    settings: dict[str, Any],
    decodings: Mapping[str, Decoding],
    emit: Emit,
) -> None:
    model, processor = device.model, device.processor
    score = None
    if settings["scorer"] is not None:
        reader = Reader(model, processor, partial(format_question, processor))
        score = make_scorer(settings["scorer"]["spec"], reader, lambda: device.text_encoder)
    folder = device.new_folder()
    files = {"folders": variant_folders, "is_own": is_run_file}
    with RunLog(folder / "manifest.jsonl", settings, [prompt], **files) as log:
        run = PaintingRun(log, [Prompt(prompt)])
        run.choose_batch_size(run.parallel_size)
        labels, sampled = list(run.labels.values()), []
        for variant, decoding in enumerate(decodings.values()):
            watch = Watch(model, num_image_tokens(model, processor), emit, labels, variant)
            batch, tell = range(1), lambda *_: None
            sampled.append(sample_variant(run, model, processor, batch, run.parallel_size, decoding, tell, watch))
        decode_and_write(run, model, range(1), sampled, None, score)
        told = [describe(run, position) for position in run.positions(0)]
    archive = shutil.make_archive(f"{folder}", "zip", folder)
    emit(
        Painted(
            prompt,
            labels,
            [told[samples.start : samples.stop] for samples in run.samples(0, len(told))],
            f"python run_batch_prompts.py {shlex.join(words)} --outdir outputs/page",
            log.run,
            Path(shutil.move(archive, folder / "painted.zip")),
        )
    )


def describe(run: PaintingRun, position: int) -> Picture:
    _, variant, image = run.place(position)
    entry, folder = run.log.entries[position], run.log.directory
    return Picture(
        f"{run.labels[variant]} · {image + 1}",
        folder / run.file(position),
        folder / run.file(position, "_trace.jsonl"),
        entry.get("score"),
        entry.get("best", False),
    )


class Watch:
    """Turns the tokens of a variant into partial pictures, the first at once and then now and then."""

    def __init__(self, model, num_tokens: int, emit: Emit, labels: list[str], variant: int):
        self.model, self.num_tokens, self.emit = model, num_tokens, emit
        self.labels, self.variant, self.shown = labels, variant, -math.inf

    def __call__(self, draft: Draft) -> None:
        self.emit()
        whole = min(draft.done) == self.num_tokens
        if time.monotonic() - self.shown < SECONDS_BETWEEN and not whole:
            return
        done = draft.final.clamp(max=self.num_tokens)
        pictures = partial_pictures(self.model, draft.tokens[:, : self.num_tokens], done)
        self.emit(Growing(self.labels, self.variant, done.float().mean().item() / self.num_tokens, pictures))
        self.shown = time.monotonic()


def partial_pictures(model, tokens: torch.Tensor, done: torch.Tensor) -> list[Image.Image]:
    """The first `done` `[n]` of the codes `[n, side * side]` as pictures that are transparent beyond them.

    The VQ decoder looks around each code: those that are not drawn yet are taken to be like the last ones above.
    """
    side, places = math.isqrt(tokens.shape[1]), torch.arange(tokens.shape[1], device=tokens.device)
    drawn, last = places < done[:, None], done[:, None] - 1
    above = places - side * ((places - last - 1) // side + 1)
    filled = tokens.gather(1, torch.where(drawn, places, torch.where(above < 0, last, above)))
    pictures = tokens_to_images(model, filled.clamp(min=0))
    for picture, seen in zip(pictures, drawn.cpu().numpy(), strict=True):
        alpha = Image.fromarray(seen.reshape(side, side).astype(np.uint8) * 255)
        picture.putalpha(alpha.resize(picture.size, Image.Resampling.NEAREST))
    return pictures


# --- looked at closely -----------------------------------------------------------------------------------------------


def show_where(painted: Painted, picture: Picture) -> Image.Image:
    """The picture beside the map of where DoLa acted, on one scale for the run, and the layers that early exit took."""
    traces = {other.where: read_trace(other.where) for of_variant in painted.pictures for other in of_variant}
    top = max(told["jsd"].max() for told in traces.values())
    told = traces[picture.where]
    both = where_map(load_image(picture.file), told["jsd"], told["draw_changed"], top)
    if len(np.unique(told["layer"])) == 1:
        return both
    layers = layer_map(told["layer"])
    gap = both.width - 2 * layers.width
    whole = Image.new("RGB", (both.width + gap + layers.width, both.height), "white")
    whole.paste(both, (0, 0))
    whole.paste(layers, (both.width + gap, 0))
    return whole
