"""Questions on images from a file, cut into batches that are decoded together."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from janus.dola.files import load_image, read_json_file


@dataclass(frozen=True)
class Question:
    """One entry of a questions file. `images` are as the file names them, seen from `folder`."""

    folder: Path
    images: tuple[str, ...]
    turns: tuple[str, ...]
    expected: str | None = None
    candidates: tuple[str, ...] = ()
    domain: str | None = None

    @property
    def asked(self) -> tuple[list[Path], tuple[str, ...]]:
        """What `answer_batch` takes."""
        return [self.folder / image for image in self.images], self.turns

    @property
    def record(self) -> dict[str, Any]:
        """What the log says of it."""
        text = self.turns[0] if len(self.turns) == 1 else list(self.turns)
        record = {"images": list(self.images), "question": text, "candidates": list(self.candidates)}
        others = {"domain": self.domain, "expected": self.expected}
        return record | {key: value for key, value in others.items() if value is not None}


KEYS = ("image", "question", "answer", "candidates", "domain")


def read_questions(path: str | os.PathLike, candidates: Sequence[str] = ()) -> list[Question]:
    """The entries of `[{"image": path, "question": text, "answer": expected, "candidates": [text, ...]}, ...]`.

    Only the question must be there: a text, or the turns of a chat, the user's first and last. "image" may be a list;
    `candidates` stand in where an entry with an image has none; "domain" names a domain of the switches. Image paths
    start from the file's folder. Raises ValueError naming the file and the entry.
    """
    content = read_json_file(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list of at least one question")
    folder, questions = Path(path).parent, []
    for i, entry in enumerate(content):
        where = f"{path}: entry {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, found {entry!r}")
        if unknown := sorted(entry.keys() - set(KEYS)):
            raise ValueError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(KEYS)})")
        images, given = entry.get("image", []), entry.get("candidates", [])
        images = [images] if isinstance(images, str) else images
        for key, value in (("image", images), ("candidates", given)):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}: {key!r} must be strings, found {value!r}")
        question = entry.get("question")
        turns = [question] if isinstance(question, str) else question
        if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise ValueError(f"{where}: 'question' must be a text, or a list of turns, found {question!r}")
        if len(turns) % 2 == 0:
            raise ValueError(f"{where}: 'question' must end with the user's turn, found {len(turns)} turns")
        for key in ("answer", "domain"):
            if not isinstance(entry.get(key), (str, type(None))):
                raise ValueError(f"{where}: {key!r} must be a text, found {entry[key]!r}")
        if given and not images:
            raise ValueError(f"{where}: candidates need an image to be ranked on")
        for image in images:
            try:
                load_image(folder / image)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        offered = tuple(given or candidates) if images else ()
        questions.append(
            Question(folder, tuple(images), tuple(turns), entry.get("answer"), offered, entry.get("domain"))
        )
    return questions


def cut_batches(questions: Sequence[Question], size: int) -> Iterator[range]:
    """The questions that are decoded together: neighbours of one domain, all with candidates or all without."""
    start = 0
    for _, alike in groupby(questions, key=lambda question: (question.domain, bool(question.candidates))):
        end = start + len(list(alike))
        yield from (range(first, min(first + size, end)) for first in range(start, end, size))
        start = end


def is_right(given: str, expected: str) -> bool:
    """Word for word, but for case, space around, and a full stop at the end."""
    given, expected = (text.strip().removesuffix(".").casefold() for text in (given, expected))
    return given == expected
