"""How well images show their prompts: by Janus's own answers, by its SigLIP tower, or by a function of the user's.

A scorer is written `caption`, `vqa` or `tower`, behind commas with DoLa in its reading (`caption,layer=6,alpha=0.1`),
or `module:function`.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dola_runtime import (
    DEFAULT_ALPHA,
    check_alpha,
    check_layer,
    compute_logprobs_from_hidden,
    contrast_layers,
    probs_from_scores,
)
from janus.dola.decoder_parts import find_decoder_parts
from janus.dola.fusion import beginnings
from janus.dola.inputs import embed_each, pixel_values
from janus.dola.rerank import build_text_bank, pooled_features, tower_depth
from janus.dola.scoring import TeacherForced, fill_dropped, score_forced, teacher_force_batch
from janus.dola.variants import parse_variant

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]
"""Images, and the prompt of each, to a finite number for each; more is better."""

IMAGES_PER_PASS = 8
"""Images that are read together: the states of all layers of one are some 160 MB in a model of 7B parameters."""
CAPTION_QUESTION = "What is in the image?"
VQA_QUESTION = 'Does this image show "{}"? Please answer yes or no.'

READ_BY = {"caption": ("layer", "alpha", "norm"), "vqa": ("layer", "alpha", "norm"), "tower": ("layer", "norm")}
"""The scorers that come with Janus, and what may be set in their reading."""


class Reading(NamedTuple):
    """DoLa in a scorer's own reading, in the words of `Decoding`; without a layer there is none."""

    layer: int | None = None
    alpha: float = DEFAULT_ALPHA
    norm: bool = True


class Reader(NamedTuple):
    """The Janus that reads for a scorer. `render(question)` is the chat that asks it of one image."""

    mmgpt: Any
    vl_chat_processor: Any
    render: Callable[[str], str]


# --- from a spec to a scorer -----------------------------------------------------------------------------------------


def needs_model(spec: str) -> bool:
    """Whether Janus reads for this scorer, not a function of the user's. Raises ValueError where a spec is neither."""
    name = spec.partition(",")[0]
    if name in READ_BY:
        read_options(spec)
        return True
    module, colon, function = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ValueError(f"scorer {spec!r}: expected {', '.join(READ_BY)}, or module:function")
    return False


def read_options(spec: str) -> Reading:
    """What stands behind the name in a spec. Raises ValueError, naming the spec."""
    name, comma, options = spec.partition(",")
    values = parse_variant(options) if comma else {}
    if wrong := [keyword for keyword in values if keyword not in READ_BY[name]]:
        raise ValueError(f"scorer {spec!r}: reads with {', '.join(READ_BY[name])}, not with {wrong[0]}")
    if values and "layer" not in values:
        raise ValueError(f"scorer {spec!r}: DoLa in its reading needs a layer")
    check_alpha(values.get("alpha", DEFAULT_ALPHA))
    return Reading(**values)


def make_scorer(spec: str, reader: Reader | None, find_texts: Callable[[], tuple[Any, Any]]) -> Scorer:
    """The scorer that a spec names, its results checked and rounded to six digits.

    `find_texts` gives the paired text encoder and its tokenizer, and is called for the tower alone. Raises ValueError
    for a spec that is none, for a layer that the model does not have, and for a function that is not there; the scorer
    raises it where a function gives anything but a finite number for each image.
    """
    if not needs_model(spec):
        return partial(score_checked, spec, import_function(spec))
    if reader is None:
        raise ValueError(f"scorer {spec!r}: needs a model")
    name, reading, tower = spec.partition(",")[0], read_options(spec), reader.mmgpt.vision_model.vision_tower
    if reading.layer is not None:
        depth = tower_depth(tower) if name == "tower" else len(reader.mmgpt.language_model.model.layers)
        check_layer(reading.layer, depth)
        reading = reading._replace(layer=None if reading.layer == depth else reading.layer)
    if name == "tower":
        scorer = partial(score_by_tower, reader, reading, *find_texts())
    else:
        scorer = partial({"caption": score_by_caption, "vqa": score_by_answer}[name], reader, reading)
    return partial(score_checked, spec, partial(score_in_passes, scorer))


def import_function(spec: str) -> Scorer:
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # an installed command looks beside itself alone
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scorer {spec!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"scorer {spec!r}: {name} is no function")
    return cast(Scorer, function)


def score_in_passes(scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    starts = range(0, len(images), IMAGES_PER_PASS)
    passes = [slice(start, start + IMAGES_PER_PASS) for start in starts]
    return [score for some in passes for score in scorer(images[some], prompts[some])]


def score_checked(spec: str, scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    try:
        scores = np.array([float(score) for score in scorer(images, prompts)])
    except (TypeError, ValueError) as error:
        raise ValueError(f"scorer {spec!r}: {error}") from error
    if len(scores) != len(images) or not np.isfinite(scores).all():
        raise ValueError(f"scorer {spec!r}: expected {len(images)} finite numbers, got {scores.tolist()}")
    return [float(f"{score:.6g}") for score in scores]


# --- the scorers that come with Janus --------------------------------------------------------------------------------


@torch.inference_mode()
def score_by_caption(
    reader: Reader, reading: Reading, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """The mean log-probability, in nats, of the prompt's tokens and of its end as the answer to `CAPTION_QUESTION`.

    With DoLa it is that of p_hat; a token that APC drops counts with the log-probability that q_N gives it.
    """
    mmgpt, processor, render = reader
    tokenizer, llm = processor.tokenizer, mmgpt.language_model
    prefixes = embed_each(mmgpt, processor, [render(CAPTION_QUESTION)] * len(images), images)
    answers = [
        torch.tensor([*tokenizer.encode(f" {prompt.strip()}", add_special_tokens=False), tokenizer.eos_token_id])
        for prompt in prompts
    ]
    forced = teacher_force_batch(
        llm, [(prefix, [ids.to(prefix.device)]) for prefix, ids in zip(prefixes, answers, strict=True)]
    )
    layers = [] if reading.layer is None else [reading.layer]
    scored = score_forced(llm, forced, layers=layers, alphas=[reading.alpha], norm=reading.norm)
    return [
        (fill_dropped(one.static.log_p[0, 0], one.baseline.log_p) if layers else one.baseline.log_p).mean().item()
        for one in scored
    ]


@torch.inference_mode()
def score_by_answer(
    reader: Reader, reading: Reading, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of what follows `VQA_QUESTION` about the prompt, in [0, 1].

    The form of VQAScore (Lin et al., 2024) with Janus as its own judge; yes and no count in every spelling of their
    first token, with the space before it where that is a token of its own (`beginnings`).
    """
    mmgpt, processor, render = reader
    llm, parts = mmgpt.language_model, find_decoder_parts(mmgpt.language_model)
    prefixes = embed_each(mmgpt, processor, [render(VQA_QUESTION.format(prompt)) for prompt in prompts], images)
    spelled = [beginnings(processor.tokenizer, word) for word in ("yes", "no")]
    spaces = {ids[:-1]: ids for spellings in spelled for ids in spellings}  # one row for each, not for each spelling
    continuations = [torch.tensor(ids, device=prefixes[0].device) for ids in spaces.values()]
    forced = teacher_force_batch(llm, [(prefix, continuations) for prefix in prefixes])
    log_q = read_logprobs(forced, reading, parts.ln_out, parts.phi)
    p = log_q[0].exp()
    if len(log_q) > 1:
        p = probs_from_scores(contrast_layers(log_q[0], log_q[1:], reading.alpha)[0])
    places = torch.nn.utils.rnn.pad_sequence(forced.places).T.view(len(images), len(spaces), -1)

    def probability(ids: tuple[int, ...]) -> Tensor:
        at = places[:, list(spaces).index(ids[:-1]), : len(ids)]
        return p[at, list(ids)].prod(-1)

    yes, no = (torch.stack([probability(ids) for ids in spellings]).sum(0) for spellings in spelled)
    tiny = torch.finfo(p.dtype).tiny  # where neither is plausible, neither is likelier
    return ((yes + tiny) / (yes + no + 2 * tiny)).tolist()


def read_logprobs(forced: TeacherForced, reading: Reading, ln_out: Callable, phi: Callable) -> Tensor:
    """log q_N, and behind it log q_j where there is a layer: `[1 or 2, places, vocab]`."""
    log_q = [compute_logprobs_from_hidden(forced.hidden[-1], None, phi)]
    if reading.layer is not None:
        log_q.append(compute_logprobs_from_hidden(forced.hidden[reading.layer], ln_out if reading.norm else None, phi))
    return torch.stack(log_q)


@torch.inference_mode()
def score_by_tower(
    reader: Reader, reading: Reading, siglip, tokenizer, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    """The cosine of the tower's feature and the prompt's embedding, in [-1, 1]; with a layer, minus the layer's own.

    That is the contrast of the two layers' logits: one text has no other candidates to be normalised over, or to be
    implausible among.
    """
    tower = reader.mmgpt.vision_model.vision_tower
    weight = reader.mmgpt.language_model.get_input_embeddings().weight
    pixels = pixel_values(reader.vl_chat_processor.image_processor, images).to(weight)
    layers = [tower_depth(tower), *([] if reading.layer is None else [reading.layer])]
    bank = build_text_bank(siglip, tokenizer, prompts).to(pixels.device)
    features = pooled_features(tower, pixels, layers, reading.norm)
    cosines = cosine_similarity(features.float(), bank.float(), dim=-1)
    return (cosines[0] - cosines[1:].sum(0)).tolist()
