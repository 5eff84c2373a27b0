"""Our files copied into a checkout of the original code: a stand-in for it, with its names and call signatures.

The same commands run there and here, on the same weights; what they paint, say and find must be the same.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stand_in_janus.run_commands import run_commands
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from conftest import GOLDEN
from tolerance import assert_close, terms_of

HERE = Path(__file__).parents[1]
STAND_IN = Path(__file__).parent / "stand_in_janus"
ROOT_FILES = ("dola_runtime.py", "generation_inference.py", "inference.py", "run_batch_prompts.py")
RE_EXPORTS = ("dola_runtime.py", "rerank_with_dola.py", "mm_fusion.py")
PROMPTS = ["a red circle on a blue background", "画一只在草地上的狗。"]
QUESTIONS = [
    {"image": "sample.png", "question": "What is in this image?", "answer": "a dog"},
    {"image": ["sample.png", "sample.png"], "question": "Which one is brighter?"},
    {"question": "Is it raining?"},
]
EXAMPLES = {
    "image": [{"prompt": prompt, "image": "sample.png"} for prompt in PROMPTS],
    "answers": [
        {"question": "What is it?", "answer": "a dog", "image": "sample.png", "choices": ["a dog", "a cat"]},
        {"question": "Is it raining now?", "answer": "no", "choices": ["yes", "no"]},
    ],
    "tower": [{"image": "sample.png", "caption": caption} for caption in ("a dog", "a big red cat")],
}


def write_inputs(data: Path) -> None:
    """The picture, prompts, questions and examples, and a random text encoder as wide as the golden's tower."""
    shutil.copy(GOLDEN / "sample.png", data)
    (data / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}), encoding="utf-8")
    (data / "questions.json").write_text(json.dumps(QUESTIONS), encoding="utf-8")
    for task, examples in EXAMPLES.items():
        (data / f"{task}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": 384,
        "max_position_embeddings": 8,
        "projection_size": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    siglip = SiglipModel(SiglipConfig(text_config=sizes | text, vision_config=sizes | {"image_size": 16}))
    torch.nn.init.normal_(siglip.text_model.embeddings.token_embedding.weight)
    siglip.save_pretrained(data / "siglip")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer.json"), pad_token="<｜▁pad▁｜>")
    tokenizer.save_pretrained(data / "siglip")


def commands(model: Path, data: Path, out: Path) -> dict[str, list[str]]:
    common = ["--model", str(model), "--device", "cpu"]
    paint = ["run_batch_prompts.py", *common, "--prompt_json", f"{data}/prompts.json", "--outdir", f"{out}/painted",
             "--ab", "--layer", "4", "--cfg_weight", "5", "--parallel_size", "2", "--batch_size", "2"]  # fmt: skip
    ask = ["inference.py", *common, "--max_new_tokens", "8"]
    ask_one = [*ask, "--image", f"{data}/sample.png", "--question", "What is in this image?"]
    encoder = ["--text_encoder", f"{data}/siglip"]
    rank = ["--images", f"{data}/sample.png", "--candidates", "a red circle", "a blue star", "--layer", "2"]
    searches = {
        f"search {task}": ["janus.dola.layer_search", task, *common, "--data", f"{data}/{task}.jsonl",
                           "--outdir", f"{out}/search_{task}", *(encoder if task == "tower" else [])]
        for task in EXAMPLES
    }  # fmt: skip
    return {
        "paint": paint,
        "paint again": paint,
        "ask": ask_one,
        "ask with DoLa": [*ask_one, "--layer", "3"],
        "ask many": [*ask, "--questions", f"{data}/questions.json", "--outdir", f"{out}/answers", "--layer", "3"],
        "rerank": ["janus.dola.rerank", *common, *encoder, *rank, "--json", f"{out}/ranked.json"],
        **searches,
        "no checkpoint": ["inference.py", "--model", f"{data}/absent", "--question", "Is it raining?"],
        "no CUDA": ["inference.py", *common[:2], "--device", "cuda:99", "--question", "Is it raining?"],
    }


@pytest.fixture(scope="module")
def runs(golden, tmp_path_factory):
    """{"there": ..., "here": ...}, each the results of the commands and the directory that they wrote to."""
    directory = tmp_path_factory.mktemp("patch")
    checkout, data, checkpoint = directory / "Janus", directory / "data", directory / "checkpoint"
    shutil.copytree(STAND_IN, checkout, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(HERE / "janus" / "dola", checkout / "janus" / "dola", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT_FILES:
        shutil.copy(HERE / file, checkout)
    for file in RE_EXPORTS:
        shutil.copy(HERE / "janus" / "utils" / file, checkout / "janus" / "utils")
    for folder in (data, checkpoint, directory / "there", directory / "here"):
        folder.mkdir()
    write_inputs(data)
    for file in GOLDEN.glob("*.json"):
        shutil.copy(file, checkpoint)
    save_file(golden.model.state_dict(), checkpoint / "model.safetensors", metadata={"format": "pt"})

    (directory / "commands.json").write_text(json.dumps(commands(checkpoint, data, directory / "there")))
    with (directory / "commands.json").open() as file:
        there = subprocess.Popen(
            [sys.executable, "run_commands.py"],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(HERE)
        patched.setattr(sys, "argv", sys.argv)
        here = run_commands(commands(GOLDEN, data, directory / "here"))
    out, err = there.communicate()
    assert there.returncode == 0, err
    return {"there": (json.loads(out), directory / "there"), "here": (here, directory / "here")}


def both(runs, file: str, read=json.loads) -> list:
    """What a file that the commands wrote holds there, and here."""
    return [read((directory / file).read_text(encoding="utf-8")) for _, directory in (runs["there"], runs["here"])]


def read_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_command_runs_there_as_it_does_here(runs):
    for name, (code, out, err) in runs["there"][0].items():
        assert code == runs["here"][0][name][0] == (2 if name.startswith("no ") else 0), f"{name}: {out}{err}"


def test_painting_side_by_side_gives_the_same_tokens_and_resumes(runs):
    there, here = both(runs, "painted/manifest.jsonl", read_lines)
    tokens = [sorted((e["index"], e["variant"], e["image"], e["tokens_sha256"]) for e in es) for es in (there, here)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 2 * 2 * len(PROMPTS)
    assert "0 prompts painted (2 were done already)" in runs["there"][0]["paint again"][1]
    assert (runs["there"][1] / "painted" / "contact_sheet.png").is_file()


@pytest.mark.parametrize("name", ["ask", "ask with DoLa"])
def test_questions_get_the_same_answers(runs, name):
    answers = [results[name][1].splitlines()[-1] for results, _ in (runs["there"], runs["here"])]
    assert answers[0] == answers[1] != ""
    assert runs["there"][0]["ask"][1] != runs["there"][0]["ask with DoLa"][1]


def test_lists_of_questions_get_the_same_answers(runs):
    there, here = ([e["answer"] for e in entries] for entries in both(runs, "answers/answers.jsonl", read_lines))
    assert there == here and len(there) == len(QUESTIONS)


def test_candidates_are_ranked_alike(golden, runs):
    there, here = both(runs, "ranked.json")
    assert [row["candidate"] for row in there[0]["ranking"]] == [row["candidate"] for row in here[0]["ranking"]]
    p_hat, expected = ([row["p_hat"] for row in ranked[0]["ranking"]] for ranked in (there, here))
    assert_close(p_hat, expected, terms_of(golden.model.vision_model), size=1 + max(-math.log(p) for p in expected))
    assert p_hat[0] > p_hat[1]


@pytest.mark.parametrize("task", list(EXAMPLES))
def test_the_layer_search_finds_the_same(golden, runs, task):
    there, here = both(runs, f"search_{task}/layer_search.json")
    largest = max(float(np.abs(log_probs).max()) for log_probs in here["means"]["log_prob"].values())
    for metric, means in here["means"].items():
        for name, values in means.items():
            assert_close(there["means"][metric][name], values, terms_of(golden.model), size=1 + largest)


@pytest.mark.parametrize(
    ("name", "said"),
    [("no checkpoint", "absent: the original code cannot load this checkpoint"), ("no CUDA", "device 'cuda:99'")],
)
def test_what_cannot_be_loaded_is_told_in_one_line(runs, name, said):
    (line,) = runs["there"][0][name][2].splitlines()
    assert line.startswith("error: ") and said in line


def test_the_two_files_alone_say_that_their_command_needs_more(tmp_path):
    shutil.copytree(STAND_IN / "janus", tmp_path / "janus")
    for file in ROOT_FILES[:2]:
        shutil.copy(HERE / file, tmp_path)
    # an editable installation of this project would lend them its own janus.dola
    run = "import runpy, sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
    command = [sys.executable, "-c", run + "runpy.run_path('generation_inference.py', run_name='__main__')"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (2, "error: this command needs the folder janus/dola/ beside it\n")
