"""One run by many processes: units of work that anyone may take, and lose, and take again, to the same bytes.

A unit is a batch of the run's fixed cut. What it adds to the log is a file of its own in `units/`, put there whole: a
unit is done where its file is. Whoever finds all of them done puts them together as the log, and `units/` away.
"""

import json
import os
import shutil
import socket
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from janus.dola.files import RunLog, json_line, parse_json, read_bytes, write_whole

T = TypeVar("T")

UNITS = "units"
BEAT, STALE = 10.0, 60.0
"""Seconds between signs of life on the lock of a unit that is being worked on, and without one until it is free."""


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N`, or `auto`: torchrun's RANK and WORLD_SIZE, else a Slurm array's task and count; for a command's flag."""
    if text == "auto":
        first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
        sources = (("RANK", "WORLD_SIZE", "0"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", first))
        given = next(((i, n, start) for i, n, start in sources if {i, n} <= os.environ.keys()), None)
        if given is None:
            raise ArgumentTypeError("auto: neither RANK and WORLD_SIZE nor SLURM_ARRAY_TASK_ID and _COUNT are set")
        index, count, start = given
        text = f"{int(os.environ[index]) - int(start)}/{os.environ[count]}"
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise ArgumentTypeError(f"expected I/N with I from 0 to N-1, or auto, got {text!r}")
    return int(index), int(count)


class LogState(NamedTuple):
    """What a `RunLog` held when it was closed."""

    path: Path
    run: dict[str, Any]
    entries: Sequence[dict[str, Any]]


class ShardLog:
    """What `RunLog` is to one process, to each of several: `run`, the entries that are there, and how to add more.

    It knows the entries of the log itself and those of the units that are looked after here. `units` gives the first
    entry of each unit and how many it has. Raises ValueError for a file of a unit that is not whole lines of JSON.
    """

    def __init__(self, state: LogState, units: Mapping[int, int]):
        self.path, self.run, entries = state
        self.directory, self.folder = self.path.parent, self.path.parent / UNITS
        self.folder.mkdir(exist_ok=True)
        self.entries: dict[int, dict[str, Any]] = {}
        for start, count in units.items():
            self.entries |= dict(enumerate(entries[start : start + count], start=start))
            if self.file(start).exists():
                self.entries |= dict(enumerate(read_unit(self.file(start)), start=start))
        self._held: set[Path] = set()
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> "ShardLog":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for lock in list(self._held):
            lock.unlink(missing_ok=True)

    def file(self, start: int) -> Path:
        return self.folder / f"{start:08d}.jsonl"

    def lock(self, start: int) -> Path:
        return self.folder / f"{start:08d}.lock"

    # --- as a log

    def items(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter(self.entries.items())

    def get(self, position: int) -> dict[str, Any] | None:
        return self.entries.get(position)

    def check(self, position: int, entries: Sequence[dict[str, Any]]) -> None:
        """Raises ValueError where another entry is there already."""
        for i, entry in enumerate(entries, start=position):
            if i in self.entries and json_line(self.entries[i]) != json_line(entry):
                raise ValueError(f"{self.path}: entry {i + 1} comes out otherwise than when it was written")

    def add(self, position: int, entries: Sequence[dict[str, Any]]) -> None:
        """Write a unit's entries, which makes it done, and give it free."""
        self.check(position, entries)
        lines = [json_line(entry) for entry in entries]
        write_whole(self.file(position), lambda part: part.write_bytes(b"".join(line + b"\n" for line in lines)))
        self.entries |= dict(enumerate(map(json.loads, lines), start=position))
        self.lock(position).unlink(missing_ok=True)
        self._held.discard(self.lock(position))

    def save(self) -> None:
        raise ValueError("out of memory: shards keep one cut; paint anew with a smaller --batch_size")

    # --- who works on what

    def claim(self, start: int) -> bool:
        """Whether a unit is this process's to do: nobody who is alive works on it, and nobody has done it meanwhile."""
        lock = self.lock(start)
        for _ in range(2):
            try:
                descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if not self.is_stale(lock):
                    return False
                lock.unlink(missing_ok=True)
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            self._held.add(lock)
            if start not in self.entries and self.file(start).exists():
                self._held.discard(lock)
                lock.unlink(missing_ok=True)
                return False
            return True
        return False

    def is_stale(self, lock: Path) -> bool:
        """Whether a lock's process is dead, or has given no sign of life. Two at one unit do no harm, only work."""
        try:
            holder = json.loads(lock.read_text() or "{}")
            silent = self._now() - lock.stat().st_mtime
        except FileNotFoundError:
            return True
        except ValueError:
            return False  # half written
        here = isinstance(holder, dict) and holder.get("host") == socket.gethostname()
        return silent > STALE or (here and isinstance(holder.get("pid"), int) and not is_alive(holder["pid"]))

    def _now(self) -> float:
        """The time by the clock of the file system, which may be another machine's."""
        probe = self.folder / f"{socket.gethostname()}-{os.getpid()}.clock"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            for lock in list(self._held):
                try:
                    os.utime(lock)
                except FileNotFoundError:
                    self._held.discard(lock)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def read_unit(path: Path) -> list[dict[str, Any]]:
    lines = read_bytes(path).decode(errors="replace").splitlines()
    entries = [parse_json(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1)]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: not a unit of this run")
    return entries


# --- before and after the units --------------------------------------------------------------------------------------


def open_patiently(open_log: Callable[[], T], wait: float = 600.0) -> T:
    """`open_log()`, again where another process has the directory locked for the moment that this takes."""
    until = time.monotonic() + wait
    while True:
        try:
            return open_log()
        except ValueError as error:
            if "is being written by" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.1)


def share(units: Mapping[int, int], shard: tuple[int, int] | None) -> dict[int, int]:
    """The units of a shard (I, N): I, I + N, and so on; all of them without."""
    index, count = shard or (0, 1)
    return dict(list(units.items())[index::count])


def unfinished(directory: Path, units: Mapping[int, int], entries: int) -> list[int]:
    """The first entries of the units that are not done, where the log itself has so many entries."""
    there = {path.name for path in (directory / UNITS).glob("*.jsonl")}
    return [s for s, count in units.items() if s + count > entries and f"{s:08d}.jsonl" not in there]


@contextmanager
def gathered(open_log: Callable[[], RunLog], units: Mapping[int, int]) -> Iterator[RunLog | None]:
    """The log with all units in it, written whole, and the units put away after; None, and a line, where some lack.

    It is for whoever finds all of them done, and changes nothing where the log has them already.
    """
    with open_patiently(open_log) as log:
        done = len(log.entries)
        if left := unfinished(log.directory, units, done):
            print(f"{len(left)} of {len(units)} units are not done: left to other processes, or to this command again")
            yield None
            return
        if done < sum(units.values()):
            files = [log.directory / UNITS / f"{start:08d}.jsonl" for start in units if start >= done]
            log.replace([*log.entries, *(entry for file in files for entry in read_unit(file))])
        yield log
        put_away(log.directory)


def put_away(directory: Path) -> None:
    """Remove what is left of the units of a run that is in its log."""
    shutil.rmtree(directory / UNITS, ignore_errors=True)
