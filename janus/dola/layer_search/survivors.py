"""What teacher forcing found best, painted: only pictures tell whether a contrast paints better ones."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from janus.dola.compare.summary import compare
from janus.dola.files import RunLog
from janus.dola.scorers import Scorer

Paint = Callable[[Sequence[str], Mapping[str, Any]], list[list[Image.Image]]]
"""Prompts, and the fields of a decoding, to the images of each prompt."""


def pick_survivors(summary: dict[str, Any], count: int) -> list[tuple[int, float]]:
    """(layer, alpha) of so many best contrasts of a summary, the best first."""
    means = np.array(summary["means"][summary["metric"]]["dola"])
    cells = list(product(range(len(summary["alphas"])), range(len(summary["layers"]))))
    best = sorted(cells, key=lambda cell: -means[cell])[:count]
    return [(summary["layers"][layer], summary["alphas"][a]) for a, layer in best]


def variants_of(survivors: Sequence[tuple[int, float]], shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The baseline, the mask alone at the survivors' alphas, and the survivors, as fields of a decoding."""
    off = {"layers": [], "alpha": survivors[0][1], "gamma": 1.0, **shared}
    masks = {f"apc alpha {alpha:g}": off | {"alpha": alpha, "gamma": 0.0} for _, alpha in survivors}
    contrasts = {
        f"layer {layer}, alpha {alpha:g}": off | {"layers": [layer], "alpha": alpha} for layer, alpha in survivors
    }
    return {"baseline": off, **masks, **contrasts}


def score_painted(
    prompts: Sequence[str],
    variants: Mapping[str, Mapping[str, Any]],
    paint: Paint,
    scorer: Scorer,
    at_a_time: int,
    log: RunLog,
) -> np.ndarray:
    """`[prompts, variants]`, the mean score of a prompt's images; batches that the log holds are not painted again.

    Raises ValueError for a log of something else.
    """
    with tqdm(total=len(prompts), unit="prompt") as bar:
        for start in range(0, len(prompts), at_a_time):
            texts = prompts[start : start + at_a_time]
            if len(log.entries) < start + len(texts):
                scores = [score_images(paint(texts, decoding), texts, scorer) for decoding in variants.values()]
                entries = [{"index": start + i, "scores": list(of)} for i, of in enumerate(zip(*scores, strict=True))]
                log.add(start, entries)
            bar.update(len(texts))
    try:
        scored = np.array([entry["scores"] for entry in log.entries], dtype=float)
        if scored.shape != (len(prompts), len(variants)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{log.path} is not what this search painted") from None
    return scored


def score_images(images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], scorer: Scorer) -> list[float]:
    """The mean score of each prompt's images."""
    flat = [image for of_prompt in images for image in of_prompt]
    scores = scorer(flat, [text for text, of_prompt in zip(prompts, images, strict=True) for _ in of_prompt])
    return [float(mean) for mean in np.reshape(scores, (len(prompts), -1)).mean(1)]


def judge(variants: Mapping[str, Mapping[str, Any]], scores: np.ndarray) -> dict[str, Any]:
    """What `decide` needs of painted scores `[prompts, variants]`: the best contrast, and the held-out choice."""
    (group,) = compare(variants, scores)
    best = max((row for row in group["rows"] if row["kind"] == "dola"), key=lambda row: row["mean"])
    decoding = variants[best["variant"]]
    return {
        "best": {"layer": decoding["layers"][0], "alpha": decoding["alpha"]},
        "held_out": group["held_out"],
        "rows": group["rows"],
    }
