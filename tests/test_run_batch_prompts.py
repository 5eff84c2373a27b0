import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

import run_batch_prompts
from conftest import DATA, GOLDEN
from generation_inference import format_image_prompt, generate_with_dola_static
from janus.dola import painting
from janus.dola.cli import run_command
from janus.dola.files import lock_directory
from janus.dola.painting import file_stub, prompt_seed
from janus.dola.pictures import tile
from janus.dola.prompt_files import read_prompts

PROMPTS = ["a red circle on a blue background", "画一只在草地上的狗。", "a dog", "CON", "a/b\\c:d", "a dog"]


AB = ["--ab", "--parallel_size", "1"]
load_once = functools.lru_cache(maxsize=2)(run_batch_prompts.load_pretrained_model)


def run(tmp_path: Path, *arguments: str, prompts=PROMPTS, outdir="out") -> Path:
    """The command in this process, on the golden checkpoint; returns the output directory."""
    path = tmp_path / "prompt.json"
    if prompts is not None:
        path.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    argv = ["--model", str(GOLDEN), "--prompt_json", str(path), "--outdir", str(tmp_path / outdir), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_batch_prompts.py", *argv])
        patch.setattr(run_batch_prompts, "load_pretrained_model", load_once)
        run_command(run_batch_prompts.main)
    return tmp_path / outdir


def refusal(capsys, tmp_path: Path, *arguments: str, **how) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *arguments, **how)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def manifest(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def run_record(outdir: Path) -> dict:
    return json.loads((outdir / "run.json").read_text(encoding="utf-8"))


def dola_of(outdir: Path) -> dict:
    return run_record(outdir)["settings"]["variants"]["dola"]


def contents(outdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(outdir)): p.read_bytes() for p in sorted(outdir.rglob("*")) if p.is_file()}


# --- images ----------------------------------------------------------------------------------------------------------


def test_every_prompt_becomes_its_images_and_manifest_lines(tmp_path, golden):
    outdir = run(tmp_path, "--parallel_size", "2", "--layer", "4", "--format", "png", "--cfg_weight", "3")
    entries = manifest(outdir)
    assert [(e["index"], e["image"]) for e in entries] == [(i, k) for i in range(len(PROMPTS)) for k in range(2)]
    assert {p.name for p in outdir.iterdir()} == {e["file"] for e in entries} | {"manifest.jsonl", "run.json"}
    for entry in entries:
        assert re.fullmatch(rf"{entry['index']:04d}_.+_p{entry['image']}\.png", entry["file"])
        assert entry["prompt"] == PROMPTS[entry["index"]] and entry["layer"] == 4
    decoding = dola_of(outdir)
    assert decoding["cfg_weight"] == 3.0 and decoding["alpha"] == 0.1
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


def test_the_window_is_a_setting_that_changes_passes_alone_and_the_manifest_tells_them(tmp_path, capsys):
    how = ["--parallel_size", "1", "--batch_size", "1", "--temperature", "0.01"]  # cold: guesses come true
    one, many = (manifest(run(tmp_path, *how, "--window", w, outdir=w)) for w in ("1", "16"))
    unknown = dict.fromkeys(("passes", "tokens_per_pass"))
    assert [entry | unknown for entry in many] == [entry | unknown for entry in one]
    assert {(entry["passes"], entry["tokens_per_pass"]) for entry in one} == {(16, 1.0)}
    assert sum(entry["passes"] for entry in many) < 16 * len(many)
    assert all(entry["tokens_per_pass"] == round(16 / entry["passes"], 2) for entry in many)
    lost = next((tmp_path / "16").glob("0001_*_p0.jpg"))
    before = contents(tmp_path / "16")
    lost.unlink()
    run(tmp_path, *how, "--window", "16", outdir="16")
    assert contents(tmp_path / "16") == before
    with pytest.raises(SystemExit):
        run(tmp_path, *how, "--window", "1", outdir="16")
    assert "other settings (window)" in capsys.readouterr().err


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
    early = run(tmp_path, "--candidate_layers", "2,4,99", prompts=["a dog"], outdir="early")
    assert manifest(early)[0]["layer"] == [2, 4] and dola_of(early)["layers"] == [
        2,
        4,
    ]
    other = manifest(run(tmp_path, "--cfg_order", "contrast_first", prompts=["a dog"], outdir="other"))
    plain = manifest(run(tmp_path, prompts=["a dog"], outdir="plain"))
    assert [e["tokens_sha256"] for e in other] != [e["tokens_sha256"] for e in plain]


def test_the_checkpoints_own_guidance_and_temperature_are_the_default(tmp_path, golden, monkeypatch):
    usual = dola_of(run(tmp_path, prompts=["a dog"], outdir="five"))
    assert (usual["cfg_weight"], usual["temperature"]) == (5.0, 1.0)
    for scale, temperature in ((2.0, 0.5), (0.0, 1.5)):  # 0 is a guidance too
        checkpoint = tmp_path / f"checkpoint_{scale}"
        golden.model.save_pretrained(checkpoint)
        golden.processor.save_pretrained(checkpoint)
        own = {"guidance_scale": scale, "temperature": temperature}
        (checkpoint / "generation_config.json").write_text(json.dumps(own))
        decoding = dola_of(run(tmp_path, "--model", str(checkpoint), prompts=["a dog"], outdir=f"own_{scale}"))
        assert (decoding["cfg_weight"], decoding["temperature"]) == (scale, temperature)
        given = run(tmp_path, "--model", str(checkpoint), "--temperature", "2", prompts=["a dog"], outdir=f"{scale}_2")
        assert dola_of(given)["temperature"] == 2.0


def runs_out_of_memory_beyond(images: int, monkeypatch, error: Exception) -> list[tuple[int, int]]:
    """From now on sampling more images together than these runs out of memory; returns a list of what was tried."""
    tried, sample = [], run_batch_prompts.sample_image_tokens

    def small(model, processor, prompts, decoding, *, samples, **how):
        tried.append((len(prompts), samples.stop - samples.start))
        if len(prompts) * (samples.stop - samples.start) > images:
            how["on_step"](len(prompts))
            raise error
        return sample(model, processor, prompts, decoding, samples=samples, **how)

    monkeypatch.setattr(run_batch_prompts, "sample_image_tokens", small)
    return tried


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_running_out_of_memory_halves_the_batch_from_there_on_and_changes_no_image(tmp_path, monkeypatch, error):
    whole = run(tmp_path, "--window", "1", "--batch_size", "8", prompts=PROMPTS[:2], outdir="whole")
    counted = []
    monkeypatch.setattr(run_batch_prompts.Progress, "__exit__", lambda bar, *_: counted.append((bar.done, bar.total)))
    tried = runs_out_of_memory_beyond(2, monkeypatch, error)
    halved = run(tmp_path, "--window", "1", "--batch_size", "8", prompts=PROMPTS[:2], outdir="halved")
    assert tried == [(2, 4), (1, 4), (1, 2), (1, 2), (1, 2), (1, 2)]
    assert run_record(halved)["batch_sizes"] == [[0, 8], [0, 4], [0, 2]]
    assert counted == [(2 * 4 * 16, 2 * 4 * 16)], "what was tried in vain does not count"
    assert contents(halved) | {"run.json": b""} == contents(whole) | {"run.json": b""}


def test_a_halving_in_the_middle_holds_from_there_on_and_for_the_same_command_again(tmp_path, monkeypatch):
    options = ["--parallel_size", "2", "--batch_size", "4", "--window", "1"]
    whole = contents(run(tmp_path, *options, outdir="whole"))
    sample, calls = run_batch_prompts.sample_image_tokens, []

    def once(*args, **how):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(*args, **how)

    monkeypatch.setattr(run_batch_prompts, "sample_image_tokens", once)
    with pytest.raises(SystemExit):
        run(tmp_path, *options)
    outdir = run(tmp_path, *options)
    assert calls == [2, 2, 1, 1, 1, 1, 1] and run_record(outdir)["batch_sizes"] == [[0, 4], [2, 2]]
    assert contents(outdir) | {"run.json": b""} == whole | {"run.json": b""}
    next(outdir.glob("0001_*_p1.jpg")).unlink()
    run(tmp_path, *options)
    assert calls[7:] == [2], "a batch from before the halving is decoded as it was"
    assert contents(outdir) | {"run.json": b""} == whole | {"run.json": b""}


def test_a_size_chosen_by_free_memory_stays_when_the_run_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_batch_prompts, "images_per_batch", lambda *_: 8)
    outdir = run(tmp_path)
    monkeypatch.setattr(run_batch_prompts, "images_per_batch", lambda *_: 4)
    lost = next(outdir.glob("0001_*_p1.jpg"))
    before = contents(outdir)
    lost.unlink()
    capsys.readouterr()
    run(tmp_path)
    assert "batches of 2 prompts x 4 images" in capsys.readouterr().out and contents(outdir) == before
    run(tmp_path, "--batch_size", "8")
    assert (
        "other settings (batch_size)" in refusal(capsys, tmp_path, "--batch_size", "4") and contents(outdir) == before
    )


def test_running_out_of_memory_over_pixels_halves_them_too(tmp_path, monkeypatch):
    options = ["--parallel_size", "3", "--format", "png"]
    whole = run(tmp_path, *options, prompts=["a dog"], outdir="whole")
    sizes, decode = [], run_batch_prompts.tokens_to_images

    def small(model, tokens):
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return decode(model, tokens)

    monkeypatch.setattr(run_batch_prompts, "tokens_to_images", small)
    halved = run(tmp_path, *options, prompts=["a dog"], outdir="halved")
    assert sizes == [3, 2, 1, 1, 1] and manifest(halved) == manifest(whole)
    for entry in manifest(whole):  # convolutions round otherwise in another batch
        one, other = (Image.open(outdir / entry["file"]) for outdir in (whole, halved))
        assert set(ImageChops.difference(one, other).tobytes()) <= {0, 1}


def test_memory_too_small_for_one_image_ends_in_one_line(tmp_path, monkeypatch, capsys):
    runs_out_of_memory_beyond(0, monkeypatch, MemoryError())
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, prompts=["a dog"])
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory")


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> dict[str, Path]:
    """Runs to copy: six prompts with --ab, and one prompt with and without."""
    tmp_path = tmp_path_factory.mktemp("finished")
    return {
        "six": run(tmp_path, *AB, prompts=PROMPTS, outdir="six"),
        "ab": run(tmp_path, *AB, prompts=["a dog"], outdir="ab"),
        "one": run(tmp_path, prompts=["a dog"], outdir="one"),
    }


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


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff\xe0 torn", "gone", "fifo"])
@pytest.mark.parametrize("name", ["0002_a_dog_ab.png", "dola/0002_a_dog_p0.jpg", "contact_sheet.png"])
def test_an_image_or_sheet_that_is_lost_is_made_again(finished_runs, tmp_path, name, damage):
    outdir = shutil.copytree(finished_runs["six"], tmp_path / "out")
    before = contents(outdir)
    (outdir / name).unlink()
    if damage == "fifo":
        os.mkfifo(outdir / name)
    elif damage != "gone":
        (outdir / name).write_bytes(damage)
    run(tmp_path, *AB)
    assert contents(outdir) == before


def test_the_contact_sheet_is_in_pages_beyond_so_many_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(painting, "PROMPTS_PER_PAGE", 4)
    outdir = run(tmp_path, *AB)
    sheet = Image.open(next(outdir.glob("0000_*_ab.png")))
    pages = [Image.open(outdir / f"contact_sheet_{page}.png") for page in (1, 2)]
    assert not (outdir / "contact_sheet.png").exists() and not (outdir / "contact_sheet_3.png").exists()
    assert [page.width * page.height // (sheet.width * sheet.height) for page in pages] == [4, 2]
    assert pages[0].crop((0, 0, *sheet.size)).tobytes() == sheet.tobytes()
    assert "contact_sheet_1.png to contact_sheet_2.png" in capsys.readouterr().out


def test_a_thousand_sheets_are_tiled_with_few_files_open(tmp_path):
    import resource

    paths = [tmp_path / f"{i}.png" for i in range(100)]
    for path in paths:
        Image.new("RGB", (4, 3)).save(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    try:
        assert tile(paths).size == (9 * 4, 12 * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_other_settings_or_prompts_are_refused_and_overwrite_starts_anew(tmp_path, capsys):
    outdir = run(tmp_path)
    before = contents(outdir)
    for arguments, prompts, cause in (
        (["--alpha", "0.2"], PROMPTS, "other settings (variants.dola.alpha)"),
        ([], ["another", *PROMPTS[1:]], "other inputs (number 0 is 'a red circle on a blue background')"),
        ([], PROMPTS[:-1], "other inputs (6, not 5)"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, *arguments, prompts=prompts)
        assert stop.value.code == 2 and cause in capsys.readouterr().err
        assert contents(outdir) == before
    (outdir / "notes.txt").write_text("mine")
    run(tmp_path, "--alpha", "0.2", "--overwrite", prompts=["another"])
    assert {e["prompt"] for e in manifest(outdir)} == {"another"}
    assert {p.name for p in outdir.iterdir()} == {
        *(e["file"] for e in manifest(outdir)), "manifest.jsonl", "run.json", "notes.txt"
    }  # fmt: skip


def test_overwrite_deletes_nothing_before_the_new_run_can_start(finished_runs, tmp_path, capsys):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    before = contents(outdir)
    for bad in (["--layer", "7"], ["--model", str(tmp_path)], ["--alpha", "2"], ["--config", str(tmp_path / "none")]):
        refusal(capsys, tmp_path, "--overwrite", *bad, prompts=["a dog"])
    refusal(capsys, tmp_path, "--overwrite", prompts=["a dog", " "])
    assert contents(outdir) == before


def test_overwrite_deletes_nothing_where_a_strangers_file_is_in_the_new_runs_way(finished_runs, tmp_path, capsys):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    (outdir / "0000_a_cat_p0.jpg").write_text("mine")
    before = contents(outdir)
    assert "0000_a_cat_p0.jpg exists and is of no run" in refusal(capsys, tmp_path, "--overwrite", prompts=["a cat"])
    assert contents(outdir) == before


@pytest.mark.parametrize("sha256", ["0" * 64, "0" * 63, "x", 3, None], ids=repr)
def test_a_lost_image_that_comes_out_otherwise_than_logged_is_not_written(finished_runs, tmp_path, capsys, sha256):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    lines = manifest(outdir)
    lines[1]["tokens_sha256"] = sha256
    (outdir / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (outdir / "0000_a_dog_p2.jpg").unlink()
    before = contents(outdir)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, prompts=["a dog"])
        assert stop.value.code == 2 and "manifest.jsonl: line 2" in capsys.readouterr().err.splitlines()[-1]
        assert contents(outdir) == before


def test_overwrite_also_takes_what_a_killed_run_had_not_logged_yet(tmp_path):
    outdir = run(tmp_path, "--batch_size", "4")
    log = (outdir / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (outdir / "manifest.jsonl").write_text("".join(log[:8]), encoding="utf-8")
    (outdir / "0003_CON_p1.jpg.janus-tmp").write_text("half")
    run(tmp_path, "--overwrite", prompts=["another"])
    assert sorted(contents(outdir)) == [*(f"0000_another_p{k}.jpg" for k in range(4)), "manifest.jsonl", "run.json"]


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    "name",
    [
        "0002_a_dog_p0.jpg",
        "contact_sheet.png",
        "0001_画一只在草地上的狗_ab.png",
        "dola/0002_a_dog_p0.jpg",
        "manifest.jsonl",
        "0002_a_dog_p0.jpg.janus-tmp",
    ],
)
def test_a_strangers_file_is_never_overwritten(tmp_path, capsys, name, option):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    ab = [] if name.startswith("0002") else ["--ab"]
    assert f"{name} exists and is of no run" in refusal(capsys, tmp_path, *ab, *option)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_other_files_in_the_directory_stay(tmp_path):
    strangers = {
        "holiday.jpg": b"1",
        "deep/er/x.janus-tmp": b"2",
        "0000_else_p0.jpg": b"3",
        "0002_a_dog_p9.jpg": b"4",
        "0002_a_dog_ab.png": b"5",
        "dola/0002_a_dog_p0.jpg": b"6",
    }
    for name, content in strangers.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    for option in ([], [], ["--overwrite"]):
        outdir = run(tmp_path, *option)
        assert strangers.items() <= contents(outdir).items()


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["resumed", "overwrite"])
@pytest.mark.parametrize("key", ["file", "sheet"])
@pytest.mark.parametrize(
    "name", ["{outside}/precious.jpg", "../precious.jpg", "notes.txt", "", ".", "run.json", 3, None]
)
def test_a_manifest_that_names_other_files_is_refused(finished_runs, tmp_path, capsys, key, name, option):
    outdir = shutil.copytree(finished_runs["ab"], tmp_path / "out")
    (tmp_path / "precious.jpg").write_text("precious")
    (outdir / "notes.txt").write_text("mine")
    lines = manifest(outdir)
    lines[1][key] = name.format(outside=tmp_path) if isinstance(name, str) else name
    (outdir / "manifest.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    before = contents(tmp_path)
    assert "manifest.jsonl: line 2" in refusal(capsys, tmp_path, *AB, *option, prompts=["a dog"])
    (tmp_path / "prompt.json").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["resumed", "overwrite"])
@pytest.mark.parametrize("link", ["dola", "manifest.jsonl", "run.json", "dola/0000_a_dog_p0.jpg"])
def test_a_link_is_not_followed_out_of_the_directory(finished_runs, tmp_path, capsys, link, option):
    outdir = shutil.copytree(finished_runs["ab"], tmp_path / "out")
    (outdir / link).rename(tmp_path / "elsewhere")
    (outdir / link).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    if link.endswith(".jpg") and not option:  # an image may lie elsewhere: it is there, and nothing writes to it
        run(tmp_path, *AB, prompts=["a dog"])
    else:
        refusal(capsys, tmp_path, *AB, "--seed", "1", *option, prompts=["a dog"])
    (tmp_path / "prompt.json").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", [[], ["--overwrite"]], ids=["resumed", "overwrite"])
@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": {"variants": 3, "parallel_size": "x", "format": []}},
        {"settings": []},
        {"inputs": {}},
        {"inputs": [3]},
        {"log": 1},
        {"log": "answers.jsonl"},
        {"bach_sizes": [[0, 4]]},
    ],
    ids=str,
)
def test_a_changed_run_json_is_refused_in_one_line(finished_runs, tmp_path, capsys, change, option):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    (outdir / "run.json").write_text(json.dumps(run_record(outdir) | change), encoding="utf-8")
    before = contents(outdir)
    refusal(capsys, tmp_path, *option, prompts=["a dog"])
    assert contents(outdir) == before


@pytest.mark.parametrize(
    "sizes", [3, [], [[0]], [[0, "4"]], [[0, 0]], [[1, 4]], [[0, 4], [2, -1]], [[0, 4], [-1, 2]], [[0, True]]], ids=str
)
def test_batch_sizes_that_are_none_are_refused_in_one_line(finished_runs, tmp_path, capsys, sizes):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    (outdir / "run.json").write_text(json.dumps(run_record(outdir) | {"batch_sizes": sizes}), encoding="utf-8")
    assert "run.json: batch_sizes: expected" in refusal(capsys, tmp_path, prompts=["a dog"])


def test_the_directory_is_locked_while_a_run_writes_there(finished_runs, tmp_path, monkeypatch, capsys):
    outdir = shutil.copytree(finished_runs["one"], tmp_path / "out")
    before = contents(outdir)
    with contextlib.closing(lock_directory(outdir)):
        for option in ([], ["--overwrite"], ["--seed", "1"]):
            error = refusal(capsys, tmp_path, *option, prompts=["a dog"])
            assert f"process {os.getpid()} on {socket.gethostname()}" in error
    run(tmp_path, prompts=["a dog"])
    assert contents(outdir) == before


@pytest.mark.parametrize("names", [{}, {"SC_PAGESIZE": 30}])
def test_a_system_that_does_not_tell_its_free_memory_paints_all_the_same(golden, monkeypatch, names):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf_names", names)  # macOS has no SC_AVPHYS_PAGES
    monkeypatch.setattr(os, "sysconf", unknown)
    assert run_batch_prompts.images_per_batch(golden.model, 2, 20, 16, 1) >= 1


# One process imports everything, loads the model and does the run once, whole; for each run after that it forks a
# child. What a batch of some composition samples to, and the pixels of some codes, are kept from the first run: a batch
# cut otherwise would sample anew. A child counts the moments that could tear its run apart, and dies at the one it is
# told.
RUNNER = """
import functools, json, os, signal, sys
import torch
import run_batch_prompts
from janus.dola import files, painting

torch.set_num_threads(1)
*options, dtype = sys.argv[1:]
loaded = run_batch_prompts.load_pretrained_model(options[1], dtype, "cpu")
run_batch_prompts.load_pretrained_model = lambda *_: loaded
sample, sampled = run_batch_prompts.sample_image_tokens, {}
decode, decoded = run_batch_prompts.tokens_to_images, {}
moments, last = 0, None

def sample_once(model, processor, prompts, decoding, *, on_step, record, **how):
    composition = repr((prompts, decoding, how))
    moment()
    if composition not in sampled:
        steps = []
        tokens = sample(model, processor, prompts, decoding, record=record, on_step=steps.append, **how)
        sampled[composition] = tokens, {} if record is None else record.values, steps
    tokens, values, steps = sampled[composition]
    for step in steps:
        on_step(step)
    if record is not None:
        record.values = values
    return tokens

def decode_once(model, tokens):
    codes = repr(tokens.tolist())
    if codes not in decoded:
        decoded[codes] = decode(model, tokens)
    return decoded[codes]

def moment(before_death=lambda: None):
    global moments
    moments += 1
    if moments == last:
        before_death()
        os.kill(os.getpid(), signal.SIGKILL)

def replace(old, new):
    moment()
    rename(old, new)
    moment()

def add(log, position, entries):
    size = log.path.stat().st_size if log.path.exists() else 0
    moment()
    write(log, position, entries)
    grown = log.path.stat().st_size - size
    for torn in (7, grown // 2, grown - 7):
        moment(lambda: os.truncate(log.path, size + grown - torn))
    moment()

run_batch_prompts.sample_image_tokens = sample_once
run_batch_prompts.tokens_to_images = decode_once
painting.contact_sheet = functools.partial(painting.contact_sheet, cell=8)
rename, os.replace = os.replace, replace
write, files.RunLog.add = files.RunLog.add, add

def run(outdir):
    sys.argv = ["run_batch_prompts.py", *options, "--dtype", dtype, "--outdir", outdir]
    run_batch_prompts.main()

out, sys.stdout = sys.stdout, open(os.devnull, "w")
for line in sys.stdin:
    outdir, last = json.loads(line)
    if not sampled:
        run(outdir)
        print(moments, file=out, flush=True)
        moments = 0
        continue
    child = os.fork()
    if child == 0:
        run(outdir)
        os._exit(0)
    print(os.waitpid(child, 0)[1], file=out, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bytes(tmp_path, dtype):
    """At each rename, at each addition to the log (torn in three places too), and at each batch of each variant."""
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({"prompts": [f"prompt number {i} {'x ' * i}" for i in range(3)]}))
    options = ["--model", str(GOLDEN), "--prompt_json", str(path), "--ab", "--parallel_size", "2", "--batch_size", "4"]
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER, *options, dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as runner:
        assert runner.stdin and runner.stdout

        def start(outdir: Path, kill_at: int | None = None) -> int:
            """The moments of the first run; then the status that a run ended with, killed at so manieth moment."""
            assert runner.stdin and runner.stdout
            runner.stdin.write(json.dumps([str(outdir), kill_at]) + "\n")
            runner.stdin.flush()
            return int(runner.stdout.readline())

        moments = start(tmp_path / "whole")
        assert moments > 40
        expected = contents(tmp_path / "whole")
        for moment in range(1, moments + 1):
            outdir = tmp_path / f"killed_{moment}"
            assert start(outdir, moment) == signal.SIGKILL
            there = {n: c for n, c in contents(outdir).items() if not n.endswith((".janus-tmp", ".janus-lock"))}
            there.pop("run.json", None)
            assert expected["manifest.jsonl"].startswith(there.pop("manifest.jsonl", b""))
            assert there.items() <= expected.items(), "what is there is whole"
            assert start(outdir) == 0
            assert contents(outdir) == expected, f"killed at moment {moment}"


def test_in_bfloat16_a_batch_is_resumed_in_its_first_composition(tmp_path, monkeypatch):
    """In another composition, on this checkpoint, about a third of the images comes out otherwise."""
    prompts = [f"prompt number {i} {'x ' * i}" for i in range(6)]
    options = ["--parallel_size", "2", "--dtype", "bfloat16", "--no_dola", "--batch_size", "8"]
    outdir = run(tmp_path, *options, prompts=prompts)
    expected = contents(outdir)
    log = (outdir / "manifest.jsonl").read_text().splitlines(keepends=True)
    sample, batches = run_batch_prompts.sample_image_tokens, []

    def noted(*args, **how):
        batches.append(len(args[2]))
        return sample(*args, **how)

    monkeypatch.setattr(run_batch_prompts, "sample_image_tokens", noted)
    for lines, decoded in ((10, [2]), (9, [2]), (3, [4, 2])):  # of 12; the first batch has 8
        (outdir / "manifest.jsonl").write_text("".join(log[:lines]))
        run(tmp_path, *options, prompts=prompts)
        assert contents(outdir) == expected and batches == decoded
        batches.clear()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_while_the_command_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    script = Path(run_batch_prompts.__file__)
    ended = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs it behind
    )
    assert ended.returncode == 130 and ended.stdout == ""
    assert ended.stderr.startswith("interrupted") and ended.stderr.count("\n") == 1


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
    prompts = [prompt.text for prompt in read_prompts(DATA / "PartiPrompts.tsv")]
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


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "prompt.json: file not found"),
        (b"{", "prompt.json: not JSON (Expecting property name enclosed in double quotes, line 1 column 2)"),
        (b"\xff\xfe", "prompt.json: not UTF-8 (byte 0)"),
        (b"{}", 'prompt.json: expected a list, or an object with the key "prompts"'),
        (b'{"prompts": ["\\ud800"]}', "prompt.json: holds half a surrogate pair"),
    ],
)
def test_a_bad_prompt_file_is_named_in_one_line(tmp_path, capsys, content, cause):
    if content is not None:
        (tmp_path / "prompt.json").write_bytes(content)
    error = refusal(capsys, tmp_path, prompts=None)
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
        (["--temperature", "0"], "temperature must be in [1e-06, 1e+06], got 0.0"),
        (["--temperature", "1e-320"], "temperature must be in [1e-06, 1e+06]"),
        (["--cfg_weight", "1e39"], "cfg_weight must be in [0, 1e+06], got 1e+39"),
        (["--cfg_weight", "-1"], "cfg_weight must be in [0, 1e+06], got -1.0"),
        (["--parallel_size", "0"], "expected a whole number from 1 to 1000000, got '0'"),
        (["--batch_size", "9" * 30], "expected a whole number from 1 to 1000000"),
        (["--dtype", "float8"], "dtype 'float8' is unknown"),
        (["--device", "quantum"], "device 'quantum' is unknown"),
        (["--model", "/no/such/model"], "/no/such/model: no such directory"),
        (["--no_dola", "--ab"], "not allowed with"),
        (["--domain", "x"], "--domain needs --config"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(tmp_path, capsys, arguments, cause):
    assert cause in refusal(capsys, tmp_path, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_named_in_one_line(tmp_path, capsys):
    assert "0 CUDA devices" in refusal(capsys, tmp_path, "--device", "cuda")


def test_an_output_path_that_is_a_file_or_not_writable_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("a file")
    assert "out: expected a directory, found a file" in refusal(capsys, tmp_path)
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "closed: not writable" in refusal(capsys, tmp_path, outdir="closed")


def test_help_names_every_flag_with_its_default():
    text = run_batch_prompts.build_parser().format_help()
    flags = text.split("options:")[1]
    for entry in re.split(r"\n  (?=--)", flags)[1:]:
        assert "(default: " in " ".join(entry.split()), entry
