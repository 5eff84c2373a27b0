"""Scores of given tokens against plain log-probabilities, one layer, alpha and continuation at a time."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from janus.dola import scoring
from janus.dola.scoring import ContinuationScores, fill_dropped, score_continuations
from tolerance import assert_close, terms_of

LAYERS, ALPHAS = [5, 1, 2], (0.0, 0.1, 0.6)
PREFIX = torch.tensor([3, 14, 15, 92, 65])
CONTINUATIONS = [torch.tensor(ids) for ids in ([35, 89, 79], [35, 89, 80, 32], [35, 89], [6])]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def plain_log_probs(model, ids: Tensor, layer: int, alpha: float, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log q_N, log q_j and log p_hat of every token at the places that predict `ids`: `[T, vocab]` each."""
    hidden = model(torch.cat([PREFIX, ids])[None], output_hidden_states=True).hidden_states
    h_N, h_j = (hidden[i][0, len(PREFIX) - 1 : -1] for i in (-1, layer))
    log_qN = model.lm_head(h_N).log_softmax(-1)
    log_qj = model.lm_head(model.model.norm(h_j) if norm else h_j).log_softmax(-1)
    plausible = log_qN.exp() >= alpha * log_qN.exp().amax(-1, keepdim=True)
    return log_qN, log_qj, torch.where(plausible, log_qN - log_qj, -math.inf).log_softmax(-1)


def largest(*log_probs: Tensor) -> float:
    return max(float(log_p[log_p > -math.inf].abs().max()) for log_p in log_probs)


def rank_of(log_p: Tensor, ids: Tensor) -> list[int]:
    return [1 + int((row > row[token]).sum()) for row, token in zip(log_p, ids.tolist(), strict=True)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("alphas", [ALPHAS, ALPHAS[1:]], ids=["whole vocabulary", "plausible columns"])
def test_every_layer_and_alpha_equals_a_pass_of_its_own(llama, alphas, norm):
    scored = score_continuations(llama, PREFIX, CONTINUATIONS, layers=LAYERS, alphas=alphas, norm=norm)
    dropped = 0
    for ids, scores in zip(CONTINUATIONS, scored, strict=True):
        tokens = torch.arange(len(ids))
        for i, layer in enumerate(LAYERS):
            for a, alpha in enumerate(alphas):
                log_qN, log_qj, log_p = plain_log_probs(llama, ids, layer, alpha, norm)
                assert_close(scores.baseline.log_p, log_qN[tokens, ids], terms_of(llama), largest(log_qN))
                assert_close(scores.static.log_p[a, i], log_p[tokens, ids], terms_of(llama), largest(log_qN, log_qj))
                assert scores.baseline.rank.tolist() == rank_of(log_qN, ids)
                assert scores.static.rank[a, i].tolist() == rank_of(log_p, ids)
                dropped += int((log_p[tokens, ids] == -math.inf).sum())
    assert dropped > 0


def test_early_exit_takes_the_layer_furthest_from_the_last_at_each_token(llama):
    continuations = [*CONTINUATIONS, torch.arange(20, 50)]
    scored = score_continuations(llama, PREFIX, continuations, layers=LAYERS, alphas=ALPHAS, overlap=True)
    chosen = set()
    for ids, scores in zip(continuations, scored, strict=True):
        early = scores.early_exit([1, 2])
        for t in range(len(ids)):
            divergence = {}
            for layer in (1, 2):
                log_qN, log_qj, _ = plain_log_probs(llama, ids, layer, 0.1, True)
                p, q = (x[t].double().exp() for x in (log_qN, log_qj))
                m = (p + q) / 2
                divergence[layer] = float((p * (p / m).log() + q * (q / m).log()).sum()) / 2
                assert scores.overlap is not None
                jsd = math.log(2) - scores.overlap[LAYERS.index(layer), t] / 2
                assert_close(jsd, divergence[layer], terms_of(llama), largest(log_qN, log_qj))
            layer = max(divergence, key=divergence.__getitem__)
            chosen.add(layer)
            for a in range(len(ALPHAS)):
                assert early.log_p[a, t] == scores.static.log_p[a, LAYERS.index(layer), t]
    assert chosen == {1, 2}


def assert_same(one: ContinuationScores, other: ContinuationScores, terms: int) -> None:
    for a, b in ((one.baseline, other.baseline), (one.static, other.static)):
        assert_close(a.log_p, b.log_p, terms)
        assert torch.equal(a.rank, b.rank)


def test_slices_batches_and_embeddings_change_nothing(llama, monkeypatch):
    together = score_continuations(llama, PREFIX, CONTINUATIONS, layers=LAYERS, alphas=ALPHAS)
    embedded = llama.get_input_embeddings()(PREFIX).detach()
    for ids, scores in zip(CONTINUATIONS, together, strict=True):
        alone = score_continuations(llama, embedded, [ids], layers=LAYERS, alphas=ALPHAS)[0]
        assert_same(alone, scores, terms_of(llama))
    monkeypatch.setattr(scoring, "SLICE_ELEMENTS", 1)
    for scores, sliced in zip(
        together, score_continuations(llama, PREFIX, CONTINUATIONS, layers=LAYERS, alphas=ALPHAS), strict=True
    ):
        assert_same(sliced, scores, terms_of(llama))


def test_a_dropped_token_is_minus_infinity_until_it_is_filled():
    log_p = torch.tensor([-0.5, -math.inf, -1.0])
    assert fill_dropped(log_p).tolist() == [-0.5, -1000.0, -1.0]
    assert fill_dropped(log_p, torch.tensor([-3.0, -4.0, -5.0])).tolist() == [-0.5, -4.0, -1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [6]}, r"1\.\.5"),
        ({"layers": [2, 2]}, "different"),
        ({"alphas": [1.5]}, "alpha must be in"),
        ({"continuations": [torch.tensor([], dtype=torch.long)]}, "none may be empty"),
        ({"prefix": PREFIX[:0]}, "prefix of 0 tokens"),
    ],
)
def test_bad_input_is_named(llama, change, message):
    arguments = {"prefix": PREFIX, "continuations": CONTINUATIONS, "layers": [2]} | change
    with pytest.raises(ValueError, match=message):
        score_continuations(llama, **arguments)
    scores = score_continuations(llama, PREFIX, CONTINUATIONS[:1], layers=[2, 4])[0]
    with pytest.raises(ValueError, match="needs overlap=True"):
        scores.early_exit([2, 4])
