"""What the vision tower finds likely, as a bias on the words the language model is about to say (fusion B)."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dola_runtime import apc_mask
from janus.dola.rerank import rerank_with_dola_static_siglip, vision_layer
from janus.dola.switches import DoLaSwitches


def first_token_ids(tokenizer, phrase: str) -> frozenset[int]:
    """T(c): the ids a phrase can begin with, with and without a space before it, as given and capitalised.

    A token of nothing but space says nothing of the phrase, so the one after it counts. Candidates that begin with
    the same word ("a cat", "a dog") share their T(c), and the prior cannot tell them apart. Raises ValueError for a
    phrase without a token.
    """
    return frozenset(ids[-1] for ids in beginnings(tokenizer, phrase))


def beginnings(tokenizer, phrase: str) -> frozenset[tuple[int, ...]]:
    """The ids of `first_token_ids`, each behind the tokens of nothing but space that it is spelled with."""
    words, found = phrase.strip(), set()
    for written in (words, words[:1].upper() + words[1:]):
        for space in ("", " "):
            ids = tokenizer.encode(space + written, add_special_tokens=False)
            first = next((k for k, token in enumerate(ids) if tokenizer.decode([token]).strip()), None)
            if first is not None:
                found.add(tuple(ids[: first + 1]))
    if not found:
        raise ValueError(f"candidate {phrase!r} has no token")
    return frozenset(found)


def vision_prior(
    p_hat: Tensor,
    token_ids: Sequence[Collection[int]],
    vocab_size: int,
    top_k: int = 5,
    miss: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """`r_V(x) = log(max(sum of p_hat(c) over c with x in T(c), eps))`: `[C]` or `[batch, C]` to `[..., vocab]`.

    token_ids: T(c) of each candidate. Only the `top_k` most probable candidates of a row count.
    miss: r_V of a token in no T(c) of those; None is the floor, log(eps). With 0.0 a miss beats every hit (r_V <= 0),
        with -inf nothing but the candidates' first words can be said where any of them is plausible.

    Raises ValueError for no candidates, another number of T(c) than of candidates, and values out of range.
    """
    num_candidates = p_hat.shape[-1]
    if not num_candidates or num_candidates != len(token_ids):
        raise ValueError(
            f"p_hat has {num_candidates} candidates, token_ids {len(token_ids)}; both must be the same, > 0"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if miss not in (None, 0.0, -math.inf):
        raise ValueError(f"miss must be None (the floor), 0.0 or -inf, got {miss}")
    if not 0.0 < eps <= 1.0:
        raise ValueError(f"eps must be in (0, 1], got {eps}")
    tokens = sorted(set().union(*token_ids))
    begins = torch.tensor([[x in ids for x in tokens] for ids in token_ids], dtype=torch.float32, device=p_hat.device)
    p, best = p_hat.float().topk(min(top_k, num_candidates))
    kept = torch.zeros(p_hat.shape, device=p_hat.device).scatter(-1, best, 1.0)
    p = torch.zeros(p_hat.shape, device=p_hat.device).scatter(-1, best, p)
    missed = math.log(eps) if miss is None else miss
    r_V = torch.full((*p_hat.shape[:-1], vocab_size), missed, device=p_hat.device)
    r_V[..., tokens] = (p @ begins).clamp(min=eps).log().masked_fill(kept @ begins == 0, missed)
    return r_V


@dataclass(frozen=True)
class TowerPrior:
    """What the vision tower says of each question's candidates, for fusion: texts and embeddings `[C, width]` of each.

    tau: the tower's temperature. miss: see `vision_prior`. norm: as in `DoLaLogitsProcessor`.
    """

    switches: DoLaSwitches
    candidates: Sequence[Sequence[str]]
    text_banks: Sequence[Tensor | None]
    tau: float = 1.0
    miss: float | None = None
    norm: bool = True


def read_tower(mmgpt, vl_chat_processor, batch, prior: TowerPrior) -> Tensor:
    """`r_V` `[batch, vocab]`; the images of all questions with one text bank go through the tower together.

    Several images of a question speak with their mean p_hat. Raises ValueError as `rerank_with_dola_static_siglip`
    and `vision_prior` do, and for a question without an image or a text bank.
    """
    switches, tower, shown = prior.switches, mmgpt.vision_model.vision_tower, batch.images_emb_mask.any(-1)
    vocab_size, layer = mmgpt.language_model.lm_head.weight.shape[0], vision_layer(tower, switches)
    r_V = [torch.empty(0)] * len(shown)
    for bank in {id(bank): bank for bank in prior.text_banks}.values():
        rows = [i for i, of_question in enumerate(prior.text_banks) if of_question is bank]
        if bank is None or not shown[rows].any(-1).all():
            raise ValueError("candidates need an image to be ranked on and a text_bank of their embeddings")
        p_hat = rerank_with_dola_static_siglip(
            tower,
            batch.pixel_values[rows][shown[rows]],
            bank,
            layer,
            switches.alpha_V,
            prior.tau,
            gamma=switches.gamma_V,
            norm=prior.norm,
        )
        for i, of_question in zip(rows, p_hat.split(shown[rows].sum(-1).tolist()), strict=True):
            words = [first_token_ids(vl_chat_processor.tokenizer, candidate) for candidate in prior.candidates[i]]
            r_V[i] = vision_prior(of_question.mean(0), words, vocab_size, switches.mm_topk_for_T, prior.miss)
    return torch.stack(r_V)


class VisionPriorLogitsProcessor(LogitsProcessor):
    """Add the vision prior to a step's scores, `F_joint = F_L + lambda * r_V`, on the tokens that are kept (not -inf).

    It follows the DoLa processor (`logits_processor=[dola, fusion]`) and applies at every step. Where the prior
    forbids every kept token of a row (`miss=-inf`), the row stays as it is. Scores come out normalised, so that beams
    add up log-probabilities.

    Args:
        r_V: `[vocab]`, or `[batch, vocab]` with a row per prompt, whose beams lie one after the other in `scores`.
        lambda_mm: in [0, 1]; 0 leaves every score as it is.
        alpha: plausibility threshold on the incoming scores, for use without DoLa, which has set its own; 0 keeps all.

    Raises ValueError for a lambda_mm or alpha outside [0, 1].
    """

    def __init__(self, r_V: Tensor, lambda_mm: float = 0.7, alpha: float = 0.0):
        if not 0.0 <= lambda_mm <= 1.0:
            raise ValueError(f"lambda_mm must be in [0, 1], got {lambda_mm}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        self.r_V = r_V if r_V.dim() == 2 else r_V[None]
        self.lambda_mm = lambda_mm
        self.alpha = alpha

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[rows, vocab]` to fused ones, same shape, dtype and device."""
        if self.lambda_mm == 0:
            return scores
        F_L = torch.log_softmax(scores.float(), dim=-1)
        F_L = F_L.masked_fill(~apc_mask(F_L, self.alpha), -math.inf)
        r_V = self.r_V.to(scores.device).repeat_interleave(len(scores) // len(self.r_V), dim=0)
        F_joint = F_L + self.lambda_mm * r_V
        F_joint = torch.where((F_joint > -math.inf).any(-1, keepdim=True), F_joint, F_L)
        return torch.log_softmax(F_joint, dim=-1).to(scores)
