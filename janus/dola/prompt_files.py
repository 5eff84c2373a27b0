"""Prompts from whatever file they come in: JSON, JSON lines, plain lines, or a table with a column of prompts."""

import csv
import io
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from janus.dola.files import parse_json, read_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COLUMN = "prompt"


class Prompt(NamedTuple):
    """What to paint, and what else its entry in the file says of it (`fields`)."""

    text: str
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def read_prompts(path: str | os.PathLike, max_prompts: int | None = None) -> list[Prompt]:
    """The prompts of a file, by its suffix: `.txt` one a line, `.jsonl` one object with "prompt" (or a string) a line,
    `.csv` and `.tsv` a table with a column "prompt", anything else JSON: `{"prompts": [...]}` or the list itself, of
    strings or of objects with "prompt".

    Blank lines are none. Raises ValueError naming the file and the entry.
    """
    path = Path(path)
    text = read_text(path).removeprefix("\ufeff")
    entries = {".txt": _lines, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table}.get(path.suffix.lower(), _json)
    prompts = [_prompt(entry, f"{path}: {where}") for where, entry in islice(entries(path, text), max_prompts)]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def _prompt(entry: Any, where: str) -> Prompt:
    fields = {}
    if isinstance(entry, dict):
        column = next((key for key in entry if isinstance(key, str) and key.strip().lower() == COLUMN), None)
        if column is None:
            raise ValueError(f'{where}: expected an object with "{COLUMN}", found {sorted(map(str, entry))[:5]}')
        fields = {key: value for key, value in entry.items() if key != column}
        entry = entry[column]
    if not isinstance(entry, str):
        raise ValueError(f"{where}: expected a string, found {type(entry).__name__}")
    if not entry.strip():
        raise ValueError(f"{where}: the prompt is blank")
    return Prompt(entry, fields)


def _lines(_path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", line) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return ((where, parse_json(line, f"{path}: {where}")) for where, line in _lines(path, text))


def _table(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    quoting = csv.QUOTE_MINIMAL if path.suffix.lower() == ".csv" else csv.QUOTE_NONE
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()], quoting=quoting)
    names = table.fieldnames or []
    if COLUMN not in [name.strip().lower() for name in names]:
        raise ValueError(f'{path}: expected a column "{COLUMN}", found {", ".join(names[:8]) or "none"}')
    try:
        for row in table:
            yield f"line {table.line_num}", {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise ValueError(f"{path}: line {table.line_num}: {error}") from None


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    content = parse_json(text, f"{path}")
    if isinstance(content, dict):
        if "prompts" not in content:
            raise ValueError(f'{path}: expected a list, or an object with the key "prompts"')
        content = content["prompts"]
    if not isinstance(content, list):
        raise ValueError(f"{path}: the prompts must be a list, found {type(content).__name__}")
    return ((f"prompts[{i}]", entry) for i, entry in enumerate(content))
