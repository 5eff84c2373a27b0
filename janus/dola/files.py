"""Files: read with one-line errors, written whole or not at all, and the log by which a killed run resumes."""

import io
import json
import math
import os
import socket
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

# --- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file. Raises ValueError naming the file and what is wrong with it."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for ever
            raise ValueError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: file not found") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 file. Raises ValueError naming the file and what is wrong with it."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from None


def read_json_file(path: str | os.PathLike) -> Any:
    """The content of a JSON file. Raises ValueError naming the file and what is wrong with it."""
    return parse_json(read_text(path), f"{path}")


def parse_json(text: str, where: str) -> Any:
    """JSON text whose strings are text and whose numbers are finite. Raises ValueError that begins with `where`."""
    try:
        content = json.loads(text, parse_int=_finite(int), parse_float=_finite(float), parse_constant=_finite(float))
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, line {error.lineno} column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half a surrogate pair, which is not text") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _finite(kind: type) -> Callable[[str], Any]:
    def parse(number: str) -> Any:
        if not math.isfinite(float(number)):
            raise ValueError(f"holds the number {number[:20]}, which is not finite")
        return kind(number)

    return parse


def load_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB. Raises ValueError naming the file where it is not there, not an image, or too large."""
    content = io.BytesIO(read_bytes(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(content).convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
            raise ValueError(f"{path}: too large (more than {Image.MAX_IMAGE_PIXELS} pixels)") from None
        except Exception as error:  # PIL's formats raise whatever comes to them over a broken file
            raise ValueError(f"{path}: not an image ({error})") from None


# --- writing ---------------------------------------------------------------------------------------------------------

TEMPORARY = ".janus-tmp"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: the file is there whole or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # a link there would lead the writing elsewhere
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_whole_image(path: Path) -> bool:
    """Whether a JPEG or PNG file is there to its end: an interrupted copy or a full disk leaves files without one."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(-12, os.SEEK_END)
            end = file.read()
    except OSError:
        return False
    return end.endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))


# --- one run in one directory ----------------------------------------------------------------------------------------

LOCK = ".janus-lock"


def lock_directory(directory: Path) -> IO[str]:
    """The lock file of a directory, held until it is closed or its process ends, however it ends.

    Raises ValueError that says who holds it. Where the system has no locks, nothing is held.
    """
    path = directory / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                holder = file.read(300) or "another process"
            raise ValueError(f"{directory} is being written by {holder}: wait for it, or choose another") from None
        except OSError:  # a file system without locks
            pass
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        file.close()  # its last holder removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def different_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys at which two objects differ, those of nested objects with dots."""
    found = []
    for key in sorted(old | new):
        if key not in old or key not in new:
            found.append(key)
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            found += [f"{key}.{inner}" for inner in different_keys(old[key], new[key])]
        elif old[key] != new[key]:
            found.append(key)
    return found


def json_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode()


class RunLog:
    """The log of a run: a JSONL file that only grows, and `run.json` beside it, which says what run it is.

    `run.json` holds `{"log": name, "settings": {...}, "inputs": [...]}`, which is `run` here, and "batch_sizes" where a
    command puts them there (and calls `save`). Lines come in the order of the inputs, so that a resumed run ends with
    the bytes of an uninterrupted one. While the log is open, its directory is locked. Raises ValueError, one line, for
    a directory that is locked, that holds another run (`overwrite` deletes its files and starts anew), or files of
    these names that no run made.

    folders, is_own: the subdirectories of a run of such settings, and whether a run of such settings and inputs makes
        a file of such a name (as "name" or "folder/name").
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        inputs: Sequence[Any] = (),
        *,
        overwrite: bool = False,
        folders: Callable[[dict[str, Any]], Sequence[str]] = lambda settings: (),
        is_own: Callable[[dict[str, Any], Sequence[Any], str], bool] = lambda settings, inputs, name: False,
    ):
        self.path, self.directory, self.run_file = path, path.parent, path.with_name("run.json")
        self.entries: list[dict[str, Any]] = []
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory}: expected a directory, found a file")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK):
            raise ValueError(f"{self.directory}: not writable")
        self._folders, self._is_own = folders, is_own
        self._lock = lock_directory(self.directory)
        try:
            self._open(json.loads(json.dumps({"log": path.name, "settings": settings, "inputs": inputs})), overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory."""
        (self.directory / LOCK).unlink(missing_ok=True)
        self._lock.close()

    def _open(self, run: dict[str, Any], overwrite: bool) -> None:
        for path in (self.path, self.run_file, *(self.directory / name for name in self._folders(run["settings"]))):
            if path.is_symlink():
                raise ValueError(f"{path}: a symbolic link; a run writes in its own directory alone")
        if not self.run_file.exists():
            self._refuse_strangers([*self._own_files(run), *[self.path] * self.path.exists()])
            self.run = run
            self.save()
            return
        self.run = read_json_file(self.run_file)
        kinds = {"log": str, "settings": dict, "inputs": list}
        known = isinstance(self.run, dict) and self.run.keys() <= {*kinds, "batch_sizes"}
        if not known or not all(isinstance(self.run.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{self.run_file}: describes no run: choose another directory")
        if self.run["log"] != self.path.name:
            raise ValueError(f"{self.directory} holds a run of another command: choose another directory")
        if not overwrite:
            self._compare(run)
        self._read()
        if overwrite:
            own = set(self._own_files(self.run))
            self._refuse_strangers([path for path in self._own_files(run) if path not in own])
            for path in own:
                path.unlink()
            self.path.unlink(missing_ok=True)
            self.run, self.entries = run, []
            self.save()

    def _refuse_strangers(self, paths: Sequence[Path]) -> None:
        if paths:
            raise ValueError(f"{paths[0]} exists and is of no run: move it away, or choose another directory")

    def _compare(self, run: dict[str, Any]) -> None:
        old, new = self.run["settings"], run["settings"]
        if other := different_keys(old, new):
            raise self.refusal(f"with other settings ({', '.join(other)})")
        old, new = self.run["inputs"], run["inputs"]
        if other := [i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]:
            raise self.refusal(f"over other inputs (number {other[0]} is {old[other[0]]!r})")
        if len(old) != len(new):
            raise self.refusal(f"over other inputs ({len(old)}, not {len(new)})")

    def refusal(self, what: str) -> ValueError:
        """What to raise where the directory holds a run that is not this one."""
        return ValueError(f"{self.directory} holds a run {what}: choose another directory, or pass --overwrite")

    def _own_files(self, run: dict[str, Any]) -> Iterator[Path]:
        """What is there of the files that a run makes, or began to."""
        for folder in ("", *self._folders(run["settings"])):
            place = self.directory / folder
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name) if place.is_dir() else ():
                name = f"{folder}/{entry.name}".removeprefix("/").removesuffix(TEMPORARY)
                if self._is_own(run["settings"], run["inputs"], name):
                    if not entry.is_file(follow_symlinks=False):
                        raise ValueError(f"{entry.path}: not a regular file, and named as one of a run's")
                    yield Path(entry.path)

    def _read(self) -> None:
        """The whole lines of the log; what a killed run wrote of another is cut off."""
        content = read_bytes(self.path) if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            where = f"{self.path}: line {number}"
            entry = parse_json(line.decode(errors="replace"), where)
            if not isinstance(entry, dict) or json_line(entry) != line:
                raise ValueError(f"{where} is not a line of this command's log")
            for key in {"file", "sheet", "trace", "where"} & entry.keys():
                if not self._is_own(self.run["settings"], self.run["inputs"], f"{entry[key]}"):
                    raise ValueError(f"{where} names {entry[key]!r}, which is no file of this run")
            self.entries.append(entry)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def check(self, position: int, entries: Sequence[dict[str, Any]]) -> None:
        """Raises ValueError where the log has another line already; the first of `entries` is at `position`."""
        for i, (old, new) in enumerate(zip(self.entries[position : position + len(entries)], entries, strict=False)):
            if json_line(old) != json_line(new):
                raise ValueError(
                    f"{self.path}: line {position + i + 1} comes out otherwise than when it was written (another "
                    "machine or release?): choose another directory, or pass --overwrite"
                )

    def add(self, position: int, entries: Sequence[dict[str, Any]]) -> None:
        """Write lines, the first at `position`, through to the disk; those that the log has are checked.

        The files that they name, if any, are in place by now.
        """
        self.check(position, entries)
        lines = [json_line(entry) for entry in entries[len(self.entries) - position :]]
        with self.path.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.entries += map(json.loads, lines)

    def items(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.entries)

    def get(self, position: int) -> dict[str, Any] | None:
        return self.entries[position] if position < len(self.entries) else None

    def claim(self, start: int) -> bool:
        """Whether the unit that begins with this entry is this process's to do: the directory is."""
        return True

    def replace(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write a log of these entries, whole or not at all."""
        lines = [json_line(entry) for entry in entries]
        write_whole(self.path, lambda part: part.write_bytes(b"".join(line + b"\n" for line in lines)))
        self.entries = [json.loads(line) for line in lines]

    def save(self) -> None:
        """Write `run` to `run.json`."""
        content = json.dumps(self.run, ensure_ascii=False, indent=1).encode() + b"\n"
        write_whole(self.run_file, lambda temporary: temporary.write_bytes(content))
