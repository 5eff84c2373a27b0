"""Layouts of benchmarks, read back by what the formats' descriptions say and nothing of the code that writes them."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from painted_run import VARIANTS, make_painted
from PIL import Image

from conftest import DATA
from generation_inference import Decoding
from janus.dola import layouts
from janus.dola.cli import run_command
from janus.dola.prompt_files import Prompt, read_prompts

GENEVAL = DATA / "geneval_metadata.jsonl"


def lay_out(directory: Path, layout: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["layouts", str(directory), "--layout", layout])
        run_command(layouts.main)
    return directory / "layouts" / layout


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def check_recipe(card: Path, decoding: Decoding, samples: int) -> None:
    recipe = json.loads(card.read_text())
    assert (recipe["model"], recipe["dtype"], recipe["samples_per_prompt"]) == ("janus-tiny", "float32", samples)
    assert (recipe["cfg_weight"], recipe["layers"], recipe["gamma"]) == (5.0, list(decoding.layers), decoding.gamma)
    assert recipe["image_size"] == [8, 8] and "sha256" in recipe["seed_policy"]


@pytest.mark.skipif(not GENEVAL.is_file(), reason="GenEval's prompts are not in JANUS_DOLA_DATA")
def test_genevals_553_folders_hold_their_own_metadata_and_their_samples(tmp_path):
    painted = make_painted(tmp_path, read_prompts(GENEVAL), {"baseline": Decoding()}, parallel_size=2)
    root = lay_out(tmp_path, "geneval")
    folder = root / "baseline"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}" for i in range(553)]
    for i, line in enumerate(GENEVAL.read_text().splitlines()):
        assert sorted(os.listdir(folder / f"{i:05d}")) == ["metadata.jsonl", "samples"]
        (metadata,) = (folder / f"{i:05d}" / "metadata.jsonl").read_text().splitlines()
        assert json.loads(metadata) == json.loads(line)
        assert sorted(os.listdir(folder / f"{i:05d}" / "samples")) == ["0000.png", "0001.png"]
        for n in range(2):
            assert (pixels(folder / f"{i:05d}" / "samples" / f"{n:04d}.png") == painted[i, "baseline", n]).all()
    assert sorted(path.name for path in root.iterdir()) == ["baseline", "baseline.recipe.json"]
    check_recipe(root / "baseline.recipe.json", Decoding(), 2)


def test_geneval2_maps_each_prompt_to_its_image(tmp_path):
    prompts = [Prompt(text) for text in ("a dog", 'two "red" cats', "画一只狗")]
    painted = make_painted(tmp_path, prompts, parallel_size=2)
    root = lay_out(tmp_path, "geneval2")
    for name, decoding in VARIANTS.items():
        paths = json.loads((root / name / "images.json").read_text())
        assert list(paths) == [prompt.text for prompt in prompts]
        for i, path in enumerate(paths.values()):
            assert (pixels(root / name / path) == painted[i, name, 0]).all()
        check_recipe(root / f"{name}.recipe.json", decoding, 2)


def test_dpg_has_a_grid_of_four_for_each_item_and_nothing_else(tmp_path):
    prompts = [
        Prompt(f"a scene {i}", {"item_id": item}) for i, item in enumerate(("COCOval2014000000", "partiprompts23", 7))
    ]
    painted = make_painted(tmp_path, prompts, parallel_size=5)
    root = lay_out(tmp_path, "dpg")
    for name in VARIANTS:
        assert sorted(os.listdir(root / name)) == ["7.png", "COCOval2014000000.png", "partiprompts23.png"]
        for i, prompt in enumerate(prompts):
            grid = pixels(root / name / f"{prompt.fields['item_id']}.png")
            assert grid.shape == (16, 16, 3)
            tiles = [grid[:8, :8], grid[:8, 8:], grid[8:, :8], grid[8:, 8:]]
            assert all((tile == painted[i, name, n]).all() for n, tile in enumerate(tiles))
        check_recipe(root / f"{name}.recipe.json", VARIANTS[name], 5)


def test_t2i_compbench_numbers_the_images_behind_their_prompts(tmp_path):
    texts = [
        "a black/white cat",
        "a dog_house",
        "the bag was leather and the boots were fabric",
        "x " * 200,
        "../../etc",
    ]
    painted = make_painted(tmp_path, [Prompt(text) for text in texts], parallel_size=3)
    root = lay_out(tmp_path, "t2i_compbench")
    for name in VARIANTS:
        files = sorted(os.listdir(root / name / "samples"), key=lambda file: file[-10:])
        assert len(files) == 15 and os.listdir(root / name) == ["samples"]
        for number, file in enumerate(files):
            prompt, question_id = re.fullmatch(r"([^_]+)_(\d{6})\.png", file).groups()  # pyright: ignore
            assert int(question_id) == number and texts[number // 3].replace("/", " ").replace("_", " ").startswith(
                prompt
            )
            assert (pixels(root / name / "samples" / file) == painted[number // 3, name, number % 3]).all()


def test_laid_out_again_it_is_the_same(tmp_path):
    make_painted(tmp_path, [Prompt("a dog", {"tag": "t", "include": []})])
    before = {path: path.read_bytes() for path in lay_out(tmp_path, "geneval").rglob("*") if path.is_file()}
    root = lay_out(tmp_path, "geneval")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before and len(before) == 9


@pytest.mark.parametrize(
    ("layout", "prompts", "parallel_size", "message"),
    [
        ("geneval", [Prompt("a dog")], 1, "prompt 0 ('a dog') has no 'tag'"),
        ("geneval2", [Prompt("a dog"), Prompt("a dog")], 1, "prompt 1 ('a dog'): 'a dog' is there twice"),
        ("dpg", [Prompt("a dog", {"item_id": "a"})], 3, "needs 4 images of each prompt, this run keeps 3"),
        ("dpg", [Prompt("a dog", {"item_id": "../a"})], 4, "item_id '../a' is no name of a file"),
        ("dpg", [Prompt("a dog", {"item_id": "a"}), Prompt("b", {"item_id": "a"})], 4, "'a' is there twice"),
        ("t2i", [Prompt("a dog")], 1, "invalid choice: 't2i'"),
    ],
)
def test_what_a_benchmark_cannot_take_is_one_line(tmp_path, capsys, layout, prompts, parallel_size, message):
    make_painted(tmp_path, prompts, parallel_size=parallel_size)
    with pytest.raises(SystemExit) as stopped:
        lay_out(tmp_path, layout)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "layouts").exists()


def test_a_strange_file_among_a_layouts_own_is_told(tmp_path, capsys):
    make_painted(tmp_path, [Prompt("a dog", {"item_id": "a"})], parallel_size=4)
    (lay_out(tmp_path, "dpg") / "apc" / "notes.txt").write_text("x")
    with pytest.raises(SystemExit):
        lay_out(tmp_path, "dpg")
    assert "notes.txt is not of this layout" in capsys.readouterr().err.splitlines()[-1]
