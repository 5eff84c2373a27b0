"""DoLa arithmetic (Chuang et al., ICLR 2024, https://arxiv.org/abs/2309.03883): pure functions on tensors.

Layers are counted as transformers' `hidden_states` counts them: 0 is the embedding output, j the output of block j,
N the output of the last block. Everything is computed in float32, in the log domain, whatever the model's dtype.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn.functional import softplus

DEFAULT_ALPHA = 0.1
DEFAULT_LAYER_RATIO = 0.8

LN2 = math.log(2.0)
LOG_ZERO = -1e4
"""Stands for log 0 of a contrast layer, so that a token only the last layer allows gets a large, finite score."""

# --- checks ----------------------------------------------------------------------------------------------------------


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError for anything but a number in [low, high]; True and False are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")


def check_alpha(alpha: float, name: str = "alpha") -> None:
    check_number(name, alpha, 0.0, 1.0)


def check_gamma(gamma: float, name: str = "gamma") -> None:
    check_number(name, gamma, -100.0, 100.0)


def check_temperature(temperature: float) -> None:
    """Within these bounds, and those of `check_cfg_weight`, guided logits stay far from float32's ends."""
    check_number("temperature", temperature, 1e-6, 1e6)


def check_cfg_weight(cfg_weight: float) -> None:
    check_number("cfg_weight", cfg_weight, 0.0, 1e6)


def check_layer(layer: int, num_layers: int) -> None:
    """Raises ValueError for anything but a whole number in 1..num_layers; num_layers is the bypass."""
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 1 <= layer <= num_layers:
        raise ValueError(f"layer must be in 1..{num_layers}, got {layer!r}")


# --- readout and contrast --------------------------------------------------------------------------------------------


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
    check_alpha(alpha)
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    return (log_qN >= log_alpha + log_qN.amax(-1, keepdim=True)) & (log_qN > -math.inf)


def contrast_with_apc_from_logprobs(
    log_qN: Tensor, log_qj: Tensor, alpha: float = DEFAULT_ALPHA, gamma: float = 1.0
) -> Tensor:
    """DoLa scores `F = log q_N - gamma * log q_j` on the plausible tokens, -inf elsewhere; all `[..., vocab]`.

    Source: paper, eq. 3, with a weight: gamma 1 is DoLa, 0 leaves the mask alone, below 0 adds the earlier layer. F is
    not normalised: `probs_from_scores(F, temperature)` makes p_hat of it. Raises ValueError for an alpha or gamma out
    of range.
    """
    check_gamma(gamma)
    log_qN, log_qj = log_qN.float(), log_qj.float()
    ratio = log_qN - gamma * log_qj.masked_fill(log_qj == -math.inf, LOG_ZERO)
    return ratio.masked_fill(~apc_mask(log_qN, alpha), -math.inf)


def contrast_layers(
    log_qN: Tensor, log_qj: Tensor, alpha: float = DEFAULT_ALPHA, gamma: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contrast the last layer `[rows, vocab]` with those of `log_qj` `[layers, rows, vocab]`: one is DoLa-static.

    Several are early exit's candidates: each row takes the one that differs most from the last layer. None leaves
    the mask alone, whatever gamma. Returns the scores F, the log q_j that each row was contrasted with (log q_N where
    none was), both `[rows, vocab]`, and early exit's choice, indices `[rows]` into the layers, else None.
    """
    choice = None
    if len(log_qj) == 0:
        chosen, gamma = log_qN, 0.0
    elif len(log_qj) == 1:
        chosen = log_qj[0]
    else:
        choice = select_layer_by_jsd(log_qN, log_qj)
        chosen = log_qj.take_along_dim(choice[None, :, None], dim=0)[0]
    return contrast_with_apc_from_logprobs(log_qN, chosen, alpha, gamma), chosen, choice


def contrast_with_apc_from_logits(
    final_logits: Tensor, mid_logits: Tensor, alpha: float = DEFAULT_ALPHA, gamma: float = 1.0
) -> Tensor:
    """`contrast_with_apc_from_logprobs` of the log-softmax of two logits `[..., vocab]`."""
    log_qN, log_qj = (torch.log_softmax(logits.float(), dim=-1) for logits in (final_logits, mid_logits))
    return contrast_with_apc_from_logprobs(log_qN, log_qj, alpha, gamma)


def dola_static_from_hidden(
    hidden_states: Sequence[Tensor],
    ln_out: Callable[[Tensor], Tensor] | None,
    phi: Callable,
    layer: int,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
) -> Tensor:
    """DoLa scores `[batch, vocab]` at the last position of transformers' `hidden_states` (N+1 of `[batch, T, width]`).

    The last entry is taken as normed already, as transformers gives it. `layer=N` is the bypass: log q_N itself.
    Raises ValueError for a layer outside 1..N.
    """
    num_layers = len(hidden_states) - 1
    check_layer(layer, num_layers)
    h_N = hidden_states[-1][:, -1]
    if layer == num_layers:
        return compute_logprobs_from_hidden(h_N, None, phi)
    h_j = hidden_states[layer][:, -1]
    h = torch.stack([h_N, h_j if ln_out is None else ln_out(h_j)])
    log_qN, log_qj = compute_logprobs_from_hidden(h, None, phi)
    return contrast_with_apc_from_logprobs(log_qN, log_qj, alpha, gamma)


# --- guidance and sampling -------------------------------------------------------------------------------------------


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


# --- layers ----------------------------------------------------------------------------------------------------------


def pick_static_layer_index(num_layers: int, ratio: float = DEFAULT_LAYER_RATIO) -> int:
    """The layer at `ratio` of the depth, within 1..num_layers-1. Raises ValueError for a ratio outside [0, 1]."""
    check_number("layer_ratio", ratio, 0.0, 1.0)
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


def pick_contrast_layers(
    num_layers: int,
    layer: int | None = None,
    layer_ratio: float = DEFAULT_LAYER_RATIO,
    candidate_layers: Iterable[int] | None = None,
) -> tuple[int, ...]:
    """The layers to contrast with: early exit's candidates, else the fixed layer, given or by ratio.

    `layer=num_layers` is the bypass, and gives none. Raises ValueError for a layer or ratio out of range, for
    candidates of which none is a layer, and for a layer beside candidates.
    """
    if candidate_layers is not None:
        if layer is not None:
            raise ValueError(f"give layer or candidate_layers, not both: got {layer} and {list(candidate_layers)}")
        return tuple(sanitize_candidate_layers(candidate_layers, num_layers))
    if layer is None:
        layer = pick_static_layer_index(num_layers, layer_ratio)
    check_layer(layer, num_layers)
    return () if layer == num_layers else (layer,)


def jsd_from_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of two log-distributions `[..., vocab]`: `[...]` in [0, ln 2]."""
    log_p, log_q = log_p.float(), log_q.float()
    log_m = torch.logaddexp(log_p, log_q) - LN2
    kl_p, kl_q = (
        torch.where(log_x > -math.inf, log_x.exp() * (log_x - log_m), 0.0).sum(-1) for log_x in (log_p, log_q)
    )
    return (0.5 * (kl_p + kl_q)).clamp(0.0, LN2)


def overlap_from_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`2 (ln 2 - JSD)` of two log-distributions `[..., vocab]`, in nats: `[...]` in [0, 2 ln 2].

    Where several JSD are ln 2 but for rounding, it still tells them apart.
    """
    log_p, log_q = log_p.float(), log_q.float()
    shared = log_p.exp() * softplus(log_q - log_p) + log_q.exp() * softplus(log_p - log_q)
    return shared.nan_to_num(0.0).sum(-1)  # NaN where either probability is 0


def select_layer_by_jsd(log_qN: Tensor, log_qj: Tensor) -> Tensor:
    """Early exit (paper, eq. 2): the candidate that differs most from the last layer, per row.

    `log_qN` is `[batch, vocab]`, `log_qj` `[candidates, batch, vocab]`; returns indices into the candidates, `[batch]`.
    """
    return overlap_from_logprobs(log_qN, log_qj).argmin(dim=0)


# --- diagnosis -------------------------------------------------------------------------------------------------------


def trace_step(log_qN: Tensor, log_qj: Tensor, p_hat: Tensor, top_k: int = 5) -> dict[str, Tensor]:
    """One step for diagnosis; all three are `[rows, vocab]`, log_qN and log_qj up to a constant per row.

    Of each of `q_N`, `q_j` and `p_hat` the top-k probabilities `[rows, k]`, with their tokens under `q_N_tokens` and so
    on; `jsd` `[rows]`, the divergence of p_hat from q_N in nats.
    """
    log_qN, log_qj = (torch.log_softmax(log_q.float(), dim=-1) for log_q in (log_qN, log_qj))
    traced = {"jsd": jsd_from_logprobs(log_qN, p_hat.log())}
    for name, p in (("q_N", log_qN.exp()), ("q_j", log_qj.exp()), ("p_hat", p_hat)):
        traced[name], traced[f"{name}_tokens"] = p.topk(min(top_k, p.shape[-1]))
    return traced


def top_pairs(traced: dict[str, Tensor], name: str, row: int) -> list[tuple[int, float]]:
    """The (token, probability) pairs of one row under one of the names of `trace_step`, best first."""
    return list(zip(traced[f"{name}_tokens"][row].tolist(), traced[name][row].tolist(), strict=True))
