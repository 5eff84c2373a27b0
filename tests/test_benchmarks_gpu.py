"""The command for whoever has a GPU, every part of it on the CPU with a small model."""

import json
import sys

import pytest

from benchmarks import gpu
from conftest import GOLDEN
from janus.dola.cli import run_command


def run(out, *arguments: str) -> None:
    argv = ["gpu.py", "--device", "cpu", "--models", str(GOLDEN), "--seconds", "0.02", "--batches", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, "--windows", "4", "--prompts", "1", "--out", str(out), *arguments])
        patch.setattr(gpu, "images_per_batch", lambda *_: 2)
        patch.setattr(gpu, "WAYS", {name: gpu.WAYS[name] for name in ("no graphs", "graphs, window 16")})
        patch.setattr(gpu, "decodings", lambda *_: dict(list(decodings(*_).items())[:3]))
        run_command(gpu.main)


decodings = gpu.decodings


def test_every_part_is_measured_once_and_a_second_run_goes_on_where_the_first_stopped(tmp_path, capsys, monkeypatch):
    ours = gpu.Bench.ours
    monkeypatch.setattr(gpu.Bench, "ours", lambda self, *a, compiled=False, **k: ours(self, *a, **k))
    run(tmp_path / "gpu")
    results = json.loads((tmp_path / "gpu.json").read_text())
    for name, cell in results["correctness"]["float32"].items():
        assert set(cell.values()) == {4}, name
    (of_model,) = results["speed"].values()
    cells = of_model["cells"]
    for images in (1, 2):
        for way in ("off", "static", "early exit", "off, window 4", "off, no graphs", "reference loop", "transformers"):
            cell = cells[f"{images} images, {way}"]
            assert cell["ms"] > 0 and cell["over floor"] > 0 and cell["images/s"] > 0, way
    assert cells["1 images, off"]["per pass"] == 1.0 and cells["attention"] and cells["pixels of an image"]["ms"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in page for name in cells if name != "attention")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    lost = cells.pop("2 images, static")
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    capsys.readouterr()
    run(tmp_path / "gpu")
    assert capsys.readouterr().out.count("\n") == 1
    (again,) = json.loads((tmp_path / "gpu.json").read_text())["speed"].values()
    assert (
        again["cells"].keys() == cells.keys() | {"2 images, static"}
        and lost.keys() == again["cells"]["2 images, static"].keys()
    )


def test_results_of_another_device_are_not_mixed_in(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "a GPU", "torch": "2.13.0"}))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "gpu")
    assert stop.value.code == 2 and "was measured on a GPU" in capsys.readouterr().err


def test_a_cell_that_fails_says_why_and_the_others_go_on():
    import torch

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert gpu.measure(fail, torch.device("cpu")) == {"none": "out of memory"}
