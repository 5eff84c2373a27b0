"""A finished painting run without a model: random pictures and tokens, written as the command writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from generation_inference import Decoding
from janus.dola.files import RunLog
from janus.dola.painting import PaintingRun, is_run_file, variant_folders
from janus.dola.prompt_files import Prompt

VARIANTS = {"baseline": Decoding(), "apc": Decoding(gamma=0.0), "layer2": Decoding((2,))}


def make_painted(
    directory: Path,
    prompts: Sequence[Prompt],
    variants: Mapping[str, Decoding] = VARIANTS,
    parallel_size: int = 1,
    finish: bool = True,
) -> dict[tuple[int, str, int], np.ndarray]:
    """Returns the pixels of each image by prompt, variant and number; without `finish` the last prompt is missing."""
    settings = {
        **{"model": "janus-tiny", "dtype": "float32", "device": "cpu", "format": "png", "seed": 0, "trace": False},
        **{"parallel_size": parallel_size, "scorer": None, "keep_all": True, "window": None},
        "variants": {name: asdict(decoding) for name, decoding in variants.items()},
    }
    rng, painted = np.random.default_rng(0), {}
    with RunLog(
        directory / "manifest.jsonl",
        settings,
        [prompt.text for prompt in prompts],
        folders=variant_folders,
        is_own=is_run_file,
    ) as log:
        run = PaintingRun(log, prompts)
        for index in range(len(prompts) - (not finish)):
            images, told = [], []
            for position in run.positions(index):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                painted[run.place(position)] = pixels
                images.append(Image.fromarray(pixels))
                told.append({"argmax_changed": np.zeros(4), "passes": np.array(4)})
            tokens = rng.integers(0, 9, (1, len(images), 4))
            for place, values in zip(map(run.place, run.positions(index)), told, strict=True):
                if place[1] == "baseline":
                    del values["argmax_changed"]
            run.write(range(index, index + 1), [images], tokens, [told])
        if run.folders and finish:
            run.write_contact_sheets()
    return painted
