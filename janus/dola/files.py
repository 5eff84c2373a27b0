"""Files: read with one-line errors, written whole or not at all, and a log that a killed run resumes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 file. Raises ValueError naming the file and what is wrong with it."""
    path = Path(path)
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: file not found") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_json_file(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises ValueError naming the file and what is wrong with it."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg}, line {error.lineno} column {error.colno})") from None


def load_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB. Raises ValueError that names the file where it is not there or not an image."""
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: file not found") from None
    except Exception as error:  # PIL's formats raise whatever comes to them over a broken file
        raise ValueError(f"{path}: not an image ({error})") from None


TEMPORARY = ".janus-tmp"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: the file is there whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    write(temporary)
    os.replace(temporary, path)


class RunLog:
    """A JSONL file of what a run has finished, by the index of its inputs, rewritten whole at each addition.

    A line is `{"index": ..., "settings": {...}, ...}`; one input may have several. Opening the log of a run with other
    settings raises ValueError unless `overwrite`, which starts anew and deletes the files that the old lines name.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path, self.settings = path, settings
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(f"{path.parent}: expected a directory, found a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path.parent}: not writable")
        for leftover in path.parent.rglob(f"*{TEMPORARY}"):
            leftover.unlink()
        self.entries: dict[int, list[dict[str, Any]]] = {}
        if path.exists():
            self._read(overwrite)
        self._write()

    def _read(self, overwrite: bool) -> None:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                index, settings = entry["index"], entry["settings"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}: line {number} is not a line of this command's log") from None
            if overwrite:
                for key in {"file", "sheet"} & set(entry):
                    (self.path.parent / entry[key]).unlink(missing_ok=True)
            elif settings != self.settings:
                other = sorted(k for k in settings | self.settings if settings.get(k) != self.settings.get(k))
                raise ValueError(
                    f"{self.path.parent} holds a run with other settings ({', '.join(other)}): "
                    "choose another directory, or pass --overwrite"
                )
            else:
                self.entries.setdefault(index, []).append(entry)

    def add(self, index: int, entries: list[dict[str, Any]]) -> None:
        """Record one input as finished; its files, if any, are in place by now."""
        self.entries[index] = [{"index": index, **entry, "settings": self.settings} for entry in entries]
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(entry, ensure_ascii=False) for _, es in sorted(self.entries.items()) for entry in es]
        content = "".join(f"{line}\n" for line in lines)
        write_whole(self.path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
