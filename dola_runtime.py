"""DoLa arithmetic (Chuang et al., ICLR 2024, https://arxiv.org/abs/2309.03883): pure functions on tensors.

Layers are counted as transformers' `hidden_states` counts them: 0 is the embedding output, j the output of block j,
N the output of the last block. Everything is computed in float32, in the log domain, whatever the model's dtype.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG_ZERO = -1e4
"""Stands for log 0 of a contrast layer, so that a token only the last layer allows gets a large, finite score."""


def compute_logprobs_from_hidden(h: Tensor, ln_out: Callable[[Tensor], Tensor] | None, phi: Callable) -> Tensor:
    """Read hidden states `[..., width]` as log-probabilities `[..., vocab]`: `log_softmax(phi(LN_out(h)))`.

    Pass `ln_out=None` for a state that is normed already (transformers' `hidden_states[-1]` is), or to read an earlier
    layer without the norm as the DoLa paper's code does. Layers stacked in `h` go through `phi` in one matmul.
    """
    return torch.log_softmax(phi(h if ln_out is None else ln_out(h)).float(), dim=-1)


def apc_mask(log_qN: Tensor, alpha: float) -> Tensor:
    """Adaptive plausibility constraint (paper, eq. 4): `log q_N >= log(alpha) + max log q_N`, as bools `[..., vocab]`.

    The argmax is always kept; `alpha=0` keeps every token of non-zero probability. Raises ValueError for an alpha
    outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    return (log_qN >= log_alpha + log_qN.amax(-1, keepdim=True)) & (log_qN > -math.inf)


def contrast_with_apc_from_logprobs(log_qN: Tensor, log_qj: Tensor, alpha: float = 0.1) -> Tensor:
    """DoLa scores `F = log q_N - log q_j` on the plausible tokens, -inf elsewhere (paper, eq. 3); `[..., vocab]`.

    `probs_from_scores(F, temperature)` turns them into p_hat. Raises ValueError for an alpha outside [0, 1].
    """
    log_qN, log_qj = log_qN.float(), log_qj.float()
    ratio = log_qN - log_qj.masked_fill(log_qj == -math.inf, LOG_ZERO)
    return ratio.masked_fill(~apc_mask(log_qN, alpha), -math.inf)


def contrast_with_apc_from_logits(final_logits: Tensor, mid_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """`contrast_with_apc_from_logprobs` of the log-softmax of two logits `[..., vocab]`."""
    log_qN, log_qj = (torch.log_softmax(logits.float(), dim=-1) for logits in (final_logits, mid_logits))
    return contrast_with_apc_from_logprobs(log_qN, log_qj, alpha)


def dola_static_from_hidden(
    hidden_states: Sequence[Tensor],
    ln_out: Callable[[Tensor], Tensor] | None,
    phi: Callable,
    layer: int,
    alpha: float = 0.1,
) -> Tensor:
    """DoLa scores `[batch, vocab]` at the last position of transformers' `hidden_states` (N+1 of `[batch, T, width]`).

    The last entry is taken as normed already, as transformers gives it. `layer=N` is the bypass: log q_N itself.
    Raises ValueError for a layer outside 1..N.
    """
    num_layers = len(hidden_states) - 1
    if not 1 <= layer <= num_layers:
        raise ValueError(f"layer must be in 1..{num_layers}, got {layer}")
    h_N = hidden_states[-1][:, -1]
    if layer == num_layers:
        return compute_logprobs_from_hidden(h_N, None, phi)
    h_j = hidden_states[layer][:, -1]
    h = torch.stack([h_N, h_j if ln_out is None else ln_out(h_j)])
    log_qN, log_qj = compute_logprobs_from_hidden(h, None, phi)
    return contrast_with_apc_from_logprobs(log_qN, log_qj, alpha)


def guide_logits(logits: Tensor, cfg_weight: float) -> Tensor:
    """Classifier-free guidance `uncond + w * (cond - uncond)`: `[..., 2 * rows, vocab]` -> `[..., rows, vocab]`.

    Conditional and unconditional rows alternate, the conditional one first.
    """
    cond, uncond = logits[..., 0::2, :], logits[..., 1::2, :]
    return uncond + cfg_weight * (cond - uncond)


def guide_scores(scores: Tensor, cfg_weight: float) -> Tensor:
    """Guide DoLa scores that were contrasted per branch: `[..., 2 * rows, vocab]` -> `[..., rows, vocab]`.

    A token masked (-inf) in either branch stays masked; a row where no token survives both takes the conditional
    branch's scores.
    """
    kept = (scores[..., 0::2, :] > -math.inf) & (scores[..., 1::2, :] > -math.inf)
    guided = guide_logits(scores, cfg_weight).masked_fill(~kept, -math.inf)
    return torch.where(kept.any(-1, keepdim=True), guided, scores[..., 0::2, :])


def probs_from_scores(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """`p_hat = softmax(F / temperature)`, `[..., vocab]`; the maximum comes off first, so no temperature overflows."""
    return torch.softmax((scores - scores.amax(-1, keepdim=True)) / temperature, dim=-1)


def pick_static_layer_index(num_layers: int, ratio: float = 0.8) -> int:
    """The layer at `ratio` of the depth, within 1..num_layers-1. Raises ValueError for a ratio outside [0, 1]."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"layer_ratio must be in [0, 1], got {ratio}")
    if num_layers < 2:
        raise ValueError(f"a contrast layer needs a model of at least 2 layers, got {num_layers}")
    return min(max(round(ratio * num_layers), 1), num_layers - 1)


def sanitize_candidate_layers(candidate_layers: Iterable[int], num_layers: int) -> list[int]:
    """The candidates within 1..num_layers-1, sorted, without repeats. Raises ValueError if none is left."""
    given = list(candidate_layers)
    kept = sorted({int(layer) for layer in given if 1 <= layer < num_layers})
    if not kept:
        raise ValueError(f"candidate_layers {given} hold no layer in 1..{num_layers - 1}")
    return kept


def jsd_from_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of two log-distributions `[..., vocab]`: `[...]` in [0, ln 2]."""
    log_p, log_q = log_p.float(), log_q.float()
    log_m = torch.logaddexp(log_p, log_q) - LN2
    kl_p, kl_q = (
        torch.where(log_x > -math.inf, log_x.exp() * (log_x - log_m), 0.0).sum(-1) for log_x in (log_p, log_q)
    )
    return (0.5 * (kl_p + kl_q)).clamp(0.0, LN2)


def select_layer_by_jsd(log_qN: Tensor, log_qj: Tensor) -> Tensor:
    """Early exit (paper, eq. 2): the candidate that differs most from the last layer, per row.

    `log_qN` is `[batch, vocab]`, `log_qj` `[candidates, batch, vocab]`; returns indices into the candidates, `[batch]`.
    """
    return jsd_from_logprobs(log_qN, log_qj).argmax(dim=0)
