"""One process, three shards and a local Ray cluster at the same prompts: are the files the same, byte for byte?

python -m benchmarks.many_machines [--prompts 200] [--kills 10]

paints janus-tiny's scenes, in float32 and in bfloat16, in each of the three ways, then kills shards and Ray's actors at
random moments, and lets another number of them end the run.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from janus.dola.cli import CommandParser, positive, run_command
from tools import scenes

SCRIPT = Path(__file__).parents[1] / "run_batch_prompts.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(outdir: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, options), "--outdir", str(outdir)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_all(processes: Sequence[subprocess.Popen]) -> None:
    codes = [process.wait() for process in processes]
    if any(codes):
        raise ValueError(f"painting ended with {codes}")


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def units_done(outdir: Path) -> int:
    return len(list(outdir.glob("units/*.jsonl")))


def actors() -> list[int]:
    """The processes of Ray's actors on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::UnitPainter"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def is_working(outdir: Path, since: float) -> bool:
    """Whether a unit's lock was taken since then: those of killed processes lie there unchanged."""
    try:
        return any(lock.stat().st_mtime > since for lock in outdir.glob("units/*.lock"))
    except FileNotFoundError:  # given back just now
        return False


def wait_for_a_moment(outdir: Path, process: subprocess.Popen, chance: random.Random) -> None:
    """Until a random moment of the next unit, or of the one after it, or the end of the process."""
    wanted, began = units_done(outdir) + chance.randint(0, 1), time.time()
    while process.poll() is None and not (units_done(outdir) >= wanted and is_working(outdir, began)):
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 2))


def kill_shards(outdir: Path, options: Sequence[object], kills: int, chance: random.Random) -> None:
    for kill in range(kills):
        process = start(outdir, *options, "--shard", f"{kill % 3}/3")
        wait_for_a_moment(outdir, process, chance)
        process.kill()
        process.wait()


def kill_actors(outdir: Path, options: Sequence[object], kills: int, chance: random.Random) -> None:
    driver, done = start(outdir, *options, "--ray", "--workers", 2), 0
    while done < kills and driver.poll() is None:
        wait_for_a_moment(outdir, driver, chance)
        for pid in chance.sample(actors(), min(1, len(actors()))):
            os.kill(pid, signal.SIGKILL)
            done += 1
    print(f"  {done} actors killed, {units_done(outdir)} units done when the last one was")
    run_all([driver])


def run_shards(outdir: Path, options: Sequence[object], count: int) -> None:
    run_all([start(outdir, *options, "--shard", f"{i}/{count}") for i in range(count)])


def ways(options: Sequence[object], kills: int, chance: random.Random) -> dict[str, Callable[[Path], None]]:
    """Name -> how to paint a directory; the first is what the others are held against."""

    def after_killed_shards(outdir: Path) -> None:
        kill_shards(outdir, options, kills, chance)
        print(f"  {kills} shards killed, {units_done(outdir)} units done")
        run_shards(outdir, options, 2)

    return {
        "one process": lambda outdir: run_all([start(outdir, *options)]),
        "3 shards": lambda outdir: run_shards(outdir, options, 3),
        "Ray, 2 actors": lambda outdir: run_all([start(outdir, *options, "--ray", "--workers", 2)]),
        f"{kills} killed shards, then 2": after_killed_shards,
        f"Ray, {kills} killed actors": lambda outdir: kill_actors(outdir, options, kills, chance),
    }


def main() -> None:
    parser = CommandParser(description="Are the files of one process, of shards and of Ray's actors the same?")
    parser.add_argument("--prompts", type=positive, default=200, help="painted with --ab (default: %(default)s)")
    parser.add_argument("--kills", type=positive, default=10, help="of shards, and of actors (default: %(default)s)")
    args = parser.parse_args()
    captions = [scene.caption for scene in scenes.two_object_scenes()[:: 13536 // args.prompts][: args.prompts]]
    with tempfile.TemporaryDirectory() as directory:
        prompts, outdir = Path(directory) / "prompts.txt", Path(directory) / "out"
        prompts.write_text("\n".join(captions))
        for dtype in ("float32", "bfloat16"):
            options = ["--prompt_json", prompts, "--dtype", dtype, "--ab", "--parallel_size", 1, "--batch_size", 16]
            expected: dict[str, str] = {}
            for name, work in ways(options, args.kills, random.Random(0)).items():
                started = time.perf_counter()
                work(outdir)
                found = digest(outdir)
                expected = expected or found
                same = "the same" if found == expected else "OTHERS"
                print(f"{dtype}, {name}: {len(found)} files, {same}, {time.perf_counter() - started:.0f} s", flush=True)
                shutil.rmtree(outdir)


if __name__ == "__main__":
    run_command(main)
