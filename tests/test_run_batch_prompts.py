import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import run_batch_prompts
from conftest import DATA, GOLDEN
from generation_inference import format_image_prompt, generate_with_dola_static
from janus.dola.cli import run_command
from run_batch_prompts import file_stub, prompt_seed, read_prompts

PROMPTS = ["a red circle on a blue background", "画一只在草地上的狗。", "a dog", "CON", "a/b\\c:d", "a dog"]


def run(tmp_path: Path, *arguments: str, prompts=PROMPTS, outdir="out") -> Path:
    """The command in this process, on the golden checkpoint; returns the output directory."""
    path = tmp_path / "prompt.json"
    if prompts is not None:
        path.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    argv = ["--model", str(GOLDEN), "--prompt_json", str(path), "--outdir", str(tmp_path / outdir), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_batch_prompts.py", *argv])
        run_command(run_batch_prompts.main)
    return tmp_path / outdir


def manifest(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(outdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(outdir)): p.read_bytes() for p in sorted(outdir.rglob("*")) if p.is_file()}


# --- images ----------------------------------------------------------------------------------------------------------


def test_every_prompt_becomes_its_images_and_manifest_lines(tmp_path, golden):
    outdir = run(tmp_path, "--parallel_size", "2", "--layer", "4", "--format", "png", "--cfg_weight", "3")
    entries = manifest(outdir)
    assert [(e["index"], e["image"]) for e in entries] == [(i, k) for i in range(len(PROMPTS)) for k in range(2)]
    assert {p.name for p in outdir.iterdir()} == {e["file"] for e in entries} | {"manifest.jsonl"}
    for entry in entries:
        assert re.fullmatch(rf"{entry['index']:04d}_.+_p{entry['image']}\.png", entry["file"])
        assert entry["prompt"] == PROMPTS[entry["index"]] and entry["layer"] == 4
        assert entry["settings"]["cfg_weight"] == 3.0 and entry["settings"]["alpha"] == 0.1
    # the library call with the manifest's seed gives the very image, although the command decoded all in one batch
    image, _ = generate_with_dola_static(
        golden.model,
        golden.processor,
        format_image_prompt(golden.processor, PROMPTS[1]),
        layer=4,
        cfg_weight=3.0,
        parallel_size=2,
        seed=entries[2]["seed"],
    )
    assert Image.open(outdir / entries[2]["file"]).tobytes() == image.tobytes()


def test_an_image_depends_on_its_prompt_seed_and_settings_alone(tmp_path):
    def hashes(outdir):
        return {(e["prompt"], e["image"]): e["tokens_sha256"] for e in manifest(outdir)}

    together = hashes(run(tmp_path, outdir="a"))
    some = hashes(run(tmp_path, "--batch_size", "3", prompts=[*PROMPTS[2:4], "else"], outdir="b"))
    assert all(some[key] == together[key] for key in set(some) & set(together)) and len(set(some) & set(together)) == 8
    other = hashes(run(tmp_path, "--seed", "1", outdir="c"))
    assert all(other[key] != together[key] for key in together)
    assert prompt_seed(0, "a dog") != prompt_seed(1, "a dog") != prompt_seed(1, "a cat")


def test_no_dola_and_layer_n_are_the_baseline_and_ab_makes_both_with_sheets(tmp_path):
    def hashes(outdir, variant):
        return [e["tokens_sha256"] for e in manifest(outdir) if e["variant"] == variant]

    both = run(tmp_path, "--ab", "--parallel_size", "2", outdir="ab")
    baseline = run(tmp_path, "--no_dola", "--parallel_size", "2", outdir="baseline")
    last = run(tmp_path, "--layer", "6", "--parallel_size", "2", outdir="last")
    dola = run(tmp_path, "--parallel_size", "2", outdir="dola")
    assert hashes(both, "baseline") == hashes(baseline, "baseline") == hashes(last, "dola")
    assert hashes(both, "dola") == hashes(dola, "dola") != hashes(both, "baseline")
    sheets = sorted(both.glob("*_ab.png"))
    assert len(sheets) == len(PROMPTS) and Image.open(sheets[0]).height > 2 * 128
    whole = Image.open(both / "contact_sheet.png")
    assert whole.width * whole.height >= len(PROMPTS) * Image.open(sheets[0]).width * Image.open(sheets[0]).height


def test_early_exit_and_the_other_guidance_order_run_from_the_command_line(tmp_path):
    early = manifest(run(tmp_path, "--candidate_layers", "2,4,99", prompts=["a dog"], outdir="early"))
    assert early[0]["layer"] == [2, 4] and early[0]["settings"]["layers"] == [2, 4]
    other = manifest(run(tmp_path, "--cfg_order", "contrast_first", prompts=["a dog"], outdir="other"))
    plain = manifest(run(tmp_path, prompts=["a dog"], outdir="plain"))
    assert [e["tokens_sha256"] for e in other] != [e["tokens_sha256"] for e in plain]


def test_the_checkpoints_own_guidance_is_the_default(tmp_path, golden, monkeypatch):
    assert manifest(run(tmp_path, prompts=["a dog"], outdir="five"))[0]["settings"]["cfg_weight"] == 5.0
    checkpoint = tmp_path / "checkpoint"
    golden.model.save_pretrained(checkpoint)
    golden.processor.save_pretrained(checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"guidance_scale": 2.0}))
    outdir = run(tmp_path, "--model", str(checkpoint), prompts=["a dog"], outdir="own")
    assert manifest(outdir)[0]["settings"]["cfg_weight"] == 2.0


def test_running_out_of_memory_halves_the_batch_and_changes_no_image(tmp_path, monkeypatch):
    expected = contents(run(tmp_path, outdir="whole"))
    sizes = []
    sample = run_batch_prompts.sample_image_tokens

    def small(model, processor, prompts, decoding, *, samples, **how):
        sizes.append((len(prompts), samples.stop - samples.start))
        if len(prompts) * (samples.stop - samples.start) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, processor, prompts, decoding, samples=samples, **how)

    monkeypatch.setattr(run_batch_prompts, "sample_image_tokens", small)
    assert contents(run(tmp_path, outdir="halved")) == expected
    assert sizes[0] == (6, 4) and (1, 2) in sizes


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_second_run_skips_what_is_done_and_repairs_what_is_gone(tmp_path, capsys):
    outdir = run(tmp_path)
    before = contents(outdir)
    times = {p: p.stat().st_mtime_ns for p in outdir.glob("*.jpg")}
    run(tmp_path)
    assert "0 prompts painted (6 were done already)" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in outdir.glob("*.jpg")} == times
    next(outdir.glob("0002_*_p1.jpg")).unlink()
    run(tmp_path)
    assert contents(outdir) == before


def test_other_settings_or_prompts_are_refused_and_overwrite_starts_anew(tmp_path, capsys):
    outdir = run(tmp_path)
    before = contents(outdir)
    for arguments, prompts, cause in (
        (["--alpha", "0.2"], PROMPTS, "other settings (alpha)"),
        ([], ["another", *PROMPTS[1:]], "another prompt list (prompt 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *arguments, prompts=prompts)
        assert stop.value.code == 2 and cause in capsys.readouterr().err
        assert contents(outdir) == before
    run(tmp_path, "--alpha", "0.2", "--overwrite", prompts=["another"])
    assert {e["prompt"] for e in manifest(outdir)} == {"another"}
    assert {p.name for p in outdir.glob("*.jpg")} == {e["file"] for e in manifest(outdir)}


def test_a_strangers_file_is_never_overwritten_unasked(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "0002_a_dog_p0.jpg"
    mine.write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "0002_a_dog_p0.jpg exists" in capsys.readouterr().err
    assert mine.read_text() == "mine" and list((tmp_path / "out").iterdir()) == [mine]


# One process imports everything once and forks a child per run, so that 20 kills cost 20 short runs and no import.
RUNNER = """
import json, os, sys, time
import run_batch_prompts
for line in sys.stdin:
    argv, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run_batch_prompts.torch.set_num_threads(1)
        sys.argv = ["run_batch_prompts.py", *argv]
        run_batch_prompts.main()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, 9)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_and_a_rerun_end_with_the_same_bytes(tmp_path):
    prompts = tmp_path / "prompt.json"
    prompts.write_text(json.dumps({"prompts": [f"prompt number {i}" for i in range(8)]}))
    options = [
        "--model",
        str(GOLDEN),
        "--prompt_json",
        str(prompts),
        "--parallel_size",
        "2",
        "--batch_size",
        "2",
        "--ab",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as runner:
        assert runner.stdin and runner.stdout

        def start(outdir: Path, kill_after: float | None = None) -> int:
            """The status that the run ended with; killed after so many seconds, if any."""
            assert runner.stdin and runner.stdout
            runner.stdin.write(json.dumps([[*options, "--outdir", str(outdir)], kill_after]) + "\n")
            runner.stdin.flush()
            return int(runner.stdout.readline())

        started = time.perf_counter()
        assert start(tmp_path / "whole") == 0
        duration = time.perf_counter() - started
        expected = contents(tmp_path / "whole")

        moments, kills, interrupted = random.Random(0), 0, tmp_path / "killed"
        while kills < 20:
            if start(interrupted, moments.uniform(0, 0.7) * duration) == signal.SIGKILL:
                kills += 1
            else:
                shutil.rmtree(interrupted)  # it came to its end before the kill: begin again
            there = {n: c for n, c in contents(interrupted).items() if not n.endswith(".janus-tmp")}
            there.pop("manifest.jsonl", None)
            assert there.items() <= expected.items()  # what is there is whole
        assert start(interrupted) == 0
        assert contents(interrupted) == expected


# --- file names ------------------------------------------------------------------------------------------------------

RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(1, 10))}


def assert_valid_names(names: list[str]) -> None:
    """Linux, macOS and Windows rules at once."""
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f\x7f]', name), name
        assert name.split(".")[0].upper() not in RESERVED and name[-1] not in " ." and name[0] not in " ."
        assert len(name.encode()) <= 200 and len(name.encode("utf-16-le")) // 2 <= 200


def test_odd_prompts_become_valid_distinct_names_with_their_unicode_kept():
    odd = [
        "CON",
        "../../etc/passwd",
        "a/b\\c",
        "x" * 500,
        "狗" * 300,
        "é",
        "e\u0301",
        "...",
        "😀😀",
        "tab\tnew\nline",
        "?",
    ]
    names = [f"{i:04d}_{file_stub(prompt)}_p0.jpg" for i, prompt in enumerate(odd)]
    assert_valid_names(names)
    assert "狗" in names[4] and "é" in names[5] and file_stub("é") == file_stub("e\u0301")


def test_every_parti_prompt_gets_a_valid_name_inside_the_output_directory(tmp_path):
    if not (DATA / "PartiPrompts.tsv").is_file():
        pytest.skip("PartiPrompts.tsv is not in JANUS_DOLA_DATA")
    with (DATA / "PartiPrompts.tsv").open(encoding="utf-8", newline="") as file:
        prompts = [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(prompts) > 1600
    names = [f"{i:04d}_{file_stub(prompt)}_p0.jpg" for i, prompt in enumerate(prompts)]
    assert_valid_names(names)
    odd = sorted(prompts, key=lambda p: sum(c.isalnum() or c == " " for c in p) / len(p))[:40]
    outdir = run(tmp_path, "--parallel_size", "1", prompts=odd)
    assert len(list(outdir.glob("*.jpg"))) == len(odd) and {p.name for p in tmp_path.iterdir()} == {
        "out",
        "prompt.json",
    }


# --- bad input -------------------------------------------------------------------------------------------------------


def ended_in_one_line(capsys, stop) -> str:
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "prompt.json: file not found"),
        (b"{", "prompt.json: not JSON (Expecting property name enclosed in double quotes, line 1 column 2)"),
        (b"\xff\xfe", "prompt.json: not UTF-8 (byte 0)"),
        (b"[]", 'prompt.json: expected an object with the key "prompts"'),
        (b"{}", 'prompt.json: expected an object with the key "prompts"'),
        (b'{"prompts": []}', "must be a list of at least one prompt"),
        (b'{"prompts": "a"}', "must be a list of at least one prompt"),
        (b'{"prompts": ["a", 3]}', "prompts[1] must be a string, found int"),
        (b'{"prompts": ["a", "b", "  \\n"]}', "prompts[2] is blank"),
        (b'{"prompts": ["\\ud800"]}', "prompts[0] holds half a surrogate pair"),
    ],
)
def test_a_bad_prompt_file_is_named_in_one_line(tmp_path, capsys, content, cause):
    if content is not None:
        (tmp_path / "prompt.json").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, prompts=None)
    error = ended_in_one_line(capsys, stop)
    assert cause in error and str(tmp_path) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--layer", "7"], "layer must be in 1..6"),
        (["--layer", "0"], "layer must be in 1..6"),
        (["--layer", "x"], "--layer: invalid int value: 'x'"),
        (["--layer_ratio", "2"], "layer_ratio must be in [0, 1], got 2.0"),
        (["--candidate_layers", "22,24"], "candidate_layers [22, 24] hold no layer in 1..5"),
        (["--candidate_layers", "a,b"], "expected layers like 22,24,26,28, got 'a,b'"),
        (["--alpha", "1.5"], "alpha must be in [0, 1], got 1.5"),
        (["--temperature", "0"], "temperature must be positive and finite, got 0.0"),
        (["--cfg_weight", "-1"], "cfg_weight must be at least 0 and finite, got -1.0"),
        (["--parallel_size", "0"], "at least 1, got '0'"),
        (["--dtype", "float8"], "dtype 'float8' is unknown"),
        (["--device", "quantum"], "device 'quantum' is unknown"),
        (["--model", "/no/such/model"], "/no/such/model: no such directory"),
        (["--no_dola", "--ab"], "not allowed with"),
        (["--domain", "x"], "--domain needs --config"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(tmp_path, capsys, arguments, cause):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *arguments)
    assert cause in ended_in_one_line(capsys, stop)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_named_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--device", "cuda")
    assert "0 CUDA devices" in ended_in_one_line(capsys, stop)


def test_an_output_path_that_is_a_file_or_not_writable_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert "out: expected a directory, found a file" in ended_in_one_line(capsys, stop)
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, outdir="closed")
    assert "closed: not writable" in ended_in_one_line(capsys, stop)


def test_help_names_every_flag_with_its_default():
    text = run_batch_prompts.build_parser().format_help()
    flags = text.split("options:")[1]
    for entry in re.split(r"\n  (?=--)", flags)[1:]:
        assert "(default: " in " ".join(entry.split()), entry


def test_prompts_are_cut_to_the_number_asked_for(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"prompts": PROMPTS}), encoding="utf-8")
    assert read_prompts(path, 2) == PROMPTS[:2] and read_prompts(path) == PROMPTS
