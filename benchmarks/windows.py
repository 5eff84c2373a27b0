"""Decoding several tokens per pass: are they the same tokens, in how many passes, in what time.

python -m benchmarks.windows [--pictures 25] [--rounds 5] [--figure docs/windows.png]

Pictures of janus-tiny's prompts, one at a time, at several guidances, baseline and DoLa: how many come out as one token
at a time makes them, in float32 and in bfloat16, and the tokens per pass by window, as a table and a figure. Then time
and passes over those of window 1, by the images decoded together, in one process.
"""

import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation_inference import Decoding, format_image_prompt, sample_image_tokens
from janus.dola.cli import CommandParser, add_model_arguments, positive, run_command
from janus.dola.loading import load_pretrained_model
from tools.scenes import one_object_scenes

GUIDANCES, WINDOWS = (1.0, 1.5, 2.0, 5.0), (4, 8, 16, 32)
DECODINGS = {"baseline": Decoding(), "layer 6": Decoding((6,)), "exit 2, 4, 6, 7": Decoding((2, 4, 6, 7))}
TIMED_IMAGES, TIMED_WINDOWS = (1, 4, 8, 16), (1, 4, 8, 16)


def sample_picture(model, processor, decoding: Decoding, number: int, window: int) -> tuple[Tensor, list[int]]:
    """The tokens `[T]` of one picture, and how many of them each pass made final."""
    scenes = one_object_scenes()
    prompt = format_image_prompt(processor, scenes[number * 37 % len(scenes)].caption)
    made: list[int] = []
    how: dict[str, Any] = {"parallel_size": 1, "seeds": [number], "window": window, "on_step": made.append}
    return sample_image_tokens(model, processor, [prompt], decoding, **how)[0, 0], made


def passes_by_place(made: list[int]) -> Tensor:
    """The share of a pass that each token took, `[T]`."""
    return torch.cat([torch.full((n,), 1 / n) for n in made])


def compare(model, processor, decoding: Decoding, numbers: range, windows=WINDOWS) -> dict[int, dict[str, Any]]:
    """By window: pictures and tokens equal to those of window 1, tokens per pass, passes by place `[T]`."""
    told: dict[int, dict[str, Any]] = {w: {"pictures": 0, "tokens": 0, "passes": 0, "by place": 0.0} for w in windows}
    for number in numbers:
        expected, _ = sample_picture(model, processor, decoding, number, 1)
        for window, of_window in told.items():
            tokens, made = sample_picture(model, processor, decoding, number, window)
            of_window["pictures"] += int(torch.equal(tokens, expected))
            of_window["tokens"] += int((tokens == expected).sum())
            of_window["passes"] += len(made)
            of_window["by place"] += passes_by_place(made) / len(numbers)
    for of_window in told.values():
        of_window["per pass"] = len(numbers) * len(expected) / of_window["passes"]
        of_window["tokens"] /= len(numbers) * len(expected)
    return told
