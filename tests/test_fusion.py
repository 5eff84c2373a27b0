import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dola_runtime import contrast_with_apc_from_logits
from janus.dola.fusion import VisionPriorLogitsProcessor, first_token_ids, vision_prior
from janus.dola.switches import DoLaSwitches
from tolerance import assert_close

NO_IDS = torch.zeros(1, 0, dtype=torch.long)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which "red", " red" and "Red" are one token each, and " Red" is a space and "Red"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("R", "e"), ("Re", "d")]
    words = [*letters, *dict.fromkeys(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# --- candidates to tokens --------------------------------------------------------------------------------------------


def test_a_phrase_begins_with_or_without_a_space_and_capitalised(tokenizer):
    ids = tokenizer.get_vocab()
    assert first_token_ids(tokenizer, "red circle") == {ids["red"], ids["Ġred"], ids["Red"]}
    assert first_token_ids(tokenizer, " red") == first_token_ids(tokenizer, "red")
    assert first_token_ids(tokenizer, "Red") == {ids["Red"]}
    assert ids["Ġ"] not in first_token_ids(tokenizer, "blue")
    assert first_token_ids(tokenizer, "狗") == {tokenizer.encode("狗")[0]}


@pytest.mark.parametrize("phrase", ["", "  "])
def test_a_candidate_without_a_token_is_named(tokenizer, phrase: str):
    with pytest.raises(ValueError, match=f"candidate '{phrase}' has no token"):
        first_token_ids(tokenizer, phrase)


# --- r_V -------------------------------------------------------------------------------------------------------------

SHARED = [{1, 2}, {2, 3}, {4}]  # T(c) of three candidates; two of them share token 2


@pytest.mark.parametrize(("miss", "missed"), [(None, math.log(1e-12)), (0.0, 0.0), (-math.inf, -math.inf)])
def test_r_V_is_the_log_of_the_summed_p_hat_and_a_miss_takes_its_three_forms(miss: float | None, missed: float):
    r_V = vision_prior(torch.tensor([0.5, 0.3, 0.2]), SHARED, 6, miss=miss)
    expected = [missed, math.log(0.5), math.log(0.8), math.log(0.3), math.log(0.2), missed]
    assert_close(r_V, expected, terms=3)


def test_only_the_top_k_candidates_of_each_row_speak():
    p_hat = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    r_V = vision_prior(p_hat, SHARED, 5, top_k=2, miss=0.0)
    expected = [[1, 0.5, 0.8, 0.3, 1], [1, 1, 0.2, 0.2, 0.7]]
    assert_close(r_V.exp(), expected, terms=3)
    assert_close(r_V[1], vision_prior(p_hat[1], SHARED, 5, top_k=2, miss=0.0), terms=3)


@pytest.mark.parametrize("miss", [None, 0.0, -math.inf])
def test_a_candidate_that_the_tower_rules_out_keeps_a_finite_floor(miss: float | None):
    r_V = vision_prior(torch.tensor([1.0, 0.0, 0.0]), SHARED, 5, miss=miss, eps=1e-6)
    assert r_V[3] == r_V[4]
    assert_close(r_V[4], math.log(1e-6), terms=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_hat": torch.zeros(0), "token_ids": []}, "0 candidates"),
        ({"token_ids": SHARED[:2]}, "p_hat has 3 candidates, token_ids 2"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"miss": -1.0}, r"miss must be None \(the floor\), 0.0 or -inf, got -1.0"),
        ({"miss": math.nan}, "miss"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_a_prior_of_bad_values_is_refused(change: dict, message: str):
    usual = {"p_hat": torch.tensor([0.5, 0.3, 0.2]), "token_ids": SHARED, "vocab_size": 5}
    with pytest.raises(ValueError, match=message):
        vision_prior(**usual | change)


# --- F_joint ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([0.3, 0.7, 1.0]),
    st.sampled_from([None, 0.0, -math.inf]),
)
def test_the_joint_score_is_the_formula_in_float64_on_the_kept_tokens(seed: int, alpha, lambda_mm, miss):
    rng = np.random.default_rng(seed)
    rows, vocab, candidates = 3, 12, 4
    logits = torch.from_numpy(rng.normal(size=(2, rows, vocab)).astype("f4"))
    token_ids = [set(rng.choice(vocab, 2).tolist()) for _ in range(candidates)]
    p_hat = rng.dirichlet(np.ones(candidates)).astype("f4")
    F_L = contrast_with_apc_from_logits(logits[0], logits[1], alpha)
    r_V = vision_prior(torch.from_numpy(p_hat), token_ids, vocab, miss=miss)
    fused = VisionPriorLogitsProcessor(r_V, lambda_mm)(NO_IDS, F_L).exp()

    hit = [[x in ids for ids in token_ids] for x in range(vocab)]
    missed = math.log(1e-12) if miss is None else miss
    prior = np.array([math.log(p_hat[h].astype(np.float64).sum()) if any(h) else missed for h in hit])
    kept = F_L.double().numpy()
    joint = kept + lambda_mm * prior
    joint = np.where(np.isfinite(joint).any(-1, keepdims=True), joint, kept)
    expected = np.exp(joint - joint.max(-1, keepdims=True))
    size = np.abs(joint[np.isfinite(joint)]).max()
    assert_close(fused, expected / expected.sum(-1, keepdims=True), terms=candidates, size=size)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_lambda_0_gives_back_the_very_scores(seed: int, dtype: torch.dtype):
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores[0, 2] = -math.inf
    for r_V in (torch.full((9,), -math.inf), torch.zeros(9)):
        assert torch.equal(VisionPriorLogitsProcessor(r_V, 0.0)(NO_IDS, scores), scores)


def test_a_row_whose_every_kept_token_is_forbidden_stays_as_it_is():
    scores = torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, 2.0]])
    r_V = vision_prior(torch.tensor([1.0]), [{2}], 3, miss=-math.inf)
    fused = VisionPriorLogitsProcessor(r_V, 0.7)(NO_IDS, scores).exp()
    assert_close(fused, torch.stack([scores[0].softmax(-1), torch.tensor([0.0, 0.0, 1.0])]), terms=3)


def test_without_dola_the_prior_keeps_to_the_plausible_tokens():
    scores = torch.tensor([[0.9, 0.06, 0.04]]).log()
    r_V = vision_prior(torch.tensor([1.0]), [{1, 2}], 3)
    assert VisionPriorLogitsProcessor(r_V, 1.0, alpha=0.1)(NO_IDS, scores).exp().tolist() == [[1.0, 0.0, 0.0]]
    assert VisionPriorLogitsProcessor(r_V, 1.0)(NO_IDS, scores).argmax() == 1


def test_every_beam_takes_the_prior_of_its_own_prompt():
    r_V = torch.tensor([[0.0, -5.0], [-5.0, 0.0]])
    fused = VisionPriorLogitsProcessor(r_V, 1.0)(NO_IDS, torch.zeros(6, 2))
    assert fused.argmax(-1).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("kwargs", "message"), [({"lambda_mm": 1.5}, "lambda_mm"), ({"alpha": -1.0}, "alpha")])
def test_weights_out_of_range_are_refused(kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VisionPriorLogitsProcessor(torch.zeros(3), **kwargs)


# --- switches --------------------------------------------------------------------------------------------------------


def test_switches_come_back_from_json_as_they_were_each_domain_with_its_own(tmp_path: Path):
    base = DoLaSwitches(lambda_mm=0.3, fixed_layer_vit=20)
    photos = DoLaSwitches(lambda_mm=0.3, fixed_layer_vit=None, fixed_layer_llm=24, use_dola_lm_static=False)
    base.to_json(tmp_path / "s.json", {"photos": photos, "drawings": base})
    assert DoLaSwitches.from_json(tmp_path / "s.json") == base
    assert DoLaSwitches.from_json(tmp_path / "s.json", "photos") == photos
    assert DoLaSwitches.from_json(tmp_path / "s.json", "drawings") == base


def test_a_domain_inherits_from_its_file_and_the_file_from_the_defaults(tmp_path: Path):
    content = {"alpha_L": 0, "domains": {"a": {"lambda_mm": 1}, "b": {}}}
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert DoLaSwitches.from_json(tmp_path / "s.json", "a") == DoLaSwitches(alpha_L=0, lambda_mm=1)
    assert DoLaSwitches.from_json(tmp_path / "s.json", "b") == DoLaSwitches(alpha_L=0)


@pytest.mark.parametrize(
    ("content", "domain", "message"),
    [
        ('{"alpha_v": 0.1}', None, "unknown key 'alpha_v' (known: use_dola_siglip_static,"),
        ('{"lambda_mm": "0.7"}', None, "lambda_mm must be a number, got '0.7'"),
        ('{"lambda_mm": true}', None, "lambda_mm must be a number, got True"),
        ('{"use_dola_lm_static": 1}', None, "use_dola_lm_static must be true or false, got 1"),
        ('{"fixed_layer_vit": 20.5}', None, "fixed_layer_vit must be a whole number or null, got 20.5"),
        ('{"fixed_layer_llm": 0}', None, "fixed_layer_llm must be at least 1, got 0"),
        ('{"mm_topk_for_T": null}', None, "mm_topk_for_T must be a whole number, got None"),
        ('{"alpha_L": 1.5}', None, "alpha_L must be in [0, 1], got 1.5"),
        ('{"alpha_L": NaN}', None, "holds the number NaN, which is not finite"),
        ('{"domains": {"a": {"x": 1}}}', None, "domain 'a': unknown key 'x'"),
        ('{"domains": {"a": 3}}', None, "domain 'a': expected an object of switches, got 3"),
        ('{"domains": ["a"]}', None, "domains must be an object"),
        ('{"domains": {"a": {}, "b": {}}}', "c", "no domain 'c' (domains: a, b)"),
        ("{}", "c", "no domain 'c' (domains: none)"),
        ("[1]", None, "expected an object of switches, got [1]"),
        ("{", None, "not JSON"),
        (None, None, "file not found"),
    ],
)
def test_a_bad_config_ends_in_one_line_that_names_the_file(tmp_path: Path, content, domain, message: str):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError) as error:
        DoLaSwitches.from_json(path, domain)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)
