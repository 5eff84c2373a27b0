"""One run by several processes: who does which unit, what a death leaves, and the bytes, which are those of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch

import run_batch_prompts
from conftest import GOLDEN
from janus.dola import shards
from janus.dola.cli import run_command
from janus.dola.files import RunLog
from janus.dola.shards import LogState, ShardLog, parse_shard, share, unfinished

ROOT = Path(run_batch_prompts.__file__).parent
PROMPTS = [f"prompt number {i}{' and more' * (i % 3)}" for i in range(7)]


def paint(outdir: Path, *options: object, dtype: str = "float32") -> None:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    usual = ["--model", str(GOLDEN), "--dtype", dtype, "--parallel_size", "2", "--batch_size", "4", "--ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["run_batch_prompts.py", *usual, *prompts, "--outdir", *map(str, (outdir, *options))]
        )
        run_command(run_batch_prompts.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of one process, by dtype."""
    files = {}
    for dtype in ("float32", "bfloat16"):
        outdir = tmp_path_factory.mktemp(dtype)
        paint(outdir, "--trace", dtype=dtype)
        files[dtype] = contents(outdir)
    return files


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_shards_in_any_order_make_the_files_of_one_process(whole, tmp_path, capsys, dtype):
    for shard in ("2/3", "0/3"):
        paint(tmp_path, "--trace", "--shard", shard, dtype=dtype)
        assert "units are not done" in capsys.readouterr().out and not (tmp_path / "manifest.jsonl").exists()
    paint(tmp_path, "--trace", "--shard", "1/3", dtype=dtype)
    assert contents(tmp_path) == whole[dtype]
    paint(tmp_path, "--trace", "--shard", "1/2", dtype=dtype)
    assert contents(tmp_path) == whole[dtype], "a finished run stays as it is"


def test_what_shards_left_any_number_of_them_and_one_process_finish(whole, tmp_path, capsys):
    paint(tmp_path / "a", "--trace", "--shard", "3/4")
    for shard in ("0/2", "1/2"):
        paint(tmp_path / "a", "--trace", "--shard", shard)
    assert contents(tmp_path / "a") == whole["float32"]
    paint(tmp_path / "b", "--trace", "--shard", "1/2")
    paint(tmp_path / "b", "--trace")
    assert contents(tmp_path / "b") == whole["float32"]


def test_shards_finish_what_one_process_began(whole, tmp_path, monkeypatch):
    write = RunLog.add

    def dies(log, position, entries):
        write(log, position, entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunLog, "add", dies)
        paint(tmp_path, "--trace")
    for shard in ("0/2", "1/2"):
        paint(tmp_path, "--trace", "--shard", shard)
    assert contents(tmp_path) == whole["float32"]


def test_a_lost_picture_of_a_done_unit_is_painted_again(whole, tmp_path):
    paint(tmp_path, "--trace", "--shard", "0/2")
    lost = sorted(tmp_path.glob("dola/*.jpg"))[0]
    lost.unlink()
    paint(tmp_path, "--trace", "--shard", "1/2")
    assert contents(tmp_path) == whole["float32"], "whoever finishes repairs"


# One process imports everything and loads the model; each run is a fork of it that dies at the moment it is told.
RUNNER = """
import json, os, signal, sys
import torch
import run_batch_prompts
from janus.dola import shards

torch.set_num_threads(1)
*options, dtype = sys.argv[1:]
loaded = run_batch_prompts.load_pretrained_model(options[1], dtype, "cpu")
run_batch_prompts.load_pretrained_model = lambda *_: loaded
rename, moments = os.replace, 0

def replace(old, new):
    global moments
    rename(old, new)
    moments += 1
    if moments == last:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
out, sys.stdout = sys.stdout, open(os.devnull, "w")
for line in sys.stdin:
    outdir, shard, last = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv = ["run_batch_prompts.py", *options, "--dtype", dtype, "--outdir", outdir, "--shard", shard]
        run_batch_prompts.main()
        os._exit(0)
    print(os.waitpid(child, 0)[1], file=out, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_killed_shards_and_a_rerun_with_another_number_end_with_the_same_bytes(whole, tmp_path):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ["--model", str(GOLDEN), "--parallel_size", "2", "--batch_size", "4", "--ab", "--trace", *prompts]
    moments = np.random.default_rng(0).integers(1, 30, 30).tolist()
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER, *options, "float32"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as runner:
        assert runner.stdin and runner.stdout

        def start(shard: str, kill_at: int) -> int:
            assert runner.stdin and runner.stdout
            runner.stdin.write(json.dumps([str(tmp_path), shard, kill_at]) + "\n")
            runner.stdin.flush()
            return int(runner.stdout.readline())

        killed, units_done = 0, set()
        for i, moment in enumerate(moments):
            killed += start(f"{i % 3}/3", moment) == signal.SIGKILL
            units_done.add(len(list((tmp_path / shards.UNITS).glob("*.jsonl"))))
            if killed == 10:
                break
        assert killed == 10 and len(units_done) > 1 and list((tmp_path / shards.UNITS).glob("*.lock"))
        assert [start(f"{i}/2", -1) for i in range(2)] == [0, 0]
        runner.stdin.close()
    assert contents(tmp_path) == whole["float32"]


def run_with_ray(folder: Path, *options: str) -> None:
    """In the folder, into its own subfolder `out`."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    usual = ["--model", str(GOLDEN), "--parallel_size", "2", "--batch_size", "4", "--ab", "--trace", *prompts]
    command = [sys.executable, str(ROOT / "run_batch_prompts.py"), *usual, "--dtype", "float32", "--outdir", "out"]
    done = subprocess.run(
        [*command, *options], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_local_ray_cluster_makes_the_files_of_one_process(whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    run_with_ray(tmp_path, "--ray", "--workers", "2")
    assert contents(tmp_path / "out") == whole["float32"]


# --- who does which unit ---------------------------------------------------------------------------------------------


def test_shards_share_the_units_and_leave_none():
    units = {start: 4 for start in range(0, 40, 4)}
    parts = [share(units, (i, 3)) for i in range(3)]
    assert sorted(start for part in parts for start in part) == list(units) and share(units, None) == units
    assert list(parts[1]) == [4, 16, 28]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "2", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (2, 8)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (0, 4)),
    ],
)
def test_auto_takes_the_numbers_of_torchrun_or_of_a_slurm_array(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArgumentTypeError, match="neither RANK and WORLD_SIZE nor"):
        parse_shard("auto")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parse_shard("auto") == expected


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/3", "a/b", "1/2/3", "0/0"])
def test_other_shards_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="expected I/N"):
        parse_shard(text)


@pytest.fixture
def log(tmp_path):
    with ShardLog(LogState(tmp_path / "log.jsonl", {}, []), {0: 2, 2: 2}) as log:
        yield log


def other(log: ShardLog) -> ShardLog:
    return ShardLog(LogState(log.path, {}, []), {0: 2, 2: 2})


def test_a_unit_is_one_process_at_a_time_and_done_once(log):
    with other(log) as second:
        assert log.claim(0) and not second.claim(0) and second.claim(2)
        log.add(0, [{"a": 1}, {"a": 2}])
        assert not second.claim(0), "it was done meanwhile"
        assert unfinished(log.directory, {0: 2, 2: 2}, 0) == [2]
    with other(log) as third:
        assert dict(third.items()) == {0: {"a": 1}, 1: {"a": 2}} and third.claim(0), "but may be repaired"
        assert third.claim(2), "a process that ends gives free what it held"


def test_the_lock_of_a_dead_process_is_taken_and_that_of_a_silent_machine_after_a_while(log, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = log.lock(0)
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}))
    assert log.claim(0)
    log.lock(2).write_text(json.dumps({"host": "elsewhere", "pid": dead.pid}))
    assert not log.claim(2)
    silent_since = time.time() - shards.STALE - 5
    os.utime(log.lock(2), (silent_since, silent_since))
    assert log.claim(2)
    assert json.loads(log.lock(2).read_text())["host"] == socket.gethostname()


def test_a_worker_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BEAT", 0.02)
    with ShardLog(LogState(tmp_path / "log.jsonl", {}, []), {0: 2}) as log:
        assert log.claim(0)
        os.utime(log.lock(0), (0, 0))
        until = time.monotonic() + 10
        while log.lock(0).stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert log.lock(0).stat().st_mtime > 0


@pytest.mark.parametrize("text", ["[1]\n", "{\n", '{"a": NaN}\n'])
def test_a_unit_that_somebody_changed_is_refused_by_its_file(tmp_path, log, text):
    log.file(0).write_text(text)
    with pytest.raises(ValueError, match=r"00000000\.jsonl"):
        other(log)


def test_other_entries_than_those_that_are_there_are_refused(log):
    log.add(0, [{"a": 1}])
    log.add(0, [{"a": 1}])
    with pytest.raises(ValueError, match="comes out otherwise"):
        log.add(0, [{"a": 2}])


def refusal(capsys, outdir: Path, *options: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        paint(outdir, *options)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return said[-1]


def test_what_shards_cannot_do_is_one_line(tmp_path, capsys, monkeypatch):
    assert "--overwrite would delete what other shards make" in refusal(
        capsys, tmp_path, "--shard", "0/2", "--overwrite"
    )
    assert "expected I/N" in refusal(capsys, tmp_path, "--shard", "2/2")
    assert "not allowed with" in refusal(capsys, tmp_path, "--shard", "0/2", "--ray")
    paint(tmp_path, "--shard", "0/2")
    assert "with other settings (seed)" in refusal(capsys, tmp_path, "--shard", "1/2", "--seed", 1)

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_batch_prompts, "sample_image_tokens", runs_out)
    assert "smaller --batch_size" in refusal(capsys, tmp_path, "--shard", "1/2")
    assert not list((tmp_path / shards.UNITS).glob("*.lock"))


def test_overwrite_puts_away_what_shards_left(whole, tmp_path):
    paint(tmp_path, "--seed", 1, "--shard", "0/2")
    paint(tmp_path, "--trace", "--overwrite")
    assert contents(tmp_path) == whole["float32"]
