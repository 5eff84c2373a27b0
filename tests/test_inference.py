import copy
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
from inference import answer, answer_batch, answer_with_dola, answer_with_dola_static, answer_with_switches
from janus.dola.cli import JANUS_TINY, run_command
from janus.dola.fusion import TowerPrior, first_token_ids, read_tower, vision_prior
from janus.dola.inputs import embed_inputs
from janus.dola.rerank import rerank_with_dola_static_siglip
from janus.dola.switches import DoLaSwitches
from janus.models import MultiModalityCausalLM
from tools import scenes

ONE = torch.tensor([1])
SAMPLE, QUESTION = GOLDEN / "sample.png", "What is in this image?"
CANDIDATES = ("A red circle", "blue", "画一只在草地上的狗")  # the first and the last begin as unfused answers go on


@pytest.fixture(scope="module")
def bank() -> Tensor:
    return torch.randn(len(CANDIDATES), 32, generator=torch.Generator().manual_seed(5))


def plain_greedy(golden, steps: int, alpha: float, layers: list[int], bias: Tensor | float = 0.0) -> list[int]:
    return [step["token"] for step in plain_steps(golden, steps, alpha, layers, bias)]


@torch.no_grad()
def plain_steps(
    golden, steps: int, alpha: float, layers: list[int], bias: Tensor | float = 0.0, embeds: Tensor | None = None
) -> list[dict[str, Any]]:
    """DoLa (and a bias on F) as a loop over `output_hidden_states`, without hooks or cache, from logits in float64.

    With it, of each step, the distributions, their divergence, and the layer.
    """
    lm, told = golden.model.language_model, []
    embeds = golden.tensors["und.inputs_embeds"] if embeds is None else embeds
    for _ in range(steps):
        states = lm.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
        q_N = lm.lm_head(states[-1][0, -1]).double().softmax(-1)
        q = [lm.lm_head(lm.model.norm(states[layer][0, -1])).double().softmax(-1) for layer in layers]
        jsd = [((q_N * (2 * q_N / (q_N + x)).log()).sum() + (x * (2 * x / (q_N + x)).log()).sum()) / 2 for x in q]
        best = max(range(len(q)), key=lambda i: jsd[i]) if q else None
        F = (q_N / (1.0 if best is None else q[best])).log().masked_fill(q_N < alpha * q_N.max(), -math.inf)
        joint = F + bias
        joint = joint if (joint > -math.inf).any() else F
        p_hat, token = joint.softmax(-1), int(joint.argmax())
        m = (q_N + p_hat) / 2
        step = {
            "token": token,
            "q_N": q_N,
            "q_j": q_N if best is None else q[best],
            "p_hat": p_hat,
            "jsd": ((q_N * (q_N / m).log()).sum() + torch.special.xlogy(p_hat, p_hat / m).sum()) / 2,
            "argmax_changed": token != int(q_N.argmax()),
        }
        told.append(step if best is None else step | {"layer": layers[best]})
        embeds = torch.cat([embeds, lm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return told


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


LENGTHS = (
    ([], "画一只在草地上的狗。"),
    ([SAMPLE], QUESTION),
    ([SAMPLE, SAMPLE], "Same?"),
    ([SAMPLE], ("What colour?", "blue", "And the other one, the one that is behind it?")),
)

OTHER = Image.new("RGB", (16, 16), "red")
ON_TWO_IMAGES = (
    ([SAMPLE], QUESTION),
    ([SAMPLE, OTHER], "Same?"),
    ([SAMPLE], "And what stands behind all of that, far away?"),
    ([OTHER], QUESTION),
    ([SAMPLE], ("What colour?", "blue", "And the other one?")),
    ([SAMPLE, OTHER], "Which of the two is red?"),
)


@pytest.mark.parametrize(
    "dola",
    [
        None,
        {"layer": 3, "alpha": 0.0},
        {"layer": 2, "norm": False, "alpha": 0.0},
        {"candidate_layers": [1, 3, 5], "alpha": 0.01},
        {"gamma": 0.0},
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("questions", [LENGTHS, ON_TWO_IMAGES], ids=["of any length", "on the same images"])
def test_questions_of_any_length_and_number_of_images_are_answered_together_as_alone(
    golden, questions, dola, beams: int
):
    usual: dict[str, Any] = {"dola": dola, "max_new_tokens": 8, "num_beams": beams}
    together = answer_batch(golden.model, golden.processor, questions, **usual)
    for asked, (text, tokens, _) in zip(questions, together, strict=True):
        alone = answer_batch(golden.model, golden.processor, [asked], **usual)[0]
        assert tokens.tolist() == alone.tokens.tolist() and text == alone.text


def test_images_that_several_questions_show_are_read_once(golden):
    read = []
    with golden.model.vision_model.register_forward_hook(lambda module, args, out: read.append(len(args[0]))):
        answer_batch(golden.model, golden.processor, ON_TWO_IMAGES, max_new_tokens=1)
    assert read == [3 * 2]  # three beginnings, each with places for two images


def test_an_answer_ends_at_its_own_end_though_others_in_the_batch_go_on(golden):
    usual: dict[str, Any] = {"dola": {"layer": 3, "alpha": 0.0}, "max_new_tokens": 8}
    alone = [answer_batch(golden.model, golden.processor, [q], **usual)[0].tokens.tolist() for q in LENGTHS]
    end = alone[0][4]  # from here on, as if this were the end
    cut = [tokens[: tokens.index(end) + 1 if end in tokens else None] for tokens in alone]
    assert len({len(tokens) for tokens in cut}) > 2
    processor = copy.deepcopy(golden.processor)
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(end)
    together = answer_batch(golden.model, processor, LENGTHS, **usual)
    assert [answer.tokens.tolist() for answer in together] == cut


def test_each_question_of_a_batch_is_fused_with_its_own_candidates(golden, bank):
    switches = DoLaSwitches(fixed_layer_llm=3, fixed_layer_vit=2, lambda_mm=0.9)
    asked = [LENGTHS[i] for i in (1, 2, 3)]
    texts, banks = [CANDIDATES, CANDIDATES[:2], CANDIDATES], [bank, bank[:2], bank]
    usual: dict[str, Any] = {"dola": {"layer": 3}, "max_new_tokens": 6}
    together = answer_batch(
        golden.model, golden.processor, asked, prior=TowerPrior(switches, texts, banks, tau=0.2), **usual
    )
    for i in range(3):
        prior = TowerPrior(switches, [texts[i]], [banks[i]], tau=0.2)
        alone = answer_batch(golden.model, golden.processor, [asked[i]], prior=prior, **usual)
        assert together[i].tokens.tolist() == alone[0].tokens.tolist()
    unfused = answer_batch(golden.model, golden.processor, asked, **usual)
    assert [a.tokens.tolist() for a in together] != [a.tokens.tolist() for a in unfused]


def test_several_images_of_a_question_speak_with_their_mean(golden, bank):
    switches, other = DoLaSwitches(fixed_layer_vit=2, alpha_V=0.0), Image.new("RGB", (16, 16), "red")
    batch = inference.prepare_question(golden.model, golden.processor, [SAMPLE, other], "Same?")
    r_V = read_tower(golden.model, golden.processor, batch, TowerPrior(switches, [CANDIDATES], [bank], tau=0.2))
    tower = golden.model.vision_model.vision_tower
    p_hat = rerank_with_dola_static_siglip(tower, batch.pixel_values[0], bank, 2, 0.0, tau=0.2)
    words = [first_token_ids(golden.processor.tokenizer, candidate) for candidate in CANDIDATES]
    of_mean, of_first = (
        vision_prior(p, words, r_V.shape[1], switches.mm_topk_for_T) for p in (p_hat.mean(0), p_hat[0])
    )
    assert torch.equal(r_V[0], of_mean) and not torch.equal(of_mean, of_first)


@pytest.mark.parametrize(
    ("dola", "alpha", "layers"),
    [
        (None, 0.0, []),
        ({"layer": 3, "alpha": 0.02}, 0.02, [3]),
        ({"candidate_layers": [1, 3, 5], "alpha": 0.0}, 0.0, [1, 3, 5]),
        ({"gamma": 0.0, "alpha": 0.3}, 0.3, []),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_trace_tells_what_a_plain_loop_finds_at_every_token(golden, bank, dola, alpha, layers, fused: bool):
    asked = [LENGTHS[i] for i in (3, 1)]  # padded, and not
    switches = DoLaSwitches(fixed_layer_vit=2, lambda_mm=0.5, alpha_L=0.0)
    prior = TowerPrior(switches, [CANDIDATES] * 2, [bank] * 2, tau=0.2) if fused else None
    options: dict[str, Any] = {"dola": dola, "prior": prior, "trace": 4, "max_new_tokens": 6}
    for row, given in enumerate(answer_batch(golden.model, golden.processor, asked, **options)):
        batch = inference.prepare_question(golden.model, golden.processor, *asked[row])
        bias = 0.0
        if fused:
            p_hat = rerank_with_dola_static_siglip(
                golden.model.vision_model.vision_tower, batch.pixel_values[0], bank, 2, switches.alpha_V, tau=0.2
            )
            words = [first_token_ids(golden.processor.tokenizer, text) for text in CANDIDATES]
            bias = 0.5 * vision_prior(p_hat[0], words, 384).double()
        steps = plain_steps(golden, 6, alpha, layers, bias, embeds=embed_inputs(golden.model, batch))
        assert [step.pop("token") for step in steps] == given.tokens.tolist()
        assert ("layer" in given.trace) == bool(layers)
        for t, step in enumerate(steps):
            assert given.trace["argmax_changed"][t] == step["argmax_changed"]
            assert given.trace["jsd"][t] == pytest.approx(step["jsd"].item(), abs=1e-5)
            assert not layers or given.trace["layer"][t] == step["layer"]
            for name in ("q_N", "q_j", "p_hat"):
                p, tokens = step[name].topk(4)
                found, at = given.trace[name][t], given.trace[f"{name}_tokens"][t]
                assert found == pytest.approx(p.numpy(), abs=1e-5)
                assert at[found > 0].tolist() == tokens[p > 0].tolist()


def test_a_trace_of_beams_is_refused(golden):
    with pytest.raises(ValueError, match="cannot be of beams"):
        answer_batch(golden.model, golden.processor, LENGTHS, trace=1, num_beams=2)


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
        alpha_V=0.1,
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
    p_hat = rerank_with_dola_static_siglip(tower, pixels, bank, 2, switches.alpha_V, tau=0.2)[0].double()
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


def test_flags_win_over_the_config(golden, monkeypatch, capsys, tmp_path):
    DoLaSwitches(fixed_layer_llm=1, alpha_L=0.5, use_dola_lm_static=False).to_json(tmp_path / "s.json")
    usual = ["--image", SAMPLE, "--question", QUESTION, "--config", tmp_path / "s.json", "--alpha", 0]
    for options, dola in (
        (["--layer", 3], {"layer": 3}),
        (["--layer_ratio", 0.4], {"layer": 2}),
        (["--candidate_layers", "1,3,5"], {"candidate_layers": [1, 3, 5]}),
        (["--layer", 3, "--gamma", 0.5, "--no_norm"], {"layer": 3, "gamma": 0.5, "norm": False}),
    ):
        run(monkeypatch, *usual, *options)
        asked = [([SAMPLE], QUESTION)]
        expected = answer_batch(golden.model, golden.processor, asked, dola={"alpha": 0.0} | dola, max_new_tokens=6)
        assert capsys.readouterr().out == expected[0].text.removeprefix(" ") + "\n"


def test_each_question_is_read_with_the_switches_of_its_domain(golden, monkeypatch, tmp_path):
    domains = {"one": DoLaSwitches(fixed_layer_llm=1, alpha_L=0.0), "three": DoLaSwitches(fixed_layer_llm=3, alpha_L=0)}
    DoLaSwitches(fixed_layer_llm=5, alpha_L=0.0).to_json(tmp_path / "s.json", domains)
    entries = [{"question": "Which?", "image": "sample.png"} for _ in range(4)]
    for entry, domain in zip(entries, ("one", "three", "one"), strict=False):
        entry["domain"] = domain
    questions = write_questions(tmp_path, *entries)
    run(monkeypatch, "--questions", questions, "--config", tmp_path / "s.json", "--outdir", tmp_path / "out")
    given = lines(tmp_path / "out" / "answers.jsonl")
    for line, layer in zip(given, (1, 3, 1, 5), strict=True):
        expected = answer_with_dola_static(
            golden.model, golden.processor, SAMPLE, "Which?", layer=layer, alpha=0.0, max_new_tokens=6
        )
        assert line["answer"] == expected.removeprefix(" ")
    assert len({line["answer"] for line in given}) == 3
    settings = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["settings"]
    assert [settings["switches"][name]["fixed_layer_llm"] for name in ("one", "three", "default")] == [1, 3, 5]


def test_miss_reaches_the_prior(golden, monkeypatch, capsys, tmp_path, text_encoder):
    switches = DoLaSwitches(fixed_layer_vit=2, use_dola_lm_static=False, alpha_L=0.0, lambda_mm=1.0)
    switches.to_json(tmp_path / "s.json")
    options = ["--config", tmp_path / "s.json", "--tau", 0.5, "--text_encoder", text_encoder, "--candidates", "blue"]
    bank = inference.build_text_bank(*inference.find_text_encoder("", str(text_encoder)), ["blue"])
    usual: dict[str, Any] = {"candidates": ["blue"], "text_bank": bank, "tau": 0.5, "max_new_tokens": 6}
    printed = []
    for name, miss in (("floor", None), ("zero", 0.0), ("forbid", -math.inf)):
        run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, *options, "--miss", name)
        expected = answer_with_switches(golden.model, golden.processor, SAMPLE, QUESTION, switches, miss=miss, **usual)
        printed.append(capsys.readouterr().out)
        assert printed[-1] == expected.removeprefix(" ") + "\n"
    assert printed[0] != printed[1]


def test_several_decodings_answer_side_by_side(golden, monkeypatch, capsys, tmp_path):
    specs = {"baseline": None, "layer3_alpha0": {"layer": 3, "alpha": 0.0}, "exit1-5_alpha0.01": {}}
    specs["exit1-5_alpha0.01"] = {"candidate_layers": [1, 5], "alpha": 0.01}
    compare = ["--compare", "baseline", "layer=3,alpha=0", "exit=1,5,alpha=0.01"]
    asked = [([SAMPLE], QUESTION)]
    expected = {
        name: answer_batch(golden.model, golden.processor, asked, dola=dola, max_new_tokens=6)[0].text.removeprefix(" ")
        for name, dola in specs.items()
    }
    run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, *compare)
    assert capsys.readouterr().out == "".join(f"{name}: {text}\n" for name, text in expected.items())
    entries = [{"image": "sample.png", "question": QUESTION, "answer": expected["baseline"]}] * 2
    run(monkeypatch, "--questions", write_questions(tmp_path, *entries), *compare, "--outdir", tmp_path / "out")
    given = [(line["index"], line["variant"], line["answer"]) for line in lines(tmp_path / "out" / "answers.jsonl")]
    assert given == [(i, name, text) for i in range(2) for name, text in expected.items()]
    printed = capsys.readouterr().out
    assert "baseline: accuracy 1.000 (2 of 2)\n" in printed
    assert "layer3_alpha0: accuracy 0.000 (0 of 2), 2 answers are not those of baseline\n" in printed


def test_a_trace_is_printed_for_one_question_and_written_for_many(golden, monkeypatch, capsys, tmp_path):
    dola = ["--candidate_layers", "1,3,5", "--alpha", "0.01", "--trace"]
    asked, tokenizer = [([SAMPLE], QUESTION)], golden.processor.tokenizer
    keywords = {"candidate_layers": [1, 3, 5], "alpha": 0.01}
    given = answer_batch(golden.model, golden.processor, asked, dola=keywords, trace=5, max_new_tokens=6)[0]
    run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, *dola)
    printed = capsys.readouterr().out.split("\n")
    assert printed[0] == given.text.removeprefix(" ") and len(printed) == 1 + 6 * 4 + 1
    for t, token in enumerate(given.tokens.tolist()):
        head, _, _, p_hat = printed[1 + 4 * t : 5 + 4 * t]
        assert repr(tokenizer.decode([token])) in head and f"layer {given.trace['layer'][t]:2d}" in head
        assert ("argmax changed" in head) == given.trace["argmax_changed"][t]
        assert p_hat.replace(",", "").split()[:3] == [
            "p_hat",
            repr(tokenizer.decode([token])),
            f"{given.trace['p_hat'][t][0]:.3f}",
        ]
    questions = write_questions(tmp_path, *({"image": "sample.png", "question": QUESTION} for _ in range(2)))
    run(monkeypatch, "--questions", questions, *dola, "--outdir", tmp_path / "out")
    for line in lines(tmp_path / "out" / "answers.jsonl"):
        steps = lines(tmp_path / "out" / line["trace"])
        assert [step["drawn"] for step in steps] == given.tokens.tolist()
        assert [step["layer"] for step in steps] == given.trace["layer"].tolist()
        top = [[token for token, _ in step["p_hat"]] for step in steps]
        assert top == given.trace["p_hat_tokens"].tolist()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    run(monkeypatch, "--questions", questions, "--outdir", tmp_path / "out", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answers.jsonl", "mine.txt", "run.json"]


def test_a_streamed_answer_is_the_printed_one(golden, monkeypatch, capsys):
    options = ["--image", SAMPLE, "--question", QUESTION, "--layer", 3, "--alpha", 0]
    run(monkeypatch, *options)
    printed = capsys.readouterr().out
    run(monkeypatch, *options, "--stream")
    assert capsys.readouterr().out == printed


def test_the_options_of_generate_reach_it(monkeypatch, tmp_path):
    reached = []
    monkeypatch.setattr(inference, "decode_answers", lambda *args, **options: reached.append(options) or [("a", ONE)])
    for options in (
        [],
        ["--num_beams", 3, "--repetition_penalty", 1.5],
        ["--temperature", 0.7, "--top_p", 0.9, "--top_k", 20],
        ["--compare", "temperature=2"],
    ):
        run(monkeypatch, "--question", "?", *options)
    usual = {"num_beams": 1, "repetition_penalty": 1.0, "do_sample": False, "max_new_tokens": 6}
    assert reached == [
        usual,
        usual | {"num_beams": 3, "repetition_penalty": 1.5},
        usual | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": True},
        usual | {"temperature": 2.0, "do_sample": True},
    ]


def test_one_seed_gives_one_answer_and_another_seed_another(monkeypatch, capsys):
    printed = []
    for seed in (1, 1, 2):
        run(monkeypatch, "--image", SAMPLE, "--question", QUESTION, "--temperature", 3, "--seed", seed)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_a_model_that_ends_its_answer_at_once_is_told_of_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        inference, "decode_answers", lambda *args, **options: [("", ONE)] * len(args[2]["attention_mask"])
    )
    run(monkeypatch, "--question", "?")
    out, err = capsys.readouterr()
    assert out == "\n" and err == "note: the question: the model ended its answer before a word\n"
    run(monkeypatch, "--questions", write_questions(tmp_path, *[{"question": "?"}] * 3), "--outdir", tmp_path / "out")
    assert "baseline, 3 of 3 questions: the model ended its answer before a word" in capsys.readouterr().err


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
        tmp_path, *({"image": "sample.png", "question": f"Number\u2028 {i}?"} for i in range(5))
    )
    options = ["--questions", questions, "--batch_size", 2, "--temperature", 2, "--compare", "baseline", "layer=3"]
    run(monkeypatch, *options, "--outdir", tmp_path / "whole")
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    asked = []

    def killed_at_the_second(*args, **kwargs):
        asked.append(args)
        if len(asked) == 4:  # two decodings of a batch
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    decode = inference.decode_answers
    monkeypatch.setattr(inference, "decode_answers", killed_at_the_second)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *options, "--outdir", tmp_path / "killed")
    assert end.value.code == 130 and len(lines(tmp_path / "killed" / "answers.jsonl")) == 4
    with (tmp_path / "killed" / "answers.jsonl").open("ab") as file:
        file.write(whole[whole.index(b'{"index": 2') :].split(b"\n")[0] + b"\n")  # part of a batch
    run(monkeypatch, *options, "--outdir", tmp_path / "killed")
    assert (tmp_path / "killed" / "answers.jsonl").read_bytes() == whole and len(asked) == 8


def test_a_log_that_somebody_changed_is_refused_in_one_line_and_a_strange_run_can_be_overwritten(
    monkeypatch, capsys, tmp_path
):
    questions, outdir = write_questions(tmp_path, {"question": "One?"}, {"question": "Two?"}), tmp_path / "out"
    run(monkeypatch, "--questions", questions, "--outdir", outdir)
    log = (outdir / "answers.jsonl").read_bytes()
    for changed in (
        log.replace(b'"index": 1', b'"index": 0'),
        log.replace(b'"variant": "baseline"', b'"variant": "x"'),
        log.replace(b'"question"', b'"asked"'),
        b"{}\n",
        log + log.split(b"\n")[1] + b"\n",
    ):
        (outdir / "answers.jsonl").write_bytes(changed)
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, "--questions", questions, "--outdir", outdir)
        assert end.value.code == 2 and "is not a line of this run" in capsys.readouterr().err.splitlines()[-1]
        assert (outdir / "answers.jsonl").read_bytes() == changed
    settings = json.loads((outdir / "run.json").read_text(encoding="utf-8"))
    for variants in ([], {"default": 3}, None):
        settings["settings"] = {"variants": variants, "trace": True}
        (outdir / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        run(monkeypatch, "--questions", questions, "--outdir", outdir, "--overwrite")
        assert (outdir / "answers.jsonl").read_bytes() == log


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
        ({"question": " "}, "entry 1: 'question' must be a text, or a list of turns, found ' '"),
        ({"question": ["?", 3, "?"]}, "entry 1: 'question' must be a text, or a list of turns, found ['?', 3, '?']"),
        ({"question": ["?", "so"]}, "entry 1: 'question' must end with the user's turn, found 2 turns"),
        ({"question": []}, "entry 1: 'question' must end with the user's turn, found 0 turns"),
        ({"question": "?", "candidates": ["red"]}, "entry 1: candidates need an image to be ranked on"),
        ({"question": "?", "domain": 1}, "entry 1: 'domain' must be a text, found 1"),
        ({"question": "?", "domain": "far"}, "entry 1: a domain needs --config"),
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
        (["--question", "?", "--no_norm"], "--no_norm needs --layer"),
        (["--question", "?", "--miss", "zero"], "--miss needs --config"),
        (["--question", "?", "--config", "c.json", "--candidates", "a"], "--candidates need an --image"),
        (["--question", "?", "--stream", "--num_beams", 2], "--stream goes with --question"),
        (["--questions", "q.json", "--stream"], "--stream goes with --question"),
        (["--question", "?", "--trace", "--num_beams", 2], "--trace follows one sequence"),
        (["--question", "?", "--temperature", 0], "temperature must be in [1e-06, 1e+06], got 0.0"),
        (["--question", "?", "--config", "c.json", "--tau", 0], "tau must be in [1e-06, 1e+06], got 0.0"),
        (["--question", "?", "--top_p", 1.5], "top_p must be in [1e-06, 1], got 1.5"),
        (["--question", "?", "--repetition_penalty", 0], "repetition_penalty must be in [1e-06, 1e+06], got 0.0"),
        (["--question", "?", "--compare", "cfg=3"], "variant 'cfg3': answers are not guided"),
        (["--question", "?", "--compare", "layer=9"], "layer must be in 1..6, got 9"),
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


def test_a_layer_beyond_the_tower_ends_the_command_before_an_old_run_can_go(
    monkeypatch, capsys, tmp_path, text_encoder
):
    questions = write_questions(tmp_path, {"image": "sample.png", "question": "One?", "candidates": ["a"]})
    options = ["--questions", questions, "--text_encoder", text_encoder, "--outdir", tmp_path / "out", "--config"]
    for name, layer in (("fits", 2), ("beyond", 9)):
        DoLaSwitches(fixed_layer_vit=layer).to_json(tmp_path / f"{name}.json")
    run(monkeypatch, *options, tmp_path / "fits.json")
    done = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *options, tmp_path / "beyond.json", "--overwrite")
    assert end.value.code == 2 and "layer must be in 1..4, got 9" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == done


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
