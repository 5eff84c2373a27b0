import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dola_runtime import (
    apc_mask,
    check_alpha,
    check_cfg_weight,
    check_gamma,
    check_layer,
    check_temperature,
    compute_logprobs_from_hidden,
    contrast_layers,
    contrast_with_apc_from_logits,
    contrast_with_apc_from_logprobs,
    dola_static_from_hidden,
    guide_logits,
    guide_scores,
    jsd_from_logprobs,
    pick_contrast_layers,
    pick_static_layer_index,
    probs_from_scores,
    sanitize_candidate_layers,
    select_layer_by_jsd,
    trace_step,
)
from tolerance import assert_close, float32_error, terms_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def log_softmax64(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def p_hat64(final: np.ndarray, mid: np.ndarray, alpha: float, temperature: float) -> np.ndarray:
    """The formula of the paper, written out."""
    log_qN, log_qj = log_softmax64(final), log_softmax64(mid)
    kept = np.exp(log_qN) >= alpha * np.exp(log_qN).max(-1, keepdims=True)
    F = np.where(kept, log_qN - log_qj, -np.inf) / temperature
    weights = np.exp(F - F.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_logits(seed: int, vocab: int, rows: int = 3, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    final, mid = scale * torch.randn(2, rows, vocab, generator=generator)
    return final, mid


logits_pairs = st.builds(
    random_logits,
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 7, 300]),
    st.integers(1, 4),
    st.sampled_from([0.1, 4, 60]),
)
alphas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
temperatures = st.floats(1e-30, 1e6)


@given(logits_pairs, st.sampled_from([0.0, 0.05, 0.1, 0.5]), st.sampled_from([0.3, 1.0, 2.0]))
def test_p_hat_is_the_papers_formula_in_float64(pair, alpha, temperature):
    final, mid = (x.double().numpy() for x in pair)
    log_qN, log_qj = log_softmax64(final), log_softmax64(mid)
    size = max(np.abs(log_qN).max(), np.abs(log_qj).max())
    margin = log_qN - log_qN.max(-1, keepdims=True) - math.log(max(alpha, 1e-300))
    if (np.abs(margin) < float32_error(1, size)).any():
        return  # a token on the threshold may fall on either side of it in float32
    got = probs_from_scores(contrast_with_apc_from_logits(pair[0], pair[1], alpha), temperature)
    assert_close(got, p_hat64(final, mid, alpha, temperature), terms=1, size=size / temperature)


@given(logits_pairs, alphas, temperatures, st.sampled_from(DTYPES))
def test_p_hat_sums_to_one_and_is_zero_exactly_off_the_apc_set(pair, alpha, temperature, dtype):
    final, mid = (x.to(dtype) for x in pair)
    F = contrast_with_apc_from_logits(final, mid, alpha)
    kept = apc_mask(torch.log_softmax(final.float(), -1), alpha)
    p_hat = probs_from_scores(F, temperature)
    assert F.dtype == p_hat.dtype == torch.float32
    assert torch.equal(F > -math.inf, kept)
    assert (p_hat[~kept] == 0).all()
    assert_close(p_hat.sum(-1), torch.ones(len(p_hat)), terms=p_hat.shape[-1])
    if temperature >= 1:
        spread = (F.amax(-1, keepdim=True) - F).masked_fill(~kept, 0) / temperature
        assert (p_hat[kept & (spread < 80)] > 0).all()


@given(logits_pairs, alphas)
def test_the_argmax_of_the_last_layer_is_always_kept(pair, alpha):
    final, mid = pair
    F = contrast_with_apc_from_logits(final, mid, alpha)
    assert (F.gather(-1, final.argmax(-1, keepdim=True)) > -math.inf).all()


def test_alpha_0_keeps_every_possible_token_and_alpha_1_only_the_maximum():
    final, mid = random_logits(0, 50)
    assert (contrast_with_apc_from_logits(final, mid, 0.0) > -math.inf).all()
    F = contrast_with_apc_from_logits(final, mid, 1.0)
    assert torch.equal((F > -math.inf).nonzero()[:, 1], final.argmax(-1))
    ties = torch.tensor([[1.0, 3.0, 3.0]])
    assert apc_mask(torch.log_softmax(ties, -1), 1.0).tolist() == [[False, True, True]]


@given(logits_pairs, alphas, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(pair, alpha, constant):
    final, mid = pair
    moved = contrast_with_apc_from_logits(final + constant, mid - constant, alpha)
    plain = contrast_with_apc_from_logits(final, mid, alpha)
    both = (moved > -math.inf) & (plain > -math.inf)
    size = max(float(x.abs().max()) for x in pair) + abs(constant)
    assert_close(moved[both], plain[both], terms=1, size=size)
    differing = (moved > -math.inf) != (plain > -math.inf)
    log_q = torch.log_softmax(final, -1)
    threshold = math.log(max(alpha, 1e-300)) + log_q.amax(-1, keepdim=True)
    assert ((log_q - threshold).abs()[differing] < float32_error(1, size)).all()  # only on the threshold itself


@pytest.mark.parametrize("vocab", [1, 16384, 102400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_vocabulary_of_the_family_gives_a_distribution(vocab, dtype):
    final, mid = (x.to(dtype) for x in random_logits(1, vocab, rows=2, scale=10))
    p_hat = probs_from_scores(contrast_with_apc_from_logits(final, mid, 0.1), 0.7)
    assert_close(p_hat.sum(-1), torch.ones(2), terms=vocab)


def test_rows_with_minus_infinity_stay_finite_and_forbidden():
    inf = math.inf
    final = torch.tensor([[2.0, 1.9, -inf, -inf], [0.0, -inf, -inf, -inf]])
    mid = torch.tensor([[1.0, -inf, 3.0, -inf], [-inf, 0.0, -inf, -inf]])
    for alpha in (0.0, 0.1, 1.0):
        p_hat = probs_from_scores(contrast_with_apc_from_logits(final, mid, alpha), 1.0)
        assert torch.isfinite(p_hat).all()
        assert (p_hat[final == -inf] == 0).all()
        assert_close(p_hat.sum(-1), torch.ones(2), terms=4)
    # a token that only the last layer allows wins over one that both allow
    assert probs_from_scores(contrast_with_apc_from_logits(final, mid, 0.1))[0].argmax() == 1


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_outside_its_range_is_a_value_error(alpha):
    with pytest.raises(ValueError, match="alpha"):
        contrast_with_apc_from_logits(*random_logits(0, 5), alpha)


@given(logits_pairs)
def test_jsd_is_symmetric_bounded_and_zero_for_equals(pair):
    log_p, log_q = (torch.log_softmax(x, -1) for x in pair)
    jsd = jsd_from_logprobs(log_p, log_q)
    vocab = log_p.shape[-1]
    assert_close(jsd, jsd_from_logprobs(log_q, log_p), terms=vocab)
    assert ((jsd >= 0) & (jsd <= math.log(2))).all()
    assert (jsd_from_logprobs(log_p, log_p) < float32_error(vocab)).all()
    p, q = (np.exp(log_softmax64(x.double().numpy())) for x in pair)
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_p, kl_q = (np.where(x > 0, x * np.log(x / m), 0).sum(-1) for x in (p, q))
    assert_close(jsd, (kl_p + kl_q) / 2, terms=1, size=max(float(x.abs().max()) for x in (log_p, log_q)))


def test_jsd_of_disjoint_distributions_is_ln_2():
    log_p = torch.tensor([0.0, -math.inf])
    assert_close(jsd_from_logprobs(log_p, log_p.flip(0)), math.log(2), terms=2)


def test_early_exit_takes_the_candidate_that_differs_most_per_row():
    log_qN = torch.log_softmax(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), -1)
    near, far = log_qN * 0.9, log_qN.flip(-1)
    candidates = torch.log_softmax(torch.stack([torch.stack([near[0], far[1]]), torch.stack([far[0], near[1]])]), -1)
    assert select_layer_by_jsd(log_qN, candidates).tolist() == [1, 0]


def test_early_exit_tells_candidates_apart_whose_divergence_is_ln_2_but_for_rounding():
    log_qN = torch.log_softmax(torch.tensor([[30.0, 0.0, 0.0]]), -1)
    shared = torch.tensor([2e-9, 1e-9, 3e-9])  # of the probability, with the last layer
    logits = torch.stack([shared.log(), torch.zeros(3), torch.full((3,), -30.0)], dim=-1)[:, None]
    candidates = torch.log_softmax(logits, -1)
    divergence = jsd_from_logprobs(log_qN, candidates)
    assert divergence.max() - divergence.min() < 2e-7
    assert select_layer_by_jsd(log_qN, candidates).tolist() == [1]
    assert select_layer_by_jsd(log_qN, candidates.flip(0)).tolist() == [1]


def test_readout_norms_once_and_reads_stacked_layers_like_single_ones():
    torch.manual_seed(0)
    phi, norm = torch.nn.Linear(8, 11), torch.nn.LayerNorm(8)
    h = torch.randn(4, 3, 8)
    expected = log_softmax64((phi(norm(h))).detach().double().numpy())
    got = compute_logprobs_from_hidden(h, norm, phi)
    assert_close(got, expected, terms_of(phi))
    assert_close(compute_logprobs_from_hidden(norm(h), None, phi), got, terms_of(phi))
    assert compute_logprobs_from_hidden(h.bfloat16(), norm.bfloat16(), phi.bfloat16()).dtype == torch.float32


def test_dola_static_from_hidden_reads_the_last_position_and_norms_only_the_earlier_layer():
    torch.manual_seed(0)
    phi, norm = torch.nn.Linear(8, 11), torch.nn.RMSNorm(8)
    hidden = [torch.randn(2, 5, 8) for _ in range(7)]
    got = dola_static_from_hidden(hidden, norm, phi, layer=4, alpha=0.1)
    expected = contrast_with_apc_from_logits(phi(hidden[-1][:, -1]), phi(norm(hidden[4][:, -1])), 0.1)
    assert_close(got, expected, terms_of(phi))
    bypass = dola_static_from_hidden(hidden, norm, phi, layer=6)
    assert_close(bypass, torch.log_softmax(phi(hidden[-1][:, -1]), -1), terms_of(phi))
    for layer in (0, 7, -1):
        with pytest.raises(ValueError, match=r"1\.\.6"):
            dola_static_from_hidden(hidden, norm, phi, layer=layer)


@given(st.integers(0, 10**6), st.floats(0, 20), alphas)
def test_guided_scores_keep_what_both_branches_keep_and_no_row_is_empty(seed, cfg_weight, alpha):
    final, mid = random_logits(seed, 9, rows=8)
    scores = contrast_with_apc_from_logits(final, mid, alpha)
    guided = guide_scores(scores, cfg_weight)
    cond, uncond = scores[0::2], scores[1::2]
    both = (cond > -math.inf) & (uncond > -math.inf)
    assert not guided.isnan().any()
    for row, kept in enumerate(both):
        if kept.any():
            assert torch.equal(guided[row] > -math.inf, kept)
            size = (cfg_weight + abs(1 - cfg_weight)) * float(torch.stack([cond, uncond])[:, row, kept].abs().max())
            assert_close(guided[row][kept], (uncond + cfg_weight * (cond - uncond))[row][kept], terms=1, size=size)
        else:
            assert torch.equal(guided[row], cond[row])
    p_hat = probs_from_scores(guided)
    assert_close(p_hat.sum(-1), torch.ones(4), terms=p_hat.shape[-1])


def test_guidance_pairs_even_and_odd_rows():
    logits = torch.tensor([[1.0], [0.0], [5.0], [4.0]])
    assert guide_logits(logits, 3.0).tolist() == [[3.0], [7.0]]


@pytest.mark.parametrize(
    ("layers", "ratio", "expected"), [(30, 0.8, 24), (24, 0.8, 19), (8, 0.8, 6), (2, 0, 1), (5, 1, 4)]
)
def test_the_static_layer_is_at_the_ratio_of_the_depth(layers, ratio, expected):
    assert pick_static_layer_index(layers, ratio) == expected


def test_a_ratio_or_depth_that_gives_no_layer_is_a_value_error():
    for arguments in ((30, 1.5), (30, -0.1), (1, 0.8), (31, True), (31, float("nan"))):  # True is no ratio of 1
        with pytest.raises(ValueError):
            pick_static_layer_index(*arguments)


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 40)), st.integers(2, 31))
def test_candidates_are_cleaned_to_sorted_layers_in_range(candidates, num_layers):
    expected = sorted({c for c in candidates if 1 <= c <= num_layers - 1})
    if expected:
        assert sanitize_candidate_layers(candidates, num_layers) == expected
    else:
        with pytest.raises(ValueError, match=rf"1\.\.{num_layers - 1}"):
            sanitize_candidate_layers(candidates, num_layers)


def test_contrasting_a_layer_with_itself_is_uniform_on_the_kept_tokens_not_the_baseline():
    log_q = torch.log_softmax(torch.tensor([2.0, 1.0, -9.0]), -1)
    p_hat = probs_from_scores(contrast_with_apc_from_logprobs(log_q, log_q, 0.1))
    assert_close(p_hat, [0.5, 0.5, 0.0], terms=3)


@given(logits_pairs, st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]), st.sampled_from([0.0, 0.1, 0.5]))
def test_gamma_weighs_the_contrast_and_0_leaves_the_mask_alone(pair, gamma, alpha):
    final, mid = pair
    log_qN, log_qj = log_softmax64(final.double().numpy()), log_softmax64(mid.double().numpy())
    kept = np.exp(log_qN) >= alpha * np.exp(log_qN).max(-1, keepdims=True)
    F = contrast_with_apc_from_logits(final, mid, alpha, gamma).double().numpy()
    scale = np.abs(log_qN).max() + abs(gamma) * np.abs(log_qj).max()
    certain = np.abs(np.exp(log_qN) - alpha * np.exp(log_qN).max(-1, keepdims=True)) > 1e-5  # rounding may flip others
    assert ((F > -np.inf) == kept)[certain].all()
    both = kept & (F > -np.inf)
    assert np.abs(F - (log_qN - gamma * log_qj))[both].max() <= 8 * np.finfo(np.float32).eps * (1 + scale)
    if gamma == 0:
        assert torch.equal(
            contrast_layers(torch.log_softmax(final, -1), final[:0, None], alpha)[0][both],
            torch.log_softmax(final, -1)[both],
        )


def test_contrast_layers_is_static_with_one_layer_early_exit_with_several_and_the_mask_with_none():
    log_q = torch.log_softmax(4 * torch.randn(5, 6, 40, generator=torch.Generator().manual_seed(0)), -1)
    log_qN, log_qj = log_q[0], log_q[1:]
    F, chosen, choice = contrast_layers(log_qN, log_qj[:1], 0.2, 0.7)
    assert torch.equal(F, contrast_with_apc_from_logprobs(log_qN, log_qj[0], 0.2, 0.7)) and choice is None
    assert torch.equal(chosen, log_qj[0])
    F, chosen, choice = contrast_layers(log_qN, log_qj, 0.2)
    assert (
        choice is not None
        and torch.equal(choice, select_layer_by_jsd(log_qN, log_qj))
        and len(set(choice.tolist())) > 1
    )
    for row, layer in enumerate(choice.tolist()):
        assert torch.equal(chosen[row], log_qj[layer, row])
        assert torch.equal(F[row], contrast_with_apc_from_logprobs(log_qN[row], log_qj[layer, row], 0.2))
    F, chosen, choice = contrast_layers(log_qN, log_qj[:0], 0.2, 1.0)
    assert torch.equal(F, log_qN.masked_fill(~apc_mask(log_qN, 0.2), -math.inf)) and choice is None
    assert torch.equal(chosen, log_qN)


def test_layers_are_picked_by_number_by_ratio_or_as_candidates_and_the_last_is_the_bypass():
    assert pick_contrast_layers(30) == (24,) and pick_contrast_layers(30, layer_ratio=0.5) == (15,)
    assert pick_contrast_layers(30, 7) == (7,) and pick_contrast_layers(30, 30) == ()
    assert pick_contrast_layers(30, candidate_layers=[28, 22, 99]) == (22, 28)
    with pytest.raises(ValueError, match="give layer or candidate_layers, not both"):
        pick_contrast_layers(30, 7, candidate_layers=[22])


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_alpha, (0, 1, 0.5, np.float32(0.1)), (-0.1, 1.1, math.nan, True, "0.1", None)),
        (check_gamma, (-1, 0, 1, 100), (101, math.inf, math.nan, False)),
        (check_temperature, (1e-6, 1, 1e6), (0, -1, 1e-320, math.inf, math.nan)),
        (check_cfg_weight, (0, 5, 1e6), (-1, 1e39, math.inf, math.nan)),
        (lambda layer: check_layer(layer, 6), (1, 6, np.int64(3)), (0, 7, True, 2.0, "3", None)),
    ],
)
def test_numbers_outside_their_range_and_what_is_no_number_are_value_errors(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match="must be in"):
            check(value)


def test_within_the_bounds_of_guidance_and_temperature_no_probability_overflows():
    logits = 1e4 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    guided = guide_logits(logits, 1e6)
    assert torch.softmax(guided / 1e-6, -1).isfinite().all() and probs_from_scores(guided, 1e-6).isfinite().all()


def test_a_trace_tells_the_top_k_and_the_divergence():
    final, mid = random_logits(3, 50)
    p_hat = probs_from_scores(contrast_with_apc_from_logits(final, mid))
    traced = trace_step(final + 7, mid - 5, p_hat, top_k=4)
    for name, p in (("q_N", final.softmax(-1)), ("q_j", mid.softmax(-1)), ("p_hat", p_hat)):
        size = float(final.abs().max() + mid.abs().max())
        assert_close(traced[name], p.topk(4)[0], terms=1, size=size)
        assert_close(p.gather(-1, traced[f"{name}_tokens"]), traced[name], terms=1, size=size)
    assert_close(traced["jsd"], jsd_from_logprobs(final.log_softmax(-1), p_hat.log()), terms=1, size=size)
