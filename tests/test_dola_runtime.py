import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dola_runtime import (
    apc_mask,
    compute_logprobs_from_hidden,
    contrast_with_apc_from_logits,
    contrast_with_apc_from_logprobs,
    dola_static_from_hidden,
    guide_logits,
    guide_scores,
    jsd_from_logprobs,
    pick_static_layer_index,
    probs_from_scores,
    sanitize_candidate_layers,
    select_layer_by_jsd,
)

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
    log_qN = log_softmax64(final)
    margin = np.abs(np.exp(log_qN) - alpha * np.exp(log_qN).max(-1, keepdims=True))
    if (margin[margin > 0] < 1e-6 * np.exp(log_qN).max()).any():
        return  # a token on the threshold may fall on either side of it in float32
    got = probs_from_scores(contrast_with_apc_from_logits(pair[0], pair[1], alpha), temperature)
    np.testing.assert_allclose(got.numpy(), p_hat64(final, mid, alpha, temperature), atol=2e-4)


@given(logits_pairs, alphas, temperatures, st.sampled_from(DTYPES))
def test_p_hat_sums_to_one_and_is_zero_exactly_off_the_apc_set(pair, alpha, temperature, dtype):
    final, mid = (x.to(dtype) for x in pair)
    F = contrast_with_apc_from_logits(final, mid, alpha)
    kept = apc_mask(torch.log_softmax(final.float(), -1), alpha)
    p_hat = probs_from_scores(F, temperature)
    assert F.dtype == p_hat.dtype == torch.float32
    assert torch.equal(F > -math.inf, kept)
    assert (p_hat[~kept] == 0).all()
    torch.testing.assert_close(p_hat.sum(-1), torch.ones(len(p_hat)))
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
    torch.testing.assert_close(moved[both], plain[both], atol=2e-4, rtol=1e-4)
    differing = (moved > -math.inf) != (plain > -math.inf)
    log_q = torch.log_softmax(final, -1)
    threshold = math.log(max(alpha, 1e-300)) + log_q.amax(-1, keepdim=True)
    assert ((log_q - threshold).abs()[differing] < 1e-3).all()  # only on the threshold itself


@pytest.mark.parametrize("vocab", [1, 16384, 102400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_vocabulary_of_the_family_gives_a_distribution(vocab, dtype):
    final, mid = (x.to(dtype) for x in random_logits(1, vocab, rows=2, scale=10))
    p_hat = probs_from_scores(contrast_with_apc_from_logits(final, mid, 0.1), 0.7)
    torch.testing.assert_close(p_hat.sum(-1), torch.ones(2))


def test_rows_with_minus_infinity_stay_finite_and_forbidden():
    inf = math.inf
    final = torch.tensor([[2.0, 1.9, -inf, -inf], [0.0, -inf, -inf, -inf]])
    mid = torch.tensor([[1.0, -inf, 3.0, -inf], [-inf, 0.0, -inf, -inf]])
    for alpha in (0.0, 0.1, 1.0):
        p_hat = probs_from_scores(contrast_with_apc_from_logits(final, mid, alpha), 1.0)
        assert torch.isfinite(p_hat).all()
        assert (p_hat[final == -inf] == 0).all()
        torch.testing.assert_close(p_hat.sum(-1), torch.ones(2))
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
    torch.testing.assert_close(jsd, jsd_from_logprobs(log_q, log_p))
    assert ((jsd >= 0) & (jsd <= math.log(2))).all()
    assert (jsd_from_logprobs(log_p, log_p) < 1e-6).all()
    p, q = (np.exp(log_softmax64(x.double().numpy())) for x in pair)
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_p, kl_q = (np.where(x > 0, x * np.log(x / m), 0).sum(-1) for x in (p, q))
    np.testing.assert_allclose(jsd.numpy(), (kl_p + kl_q) / 2, atol=2e-5)


def test_jsd_of_disjoint_distributions_is_ln_2():
    log_p = torch.tensor([0.0, -math.inf])
    torch.testing.assert_close(jsd_from_logprobs(log_p, log_p.flip(0)), torch.tensor(math.log(2)))


def test_early_exit_takes_the_candidate_that_differs_most_per_row():
    log_qN = torch.log_softmax(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), -1)
    near, far = log_qN * 0.9, log_qN.flip(-1)
    candidates = torch.log_softmax(torch.stack([torch.stack([near[0], far[1]]), torch.stack([far[0], near[1]])]), -1)
    assert select_layer_by_jsd(log_qN, candidates).tolist() == [1, 0]


def test_readout_norms_once_and_reads_stacked_layers_like_single_ones():
    torch.manual_seed(0)
    phi, norm = torch.nn.Linear(8, 11), torch.nn.LayerNorm(8)
    h = torch.randn(4, 3, 8)
    expected = log_softmax64((phi(norm(h))).detach().double().numpy())
    got = compute_logprobs_from_hidden(h, norm, phi)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-5)
    torch.testing.assert_close(compute_logprobs_from_hidden(norm(h), None, phi), got)
    assert compute_logprobs_from_hidden(h.bfloat16(), norm.bfloat16(), phi.bfloat16()).dtype == torch.float32


def test_dola_static_from_hidden_reads_the_last_position_and_norms_only_the_earlier_layer():
    torch.manual_seed(0)
    phi, norm = torch.nn.Linear(8, 11), torch.nn.RMSNorm(8)
    hidden = [torch.randn(2, 5, 8) for _ in range(7)]
    got = dola_static_from_hidden(hidden, norm, phi, layer=4, alpha=0.1)
    expected = contrast_with_apc_from_logits(phi(hidden[-1][:, -1]), phi(norm(hidden[4][:, -1])), 0.1)
    torch.testing.assert_close(got, expected)
    bypass = dola_static_from_hidden(hidden, norm, phi, layer=6)
    torch.testing.assert_close(bypass, torch.log_softmax(phi(hidden[-1][:, -1]), -1))
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
            torch.testing.assert_close(guided[row][kept], (uncond + cfg_weight * (cond - uncond))[row][kept])
        else:
            assert torch.equal(guided[row], cond[row])
    p_hat = probs_from_scores(guided)
    torch.testing.assert_close(p_hat.sum(-1), torch.ones(4))


def test_guidance_pairs_even_and_odd_rows():
    logits = torch.tensor([[1.0], [0.0], [5.0], [4.0]])
    assert guide_logits(logits, 3.0).tolist() == [[3.0], [7.0]]


@pytest.mark.parametrize(
    ("layers", "ratio", "expected"), [(30, 0.8, 24), (24, 0.8, 19), (8, 0.8, 6), (2, 0, 1), (5, 1, 4)]
)
def test_the_static_layer_is_at_the_ratio_of_the_depth(layers, ratio, expected):
    assert pick_static_layer_index(layers, ratio) == expected


def test_a_ratio_or_depth_that_gives_no_layer_is_a_value_error():
    for arguments in ((30, 1.5), (30, -0.1), (1, 0.8)):
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
    torch.testing.assert_close(p_hat, torch.tensor([0.5, 0.5, 0.0]))
