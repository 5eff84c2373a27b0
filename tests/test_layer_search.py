"""Layer searches: the command."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import run_batch_prompts
from conftest import GOLDEN, write_lines
from janus.dola.cli import run_command
from janus.dola.layer_search import __main__ as layer_search
from janus.dola.layer_search import metrics
from janus.dola.layer_search.metrics import measure
from janus.dola.switches import DoLaSwitches
from run_batch_prompts import build_parser as batch_parser
from run_batch_prompts import read_variants


def command(monkeypatch, task: str, *options: object) -> None:
    usual = ["--model", str(GOLDEN), "--device", "cpu", "--dtype", "float32", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["layer_search", task, *usual, *map(str, options)])
    run_command(layer_search.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_search_resumes_and_ends_with_the_same_bytes(drawings, text_encoder, tmp_path, monkeypatch, capsys):
    options = ["--data", drawings / "tower.jsonl", "--text_encoder", text_encoder, "--domain_field", "kind"]
    options += ["--explain", "2"]
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "whole")
    passes = []

    def dies(*args):
        passes.append(args)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(metrics, "measure", dies)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert stopped.value.code == 130 and len((tmp_path / "parts" / "layer_search.jsonl").read_text().splitlines()) == 2
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert len(passes) == 4
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert len(passes) == 4, "a finished search measures nothing again"
    assert "layer" in capsys.readouterr().out


def turn_an_image(folder: Path) -> None:
    Image.open(folder / "2.png").rotate(90).save(folder / "2.png")


def change_a_line(folder: Path) -> None:
    text = (folder / "tower.jsonl").read_text()
    (folder / "tower.jsonl").write_text(text.replace("large", "small", 1))


def train_the_text_encoder(folder: Path) -> None:
    weights = load_file(folder / "siglip" / "model.safetensors")
    weights["logit_scale"] += 0.5
    save_file(weights, folder / "siglip" / "model.safetensors", metadata={"format": "pt"})


def train_the_model(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    weights["vision_model.vision_tower.norm.bias"] += 0.5
    save_file(weights, folder / "model" / "model.safetensors")


def darken_every_image(folder: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / "model" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | ({"image_mean": [0.6] * 3} if "image_mean" in content else {})))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (turn_an_image, "images_sha256"),
        (change_a_line, "data_sha256"),
        (train_the_text_encoder, "text_encoder_sha256"),
        (train_the_model, "model_sha256"),
        (darken_every_image, "model_sha256"),
    ],
)
def test_a_changed_input_under_the_same_name_is_another_search(
    drawings, text_encoder, tmp_path, monkeypatch, capsys, change, named: str
):
    shutil.copytree(drawings, tmp_path, dirs_exist_ok=True)
    shutil.copytree(text_encoder, tmp_path / "siglip")
    shutil.copytree(GOLDEN, tmp_path / "model")
    options = ["--data", tmp_path / "tower.jsonl", "--text_encoder", tmp_path / "siglip", "--outdir", tmp_path / "out"]
    options += ["--model", tmp_path / "model", "--layers", "2"]
    command(monkeypatch, "tower", *options)
    found = contents(tmp_path / "out")
    command(monkeypatch, "tower", *options)
    change(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "tower", *options)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"holds a run with other settings ({named}" in said
    assert contents(tmp_path / "out") == found


def test_three_searches_fill_one_switches_file_and_the_batch_command_reads_it(
    drawings, text_encoder, tmp_path, monkeypatch
):
    file = tmp_path / "switches.json"
    DoLaSwitches(lambda_mm=0.3).to_json(file)
    found = {}
    for task in ("image", "answers", "tower"):
        extra = ["--text_encoder", text_encoder] if task == "tower" else []
        extra += ["--domain_field", "kind"] if task != "answers" else []
        outdir = tmp_path / task
        data = drawings / f"{task}.jsonl"
        command(monkeypatch, task, "--data", data, "--outdir", outdir, "--switches", file, *extra)
        found[task] = json.loads((outdir / "layer_search.json").read_text())
    image, answers, tower = (found[task]["best"] for task in ("image", "answers", "tower"))
    assert DoLaSwitches.from_json(file) == DoLaSwitches(
        lambda_mm=0.3,
        use_dola_gen_static=False,  # five examples say nothing
        use_dola_lm_static=False,
        use_dola_siglip_static=False,
        fixed_layer_gen=image["layer"],
        alpha_gen=image["alpha"],
        fixed_layer_llm=answers["layer"],
        alpha_L=answers["alpha"],
        fixed_layer_vit=tower["layer"],
        alpha_V=tower["alpha"],
    )
    two, own = DoLaSwitches.from_json(file, "two"), found["image"]["domains"]["two"]["best"]
    assert (two.fixed_layer_gen, two.alpha_gen, two.lambda_mm) == (own["layer"], own["alpha"], 0.3)
    assert two.fixed_layer_vit == found["tower"]["domains"]["two"]["best"]["layer"]

    def batch_arguments(*options: str) -> dict[str, Any]:
        parser = batch_parser()
        return read_variants(parser, parser.parse_args(options))

    assert list(batch_arguments("--config", str(file))) == ["baseline"]
    dola = batch_arguments("--config", str(file), "--ab")["dola"]
    assert (dola["layer"], dola["alpha"]) == (image["layer"], image["alpha"])
    assert batch_arguments("--config", str(file), "--domain", "two", "--ab")["dola"]["layer"] == own["layer"]
    dola = batch_arguments("--config", str(file), "--layer", "4", "--alpha", "0.3")["dola"]
    assert (dola["layer"], dola["alpha"]) == (4, 0.3)
    dola = batch_arguments("--config", str(file), "--layer_ratio", "0.5")["dola"]
    assert (dola["layer"], dola["layer_ratio"]) == (None, 0.5)
    dola = batch_arguments()["dola"]
    assert (dola["layer"], dola["layer_ratio"], dola["alpha"], dola["gamma"]) == (None, None, 0.1, 1.0)
    off = tmp_path / "off.json"
    off.write_text('{"use_dola_gen_static": false, "gamma_gen": 0.5}')
    assert list(batch_arguments("--config", str(off))) == ["baseline"]
    assert batch_arguments("--config", str(off), "--layer", "4")["dola"]["gamma"] == 0.5
    with pytest.raises(SystemExit):
        batch_arguments("--domain", "two")


liked: dict[str, np.ndarray] = {}
"""Prompt -> the picture that `likes_the_baseline` likes."""


def likes_the_baseline(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    pairs = zip(images, prompts, strict=True)
    return [-float(np.abs(np.asarray(image, dtype=float) - liked[prompt]).mean()) for image, prompt in pairs]


def paint(monkeypatch, *options: object) -> None:
    usual = ["--model", str(GOLDEN), "--parallel_size", "1", "--format", "png", "--cfg_weight", "3"]
    monkeypatch.setattr(sys, "argv", ["run_batch_prompts.py", *usual, *map(str, options)])
    run_command(run_batch_prompts.main)


def test_a_search_whose_every_layer_loses_writes_switches_that_paint_the_baselines_very_bytes(tmp_path, monkeypatch):
    rng, lines = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append({"prompt": f"picture {i}", "image": f"{i}.png"})
    data = write_lines(tmp_path / "image.jsonl", lines)
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": line["prompt"]} for line in lines])
    paint(monkeypatch, "--prompt_json", prompts, "--no_dola", "--outdir", tmp_path / "base")
    for line in (tmp_path / "base" / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        liked[entry["prompt"]] = np.asarray(Image.open(tmp_path / "base" / entry["file"]), dtype=float)

    options = [
        "--data",
        data,
        "--outdir",
        tmp_path / "found",
        "--cfg_weight",
        "3",
        "--layers",
        "2,4",
        "--alphas",
        "0.1",
    ]
    options += ["--paint", "2", "--samples", "1", "--scorer", f"{__name__}:likes_the_baseline"]
    command(monkeypatch, "image", *options)
    found = contents(tmp_path / "found")
    scores = [json.loads(line)["scores"] for line in found["painted/scores.jsonl"].splitlines()]
    assert all(of[0] == 0 for of in scores) and np.array(scores)[:, 2:].mean(0).max() < 0
    switches = tmp_path / "found" / "switches.json"
    assert json.loads(switches.read_text())["why"]["image"].startswith("off: the best contrast, chosen on one half")
    command(monkeypatch, "image", *options)
    assert contents(tmp_path / "found") == found, "a finished search paints nothing again, and says the same"

    paint(monkeypatch, "--prompt_json", prompts, "--config", switches, "--outdir", tmp_path / "searched")
    assert contents(tmp_path / "searched") == contents(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.jsonl: no examples"),
        ("[1]\n", "line 1: expected an object, found list"),
        ('{"question": "a", "answer": "b", "kind": "c"}\n{"question"\n', "line 2: not JSON"),
        ('{"question": "a"}\n', "line 1: answer: missing"),
        ('{"question": "a", "answer": "b"}\n', "line 1: kind: missing"),
        ('{"question": "a", "answer": "\\udce9", "kind": "c"}\n', "line 1: holds half a surrogate pair"),
        ('{"question": "a", "answer": "b", "kind": "\\ud800"}\n', "line 1: holds half a surrogate pair"),
        ('{"question": ' + "[" * 100_000 + "\n", "line 1: nested too deeply"),
        ('{"question": 1e999, "answer": "b", "kind": "c"}\n', "line 1: holds the number 1e999"),
    ],
)
def test_the_command_ends_in_one_line(tmp_path, monkeypatch, capsys, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "answers", "--data", data, "--outdir", tmp_path / "out", "--domain_field", "kind")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "6"], "--layers: a contrast layer is in 1..5, got 6"),
        (["--alphas", "0.1,1.5"], "alpha must be in [0, 1], got 1.5"),
        (["--cfg_weight", "-1"], "cfg_weight must be in [0, 1e+06], got -1.0"),
        (["--switches", "{data}"], "not JSON"),
        (["--data", "none.jsonl"], "none.jsonl: file not found"),
    ],
)
def test_options_out_of_range_end_in_one_line(drawings, tmp_path, monkeypatch, capsys, options, message):
    data = drawings / "image.jsonl"
    options = [str(data) if option == "{data}" else option for option in options]
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "image", "--data", data, "--outdir", tmp_path / "out", *options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["layer_search.json", "layer_search.png", "explain.md", "explain/00000.png"])
def test_a_strangers_file_is_never_overwritten(drawings, tmp_path, monkeypatch, capsys, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "image", "--data", drawings / "image.jsonl", "--outdir", tmp_path / "out", "--overwrite")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{name} exists and is of no run" in said and said.count("\n") == 1
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_without_matplotlib_one_line_says_so_before_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer_search, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "tower", "--data", tmp_path / "absent.jsonl")
    assert stopped.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("values"),
        lambda entry: entry["values"].pop(),
        lambda entry: entry.update(values=[["a"]]),
        lambda entry: entry.update(index=7),
        lambda entry: entry.update(values=None),
    ],
    ids=["no values", "a metric less", "words", "another example", "nothing"],
)
def test_a_log_that_somebody_changed_is_refused_by_its_line(drawings, tmp_path, monkeypatch, capsys, change):
    options = ["--data", drawings / "image.jsonl", "--outdir", tmp_path / "out", "--layers", "2"]
    command(monkeypatch, "image", *options)
    log = tmp_path / "out" / "layer_search.jsonl"
    first, second, *rest = log.read_text().splitlines()
    entry = json.loads(second)
    change(entry)
    log.write_text("".join(f"{line}\n" for line in (first, json.dumps(entry), *rest)))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "image", *options)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"{log}: line 2 is not what this search measures" in said
