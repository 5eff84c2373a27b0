import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

import inference
from conftest import GOLDEN
from inference import answer, answer_with_dola, answer_with_dola_static, answer_with_switches
from janus.dola.cli import JANUS_TINY, run_command
from janus.dola.fusion import first_token_ids
from janus.dola.rerank import rerank_with_dola_static_siglip
from janus.dola.switches import DoLaSwitches
from janus.models import MultiModalityCausalLM
from tools import scenes

SAMPLE, QUESTION = GOLDEN / "sample.png", "What is in this image?"
CANDIDATES = ("A red circle", "blue", "画一只在草地上的狗")  # the first and the last begin as unfused answers go on


@pytest.fixture(scope="module")
def bank() -> Tensor:
    return torch.randn(len(CANDIDATES), 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def plain_greedy(golden, steps: int, alpha: float, layers: list[int], bias: Tensor | float = 0.0) -> list[int]:
    """DoLa (and a bias on F) as a loop over `output_hidden_states`, without hooks or cache, from logits in float64."""
    lm, tokens = golden.model.language_model, []
    embeds = golden.tensors["und.inputs_embeds"]
    for _ in range(steps):
        states = lm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        q_N = lm.lm_head(states[-1][0, -1]).double().softmax(-1)
        q = [lm.lm_head(lm.model.norm(states[layer][0, -1])).double().softmax(-1) for layer in layers]
        jsd = [((q_N * (2 * q_N / (q_N + x)).log()).sum() + (x * (2 * x / (q_N + x)).log()).sum()) / 2 for x in q]
        q_j = q[max(range(len(q)), key=lambda i: jsd[i])] if q else torch.ones_like(q_N)
        F = (q_N / q_j).log().masked_fill(q_N < alpha * q_N.max(), -math.inf)
        joint = F + bias
        tokens.append(int((joint if (joint > -math.inf).any() else F).argmax()))
        embeds = torch.cat([embeds, lm.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
    return tokens


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [str(SAMPLE), SAMPLE, Image.open(SAMPLE)], ids=["str", "path", "PIL"])
def test_the_reference_path_gives_the_golden_answer(golden, image):
    for images in (image, [image]):
        text, tokens = answer(golden.model, golden.processor, images, QUESTION, max_new_tokens=24, return_tokens=True)
        assert tokens.tolist() == golden.tensors["und.greedy_tokens"][0].tolist()
        assert text == golden.facts["und.greedy_text"]


@pytest.mark.parametrize("layer", [1, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_dola_static_gives_the_tokens_of_a_plain_loop(golden, layer: int, alpha: float):
    _, tokens = answer_with_dola_static(
        golden.model,
        golden.processor,
        SAMPLE,
        QUESTION,
        layer=layer,
        alpha=alpha,
        max_new_tokens=12,
        return_tokens=True,
    )
    assert tokens.tolist() == plain_greedy(golden, 12, alpha, [layer])


def test_early_exit_gives_the_tokens_of_a_plain_loop(golden):
    _, tokens = answer_with_dola(
        golden.model,
        golden.processor,
        SAMPLE,
        QUESTION,
        candidate_layers=(5, 2, 4, 9),
        max_new_tokens=12,
        return_tokens=True,
    )
    assert tokens.tolist() == plain_greedy(golden, 12, 0.1, [2, 4, 5])


def test_off_means_the_reference_answer(golden, bank):
    usual: dict[str, Any] = {"max_new_tokens": 24, "return_tokens": True}
    off = DoLaSwitches(use_dola_lm_static=False, lambda_mm=0.0)
    vision = {"candidates": CANDIDATES, "text_bank": bank}
    way: Any
    for way in (
        lambda *a: answer_with_dola_static(*a, layer=2, use_dola=False, **usual),
        lambda *a: answer_with_dola_static(*a, layer=6, **usual),
        lambda *a: answer_with_dola(*a, candidate_layers=[2, 3], use_dola=False, **usual),
        lambda *a: answer_with_switches(*a, switches=off, **vision, **usual),
    ):
        _, tokens = way(golden.model, golden.processor, SAMPLE, QUESTION)
        assert tokens.tolist() == golden.tensors["und.greedy_tokens"][0].tolist()


def test_transformers_own_options_reach_generate(golden):
    text, tokens = answer(
        golden.model, golden.processor, SAMPLE, QUESTION, num_beams=3, max_new_tokens=5, return_tokens=True
    )
    assert isinstance(text, str) and len(tokens) == 5


def test_a_question_on_text_and_one_on_two_images_are_answered(golden):
    assert answer(golden.model, golden.processor, [], "画一只在草地上的狗。", max_new_tokens=3)
    batch = inference.prepare_question(golden.model, golden.processor, [SAMPLE, SAMPLE], "Same?")
    assert batch.pixel_values.shape[1] == 2 and batch.sft_format[0].count("<image_placeholder>\n") == 2
    assert answer(golden.model, golden.processor, [SAMPLE, SAMPLE], "Same?", max_new_tokens=3)


def test_an_object_with_the_interfaces_names_is_enough(golden):
    names = ("language_model", "vision_model", "prepare_inputs_embeds")
    foreign = SimpleNamespace(**{name: getattr(golden.model, name) for name in names})
    _, tokens = answer(foreign, golden.processor, SAMPLE, QUESTION, max_new_tokens=24, return_tokens=True)
    assert tokens.tolist() == golden.tensors["und.greedy_tokens"][0].tolist()
    _, tokens = answer_with_dola_static(
        foreign, golden.processor, SAMPLE, QUESTION, layer=3, max_new_tokens=6, return_tokens=True
    )
    assert tokens.tolist() == plain_greedy(golden, 6, 0.1, [3])


# --- the whole of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("miss", [None, 0.0, -math.inf])
@pytest.mark.parametrize("use_dola_lm", [True, False])
def test_rerank_mapping_dola_and_fusion_give_the_tokens_of_a_plain_loop(golden, bank, miss, use_dola_lm: bool):
    switches = DoLaSwitches(
        use_dola_lm_static=use_dola_lm,
        fixed_layer_llm=3,
        fixed_layer_vit=2,
        alpha_L=0.02,
        lambda_mm=0.5,
        mm_topk_for_T=2,
    )
    _, tokens = answer_with_switches(
        golden.model,
        golden.processor,
        SAMPLE,
        QUESTION,
        switches,
        candidates=CANDIDATES,
        text_bank=bank,
        tau=0.2,
        miss=miss,
        max_new_tokens=12,
        return_tokens=True,
    )
    tower, pixels = golden.model.vision_model.vision_tower, golden.tensors["und.pixel_values"][0]
    p_hat = rerank_with_dola_static_siglip(tower, pixels, bank, 2, 0.1, tau=0.2)[0].double()
    r_V = torch.full((384,), math.log(1e-12) if miss is None else miss, dtype=torch.float64)
    best = p_hat.topk(2).indices.tolist()
    words = {c: first_token_ids(golden.processor.tokenizer, CANDIDATES[c]) for c in best}
    for token in set().union(*words.values()):
        r_V[token] = max(sum(p_hat[c].item() for c in best if token in words[c]), 1e-12)
        r_V[token] = r_V[token].log()
    expected = plain_greedy(golden, 12, 0.02, [3] if use_dola_lm else [], 0.5 * r_V)
    assert tokens.tolist() == expected != plain_greedy(golden, 12, 0.02, [3] if use_dola_lm else [])


def test_lambda_0_gives_the_tokens_of_no_fusion(golden, bank):
    usual: dict[str, Any] = {"max_new_tokens": 24, "return_tokens": True}
    switches = DoLaSwitches(lambda_mm=0.0, fixed_layer_llm=3)
    _, tokens = answer_with_switches(
        golden.model, golden.processor, SAMPLE, QUESTION, switches, candidates=CANDIDATES, text_bank=bank, **usual
    )
    _, unfused = answer_with_dola_static(golden.model, golden.processor, SAMPLE, QUESTION, layer=3, **usual)
    assert torch.equal(tokens, unfused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_bank": None}, "text_bank"),
        ({"text_bank": torch.randn(3, 7)}, "text_bank has width 7, the image features have width 32"),
        ({"images": []}, "need an image"),
        ({"candidates": ["a", " ", "b"]}, "candidate ' ' has no token"),
        ({"tau": -1.0}, "tau must be positive and finite, got -1.0"),
        ({"switches": DoLaSwitches(fixed_layer_vit=9)}, r"layer must be in 1\.\.4, got 9"),
        ({"switches": DoLaSwitches(fixed_layer_llm=9)}, r"layer must be in 1\.\.6, got 9"),
        ({"miss": 2.0}, "miss must be None"),
    ],
)
def test_bad_parts_of_the_whole_are_named(golden, bank, change: dict, message: str):
    usual = {
        "images": SAMPLE,
        "question": QUESTION,
        "switches": DoLaSwitches(),
        "candidates": CANDIDATES,
        "text_bank": bank,
    }
    blocks = golden.model.language_model.model.layers
    before = [len(block._forward_hooks) for block in blocks]
    with pytest.raises(ValueError, match=message):
        answer_with_switches(golden.model, golden.processor, **usual | change)
    assert [len(block._forward_hooks) for block in blocks] == before


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    """A SiglipModel of random weights, as wide as the golden tower, with a tokenizer."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 362}
    text = {"vocab_size": 384, "max_position_embeddings": 8, "projection_size": 32}
    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipConfig(text_config=width | ids | text, vision_config=width | {"image_size": 16, "patch_size": 8})
    SiglipModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / "tokenizer.json"), pad_token="<｜▁pad▁｜>", model_input_names=["input_ids"]
    ).save_pretrained(folder)
    return folder


def run(monkeypatch, *options: object) -> None:
    usual = ["--model", str(GOLDEN), "--device", "cpu", "--dtype", "float32", "--max_new_tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *usual, *map(str, options)])
    run_command(inference.main)


def write_questions(folder: Path, *entries: Any) -> Path:
    Image.open(SAMPLE).save(folder / "sample.png")
    path = folder / "questions.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_command_prints_the_reference_answer(golden, monkeypatch, capsys):
    run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, "--max_new_tokens", 24)
    assert capsys.readouterr().out == golden.facts["und.greedy_text"] + "\n"


@pytest.mark.parametrize(
    ("options", "way"),
    [
        (["--layer", 3, "--alpha", 0], lambda *a, **k: answer_with_dola_static(*a, layer=3, alpha=0.0, **k)),
        (["--layer_ratio", 0.5], lambda *a, **k: answer_with_dola_static(*a, layer_ratio=0.5, **k)),
        (["--candidate_layers", "2,4"], lambda *a, **k: answer_with_dola(*a, candidate_layers=[2, 4], **k)),
        (["--layer", 3, "--no_norm"], lambda *a, **k: answer_with_dola_static(*a, layer=3, norm=False, **k)),
        (["--apc-only"], lambda *a, **k: answer_with_dola_static(*a, gamma=0.0, **k)),
    ],
)
def test_its_options_are_those_of_the_functions(golden, monkeypatch, capsys, options, way):
    run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, *options)
    assert capsys.readouterr().out == way(golden.model, golden.processor, SAMPLE, QUESTION, max_new_tokens=6) + "\n"


def test_a_config_runs_rerank_mapping_dola_and_fusion(golden, monkeypatch, capsys, tmp_path, text_encoder):
    far, near = DoLaSwitches(fixed_layer_llm=1), DoLaSwitches(fixed_layer_vit=2, fixed_layer_llm=3, lambda_mm=1.0)
    far.to_json(tmp_path / "s.json", {"near": near})
    options = ["--config", tmp_path / "s.json", "--domain", "near", "--tau", 0.5, "--text_encoder", text_encoder]
    run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, *options, "--candidates", *CANDIDATES)
    bank = inference.build_text_bank(*inference.find_text_encoder("", str(text_encoder)), CANDIDATES)
    expected = answer_with_switches(
        golden.model,
        golden.processor,
        SAMPLE,
        QUESTION,
        near,
        candidates=CANDIDATES,
        text_bank=bank,
        tau=0.5,
        max_new_tokens=6,
    )
    assert capsys.readouterr().out == f"{expected}\n".removeprefix(" ")
    assert expected != answer_with_dola_static(
        golden.model, golden.processor, SAMPLE, QUESTION, layer=3, max_new_tokens=6
    )


def test_a_batch_writes_answers_and_accuracy(golden, monkeypatch, capsys, tmp_path):
    right = answer(golden.model, golden.processor, SAMPLE, QUESTION, max_new_tokens=6)
    questions = write_questions(
        tmp_path,
        {"image": "sample.png", "question": QUESTION, "answer": f" {right}."},
        {"image": ["sample.png"], "question": "Which colour?", "answer": "surely not this"},
        {"question": "No picture?"},
    )
    run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "out")
    first, second, third = lines(tmp_path / "out" / "answers.jsonl")
    assert (first["answer"], first["right"], second["right"]) == (right, True, False)
    assert third["images"] == [] and "right" not in third
    assert "accuracy 0.500 (1 of 2)" in capsys.readouterr().out


def test_a_killed_batch_resumes_to_the_same_bytes(monkeypatch, tmp_path):
    questions = write_questions(
        tmp_path, *({"image": "sample.png", "question": f"Number\u2028 {i}?"} for i in range(4))
    )
    run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "whole")
    asked = []

    def killed_at_the_third(*args, **kwargs):
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    decode = inference.decode_answer
    monkeypatch.setattr(inference, "decode_answer", killed_at_the_third)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "killed")
    assert end.value.code == 130 and len(lines(tmp_path / "killed" / "answers.jsonl")) == 2
    run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "killed")
    whole, killed = ((tmp_path / name / "answers.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed and len(asked) == 5


def test_another_run_is_not_overwritten_unless_asked(monkeypatch, capsys, tmp_path):
    outdir = tmp_path / "out"
    run(monkeypatch, "--questions", write_questions(tmp_path, {"question": "One?"}), "--outdir", outdir)
    before = (outdir / "answers.jsonl").read_bytes()
    for questions, options in (([{"question": "One?"}], ["--layer", 3]), ([{"question": "Two?"}], [])):
        path = write_questions(tmp_path, *questions)
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, "--questions", path, "--outdir", outdir, *options)
        assert end.value.code == 2 and str(outdir) in capsys.readouterr().err
        assert (outdir / "answers.jsonl").read_bytes() == before
    run(monkeypatch, "--questions", path, "--outdir", outdir, "--overwrite")
    assert [line["question"] for line in lines(outdir / "answers.jsonl")] == ["Two?"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "none.png", "question": "?"}, "entry 1: {folder}/none.png: file not found"),
        ({"image": "questions.json", "question": "?"}, "entry 1: {folder}/questions.json: not an image"),
        ({"image": 3, "question": "?"}, "entry 1: 'image' must be strings, found 3"),
        ({"question": " "}, "entry 1: 'question' must be a text, found ' '"),
        ({"question": "?", "answer": 2}, "entry 1: 'answer' must be a text, found 2"),
        ({"question": "?", "candidates": "red"}, "entry 1: 'candidates' must be strings, found 'red'"),
        ({"question": "?", "expected": "x"}, "entry 1: unknown key 'expected'"),
        ("why?", "entry 1: expected an object, found 'why?'"),
    ],
)
def test_a_bad_entry_is_named_in_one_line_and_what_was_done_stays(monkeypatch, capsys, tmp_path, entry, message: str):
    questions = write_questions(tmp_path, {"question": "Fine?"})
    run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "out")
    done = (tmp_path / "out" / "answers.jsonl").read_bytes()
    write_questions(tmp_path, {"question": "Fine?"}, entry)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "out", "--overwrite")
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert error.startswith(f"error: {questions}: ") and message.format(folder=tmp_path) in error
    assert done and (tmp_path / "out" / "answers.jsonl").read_bytes() == done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", __file__, "--question", "?"], f"{__file__}: not an image"),
        (["--question", "?", "--layer", 7], "layer must be in 1..6, got 7"),
        (["--question", "?", "--layer", 3, "--alpha", 2], "alpha must be in [0, 1], got 2.0"),
        (["--question", "?", "--candidate_layers", "9"], "candidate_layers [9] hold no layer in 1..5"),
        (["--question", "?", "--candidate_layers", ""], "candidate_layers [] hold no layer in 1..5"),
        (["--question", "?", "--candidates", "a"], "--candidates needs --config"),
        (["--question", "?", "--alpha", 0.2], "--alpha needs --layer"),
        (["--questions", "q.json", "--image", SAMPLE], "--image goes with --question"),
        (["--questions", "nowhere.json"], "nowhere.json: file not found"),
        (["--question", "?", "--config", "nowhere.json"], "nowhere.json: file not found"),
        (["--question", "?", "--model", "/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_options_that_cannot_be_end_with_exit_code_2(monkeypatch, capsys, options, message: str):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *options)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_candidates_need_a_text_encoder(monkeypatch, capsys, tmp_path):
    DoLaSwitches().to_json(tmp_path / "s.json")
    options = ["--image", SAMPLE, "--question", "?", "--config", tmp_path / "s.json", "--candidates", "a"]
    for more, message in (
        ([], "has no siglip/ text encoder: name one with --text_encoder"),
        (["--text_encoder", GOLDEN], 'model_type: expected "siglip", found "multi_modality"'),
        (["--text_encoder", tmp_path], "config.json: file not found"),
    ):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *options, *more)
        assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_janus_tiny_reads_a_drawing_with_and_without_the_vision_prior(monkeypatch, capsys, tmp_path):
    scene = scenes.Scene((("red", "cross"),), "black", size="large")
    Image.fromarray(scenes.render(scene)).save(tmp_path / "drawing.png")
    DoLaSwitches().to_json(tmp_path / "s.json")
    asked = ["--image", tmp_path / "drawing.png", "--question", "What colour is the object?", "--model", JANUS_TINY]
    config = ["--config", tmp_path / "s.json", "--candidates", *scenes.COLOURS]
    for options in ([], ["--layer_ratio", 0.8], config):
        run(monkeypatch, *asked, *options)
        assert capsys.readouterr().out == "red\n"
    siglip, tokenizer = inference.find_text_encoder(str(JANUS_TINY), None)
    tower = MultiModalityCausalLM.from_pretrained(JANUS_TINY, dtype=torch.float32).vision_model.vision_tower
    captions = [other.caption for other in scenes.one_object_scenes()]
    bank, pixels = inference.build_text_bank(siglip, tokenizer, captions), torch.from_numpy(scenes.render(scene))
    images = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    for layer in (5, 6):
        p_hat = rerank_with_dola_static_siglip(tower, images, bank, layer, tau=inference.siglip_temperature(siglip))
        assert captions[p_hat.argmax()] == scene.caption
