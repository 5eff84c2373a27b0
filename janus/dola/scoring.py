"""What baseline, DoLa-static and early exit say of given tokens: every layer and alpha from one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dola_runtime import (
    apc_mask,
    compute_logprobs_from_hidden,
    contrast_with_apc_from_logprobs,
    overlap_from_logprobs,
    sanitize_candidate_layers,
)
from janus.dola.decoder_parts import find_decoder_parts

SLICE_ELEMENTS = 2**25
"""Bound on layers x places x vocab that are read at a time: 128 MiB of float32, and a few times that in passing."""
SLICE_PLACES = 64
"""Bound on places that are read at a time: what is plausible at any of them is read at all of them."""
DROPPED = -1000.0
"""What the DoLa paper's evaluation takes for the log-probability of a token outside the plausible set."""


class TokenScores(NamedTuple):
    """Of each true token, `[..., T]`: its float32 log-probability, and 1 + the number of more probable tokens.

    A token that APC drops has log-probability -inf and ranks after every kept one; rank 1 is the top-1.
    """

    log_p: Tensor
    rank: Tensor


@dataclass
class ContinuationScores:
    """One continuation of T tokens under every decoding, for A alphas and L layers.

    `baseline` holds `[T]` of log q_N, `apc_only` `[A, T]` of q_N renormalised on the tokens that APC keeps (the mask
    without the contrast), `static` `[A, L, T]` of log p_hat, and `overlap` `[L, T]` of each layer with the last one, 2
    (ln 2 - JSD) in nats (None unless asked for).
    """

    layers: list[int]
    baseline: TokenScores
    apc_only: TokenScores
    static: TokenScores
    overlap: Tensor | None

    def early_exit(self, candidate_layers: Sequence[int]) -> TokenScores:
        """`[A, T]` with, at each token, the candidate that diverges most from the last layer.

        Raises ValueError for a candidate that was not scored, or where `overlap` was not asked for.
        """
        if self.overlap is None or not set(candidate_layers) <= set(self.layers):
            wanted = f"needs overlap=True and these among {self.layers}"
            raise ValueError(f"early exit over {list(candidate_layers)} {wanted}")
        rows = torch.tensor([self.layers.index(layer) for layer in candidate_layers], device=self.overlap.device)
        chosen = rows[self.overlap[rows].argmin(0)]
        return TokenScores(*(x[:, chosen, torch.arange(x.shape[-1], device=x.device)] for x in self.static))


def fill_dropped(log_p: Tensor, fill: float | Tensor = DROPPED) -> Tensor:
    """Put `fill` where APC dropped the true token, so that continuations can be summed and compared.

    log p_hat of a dropped token is -inf, and a continuation with one such token would be worth as little as one with
    twenty. The default compares the number of dropped tokens first and log p_hat after, as the paper's evaluation does;
    the baseline's log q_N, which is finite for every token, grades the dropped ones as the model does without DoLa.
    """
    return torch.where(log_p > -torch.inf, log_p, fill)


def score_tokens(scores: Tensor, targets: Tensor) -> TokenScores:
    """Score `targets` `[T]` under `softmax(scores)`, scores `[..., T, vocab]` up to a constant per row: `[..., T]`."""
    target = scores.gather(-1, targets.expand(scores.shape[:-1])[..., None])
    return TokenScores(
        (target - scores.logsumexp(-1, keepdim=True)).squeeze(-1), 1 + torch.count_nonzero(scores > target, dim=-1)
    )


def score_contrasts(log_qN: Tensor, log_qj: Tensor, targets: Tensor, alphas: Sequence[float]) -> TokenScores:
    """Score `targets` `[T]` under p_hat of L layers and A alphas at once: `[A, L, T]`.

    `log_qN` is `[T, vocab]`; `log_qj` `[L, T, vocab]` may be off by a constant per row, which p_hat does not see. Each
    alpha is read on the columns that it keeps in some row, a small part of the vocabulary unless alpha is 0.
    """
    scores = []
    for alpha in alphas:
        columns = plausible_columns(log_qN, targets, alpha)
        if len(columns) == log_qN.shape[-1]:
            F, column_of_target = contrast_with_apc_from_logprobs(log_qN, log_qj, alpha), targets
        else:
            F = contrast_with_apc_from_logprobs(log_qN[:, columns], log_qj[..., columns], alpha)
            column_of_target = torch.searchsorted(columns, targets)
        scores.append(score_tokens(F, column_of_target))
    return TokenScores(*(torch.stack(x) for x in zip(*scores, strict=True)))


def plausible_columns(log_qN: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The tokens that APC keeps in some row of `log_qN` `[T, vocab]`, and the targets: sorted ids `[columns]`."""
    kept = apc_mask(log_qN, alpha).any(0)
    kept[targets] = True
    return kept.nonzero()[:, 0]


class TeacherForced(NamedTuple):
    """What one forward pass leaves of some continuations: states at the M places where a token is predicted.

    `hidden` is `[N + 1, M, width]`, the last entry normed, as `hidden_states` gives it; `targets` `[M]` are the true
    tokens; `places` says for each continuation where its tokens are, in 0..M-1: `[T]`.
    """

    hidden: Tensor
    targets: Tensor
    places: list[Tensor]


def teacher_force(model: PreTrainedModel, prefix: Tensor, continuations: Sequence[Tensor]) -> TeacherForced:
    """Run what may follow a prefix, in one forward pass of a batch of all the continuations.

    `prefix` is ids `[P]`, or embeddings `[P, width]` where images are part of it; each continuation is ids `[T]` of its
    own length, tokenized by the caller. What continuations begin with in common is kept once. Raises ValueError for an
    empty prefix or continuation.
    """
    return teacher_force_batch(model, [(prefix, continuations)])


@torch.no_grad()
def teacher_force_batch(model: PreTrainedModel, prompts: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> TeacherForced:
    """`teacher_force` of several prefixes, each with its continuations, in one forward pass.

    `places` follows the continuations, prefix by prefix.
    """
    embed = model.get_input_embeddings()
    inputs = []
    for prefix, continuations in prompts:
        lengths = [len(ids) for ids in continuations]
        if len(prefix) == 0 or not lengths or 0 in lengths:
            raise ValueError(f"a prefix of {len(prefix)} tokens and continuations of {lengths}: none may be empty")
        embeds = prefix if prefix.is_floating_point() else embed(prefix)
        inputs += [torch.cat([embeds, embed(ids[:-1])]) for ids in continuations]
    hidden = (
        find_decoder_parts(model)
        .decoder(
            inputs_embeds=torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True),  # causal: no row sees its padding
            output_hidden_states=True,
            use_cache=False,
        )
        .hidden_states
    )

    read_at: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    texts, row = [], 0
    for p, (prefix, continuations) in enumerate(prompts):
        for text in (ids.tolist() for ids in continuations):
            texts.append([(p, tuple(text[: t + 1])) for t in range(len(text))])
            for t, so_far in enumerate(texts[-1]):
                read_at.setdefault(so_far, (row, len(prefix) - 1 + t))
            row += 1
    place_of = {so_far: place for place, so_far in enumerate(read_at)}
    device = hidden[0].device
    rows, positions = torch.tensor(list(read_at.values()), device=device).T
    return TeacherForced(
        hidden=torch.stack([h[rows, positions] for h in hidden]),
        targets=torch.tensor([so_far[-1] for _, so_far in read_at], device=device),
        places=[torch.tensor([place_of[so_far] for so_far in text], device=device) for text in texts],
    )


def score_forced(
    model: PreTrainedModel,
    forced: TeacherForced,
    *,
    layers: Sequence[int],
    alphas: Sequence[float] = (0.1,),
    norm: bool = True,
    overlap: bool = False,
) -> list[ContinuationScores]:
    """Read the layers (1..N-1) of a teacher-forced pass through the model's own head: `score_states`.

    `norm=False` reads them without LN_out, as the DoLa paper's code does.
    """
    parts = find_decoder_parts(model)
    vocab_size = model.config.get_text_config().vocab_size
    return score_states(
        forced,
        parts.ln_out if norm else None,
        parts.phi,
        logits_per_place=vocab_size,
        layers=layers,
        alphas=alphas,
        overlap=overlap,
    )


@torch.no_grad()
def score_states(
    forced: TeacherForced,
    ln_out: Callable[[Tensor], Tensor] | None,
    phi: Callable[..., Tensor],
    *,
    logits_per_place: int,
    layers: Sequence[int],
    alphas: Sequence[float],
    overlap: bool = False,
) -> list[ContinuationScores]:
    """Score true tokens by the states of every layer, for every alpha, in slices of bounded memory.

    `ln_out` and `phi` read a state as `compute_logprobs_from_hidden` does; `phi(h, columns=None)` gives some columns of
    its `[..., vocab]` where they are asked for, and makes `logits_per_place` numbers of a state on the way. With every
    alpha above 0 and without `overlap` an earlier layer is read only at the tokens that stay plausible, which costs
    little beside the forward pass. Raises ValueError for a layer or an alpha out of range.
    """
    num_layers = len(forced.hidden) - 1
    if layers and sanitize_candidate_layers(layers, num_layers) != sorted(layers):
        raise ValueError(f"layers must be different and in 1..{num_layers - 1}, got {list(layers)}")
    slices = []
    for some in slice_places(len(forced.targets), len(layers) + 1, logits_per_place):
        h_N, h_j, targets = forced.hidden[-1, some], forced.hidden[list(layers), some], forced.targets[some]
        log_qN, columns = compute_logprobs_from_hidden(h_N, None, phi), None
        baseline = score_tokens(log_qN, targets)
        if min(alphas) > 0 and not overlap:
            columns = plausible_columns(log_qN, targets, min(alphas))
            log_qN, targets = log_qN[:, columns], torch.searchsorted(columns, targets)
        log_qj = compute_logprobs_from_hidden(h_j, ln_out, partial(phi, columns=columns))
        uniform = torch.zeros_like(log_qN)[None]  # contrasted with it, q_N is only masked
        log_p, rank = score_contrasts(log_qN, torch.cat([uniform, log_qj]), targets, alphas)
        shared = overlap_from_logprobs(log_qN, log_qj) if overlap else log_qN.new_empty(0, len(targets))
        slices.append((*baseline, log_p, rank, shared))
    log_q, rank_q, log_p, rank_p, shared = (torch.cat(x, dim=-1) for x in zip(*slices, strict=True))
    return [
        ContinuationScores(
            layers=list(layers),
            baseline=TokenScores(log_q[at], rank_q[at]),
            apc_only=TokenScores(log_p[:, 0, at], rank_p[:, 0, at]),
            static=TokenScores(log_p[:, 1:, at], rank_p[:, 1:, at]),
            overlap=shared[:, at] if overlap else None,
        )
        for at in forced.places
    ]


def slice_places(places: int, layers: int, vocab: int) -> Iterator[slice]:
    """Cut 0..places-1 into `SLICE_PLACES`, or less where layers x places x vocab would go beyond `SLICE_ELEMENTS`."""
    step = max(1, min(SLICE_PLACES, SLICE_ELEMENTS // (layers * vocab)))
    return (slice(start, start + step) for start in range(0, places, step))


def score_continuations(
    model: PreTrainedModel, prefix: Tensor, continuations: Sequence[Tensor], **reading
) -> list[ContinuationScores]:
    """Log-probabilities of what may follow a prefix: `teacher_force`, then `score_forced`, whose keywords it takes."""
    return score_forced(model, teacher_force(model, prefix, continuations), **reading)
