"""What the benchmarks of the field wrote of a painted directory, read back as scores."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from janus.dola.files import parse_json, read_text


def read_results(path: Path, prompts: Sequence[str], parallel_size: int) -> np.ndarray:
    """Scores `[prompts, images]`, NaN for images that the file does not score, of a results file by its form.

    GenEval: lines of `{"filename": ".../00000/samples/0000.png", "correct": true, ...}`. T2I-CompBench++: a list of
    `{"question_id": 0, "answer": "0.69"}`, images counted over all prompts. GenEval 2: a list, prompt by prompt, of
    lists of scores; their mean is that of the prompt's first image. Raises ValueError naming the file and the entry.
    """
    text = read_text(path).strip()
    scores = np.full((len(prompts), parallel_size), np.nan)
    entries: Any = None
    if text.startswith("["):
        entries = parse_json(text, f"{path}")
        form = _geneval2 if all(isinstance(entry, list) for entry in entries) else _t2i_compbench
    else:
        entries = [parse_json(line, f"{path}: line {n}") for n, line in enumerate(text.splitlines(), start=1)]
        form = _geneval
    if not entries:
        raise ValueError(f"{path}: no results")
    for number, entry in enumerate(entries):
        try:
            index, image, score = form(number, entry, parallel_size)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: entry {number}: {EXPECTED[form]}, found {str(entry)[:100]!r}") from None
        if not (0 <= index < len(prompts) and 0 <= image < parallel_size and np.isfinite(score)):
            raise ValueError(f"{path}: entry {number}: prompt {index}, image {image}, score {score}: not of this run")
        scores[index, image] = score
    return scores


def _geneval(_number: int, entry: Any, _parallel_size: int) -> tuple[int, int, float]:
    place = re.search(r"(\d{5})[/\\]samples[/\\](\d{4,5})\.png$", entry["filename"])
    if place is None or type(entry["correct"]) is not bool:
        raise ValueError
    return int(place[1]), int(place[2]), float(entry["correct"])


def _geneval2(number: int, entry: Any, _parallel_size: int) -> tuple[int, int, float]:
    return number, 0, sum(map(float, entry)) / len(entry) if entry else float("nan")


def _t2i_compbench(_number: int, entry: Any, parallel_size: int) -> tuple[int, int, float]:
    return *divmod(int(entry["question_id"]), parallel_size), float(entry["answer"])


EXPECTED = {
    _geneval: 'expected {"filename": ".../00000/samples/0000.png", "correct": true, ...}',
    _geneval2: "expected a list of scores",
    _t2i_compbench: 'expected {"question_id": 0, "answer": "0.69"}',
}
