"""What a layer search measures: known tokens (codes, words, captions), read at every layer after one forward pass.

A task turns examples into states at the places where something true is known; scoring those places under every layer
and alpha is `score_states`, the same for all tasks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dola_runtime import (
    compute_logprobs_from_hidden,
    contrast_with_apc_from_logprobs,
    guide_logits,
    probs_from_scores,
    trace_step,
)
from generation_inference import chat_roles, format_image_prompt, pack_prompts
from janus.dola.decoder_parts import find_decoder_parts
from janus.dola.files import load_image, read_text
from janus.dola.rerank import build_text_bank, pooled_features, siglip_temperature, tower_depth
from janus.dola.scoring import (
    ContinuationScores,
    TeacherForced,
    TokenScores,
    fill_dropped,
    score_states,
    teacher_force_batch,
)

Example = dict[str, Any]
"""A line of the input: the fields of its task, image paths resolved, and `domain` where there are domains."""

FIELDS = {
    "image": {"prompt": "text", "image": "image"},
    "answers": {"question": "text", "answer": "text", "image": "image?", "choices": "texts?"},
    "tower": {"image": "image", "caption": "text", "candidates": "texts?"},
}

# --- examples --------------------------------------------------------------------------------------------------------


def read_examples(path: Path, task: str, domain_field: str | None = None) -> list[Example]:
    """The examples of a JSONL file for a task of `FIELDS`; images are looked for from the file's own directory.

    Raises ValueError naming the file, the line and the field.
    """
    text = read_text(path).strip()
    if not text:
        raise ValueError(f"{path}: no examples")
    examples: list[Example] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            examples.append(_read_example(line, task, domain_field, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        for optional in ("choices", "candidates"):
            if (optional in examples[0]) != (optional in examples[-1]):
                raise ValueError(f"{path}: line {number}: {optional} must stand in every line or in none")
    if task == "tower" and "candidates" not in examples[0]:
        captions = list(dict.fromkeys(example["caption"] for example in examples))
        examples = [example | {"candidates": captions} for example in examples]
    return examples


def _read_example(line: str, task: str, domain_field: str | None, directory: Path) -> Example:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    example = {}
    for field, kind in FIELDS[task].items():
        if field not in content and kind.endswith("?"):
            continue
        example[field] = _read_field(content, field, kind.removesuffix("?"), directory)
    if domain_field is not None:
        example["domain"] = _read_field(content, domain_field, "text", directory)
    for field, own in (("choices", "answer"), ("candidates", "caption")):
        if field in example and (own not in example or example[own] not in example[field] or len(example[field]) < 2):
            raise ValueError(f"{field}: expected the {own} and at least one other text, found {example[field]!r}")
    return example


def _read_field(content: dict[str, Any], field: str, kind: str, directory: Path) -> Any:
    if field not in content:
        raise ValueError(f"{field}: missing")
    value = content[field]
    texts = value if kind == "texts" else [value]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        expected = {"text": "a string that is not blank", "texts": "a list of such strings", "image": "an image file"}
        raise ValueError(f"{field}: expected {expected[kind]}, found {value!r}")
    if kind == "texts":
        return list(dict.fromkeys(texts))
    if kind == "image":
        path = directory / texts[0]
        try:
            load_image(path)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        return path
    return texts[0]


def rivals(example: Example) -> list[str]:
    """The false ones among an example's choices."""
    return [text for text in example.get("choices", ()) if text != example["answer"]]


# --- tasks -----------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """Some examples after their forward pass, and how their states become logits; what `score_states` takes.

    `forced.places` has one entry for an example's truth, then one for each of its rivals, example by example.
    """

    forced: TeacherForced
    ln_out: Callable[[Tensor], Tensor] | None
    phi: Callable[..., Tensor]
    logits_per_place: int


class Task(NamedTuple):
    """A way to read examples: one forward pass each, batched; examples keep their order over the readings."""

    num_layers: int
    read: Callable[[Sequence[Example]], Iterator[Reading]]
    name_token: Callable[[Example, int], str]


def image_task(model, processor, cfg_weight: float) -> Task:
    """`{"prompt", "image"}`: the image's own VQ codes, forced after the prompt, guided before the contrast.

    A place's state is that of the conditional and of the unconditional row, `[2, width]`, as decoding pairs them.
    """
    llama, embed = model.language_model.model, model.get_input_embeddings()
    unit_range = replace(processor.image_processor, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)  # pixels in [-1, 1]

    def phi(h: Tensor, columns: Tensor | None = None) -> Tensor:
        logits = model.gen_head(h) if columns is None else model.gen_head(h)[..., columns]
        return guide_logits(logits.float(), cfg_weight)[..., 0, :]

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        pixels = unit_range([load_image(example["image"]) for example in examples]).to(embed.weight)
        codes = model.gen_vision_model.encode(pixels)[2][2].view(len(examples), -1)
        prompts = [format_image_prompt(processor, example["prompt"]) for example in examples]
        ids, valid = pack_prompts(processor, prompts)
        painted = model.prepare_gen_img_embeds(codes[:, :-1]).repeat_interleave(2, dim=0)
        placed = {}
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (0, painted.shape[1]), value=True).long().to(codes.device)
            placed = {"attention_mask": valid, "position_ids": (valid.cumsum(-1) - 1).clamp(min=0)}
        outputs = llama(
            inputs_embeds=torch.cat([embed(ids.to(codes.device)), painted], dim=1),
            output_hidden_states=True,
            use_cache=False,
            **placed,
        )
        # [rows, codes, width], rows paired -> [places, 2, width]
        hidden = [
            h[:, ids.shape[1] - 1 :].unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1) for h in outputs.hidden_states
        ]
        places = torch.arange(codes.numel(), device=codes.device).view_as(codes)
        forced = TeacherForced(torch.stack(hidden), codes.flatten(), list(places))
        yield Reading(forced, llama.norm, phi, 2 * model.gen_embed.weight.shape[0])

    return Task(len(llama.layers), read, lambda example, code: f"code {code}")


def answers_task(model, processor) -> Task:
    """`{"question", "answer"}`, with `image` and `choices` or without: the answer's words and its end, in the chat."""
    embed, tokenizer = model.get_input_embeddings(), processor.tokenizer
    roles = chat_roles(tokenizer)

    def prompt_of(example: Example) -> tuple[str, list]:
        content = (f"{processor.image_tag}\n" if "image" in example else "") + example["question"]
        rendered = processor.apply_sft_template_for_multi_turn_prompts(
            [{"role": roles[0], "content": content}, {"role": roles[1], "content": ""}],
            processor.sft_format,
            processor.system_prompt,
        )
        return rendered, [load_image(example["image"])] if "image" in example else []

    def continuation(text: str) -> Tensor:
        ids = tokenizer.encode(f" {text.strip()}", add_special_tokens=False)
        return torch.tensor([*ids, tokenizer.eos_token_id], device=embed.weight.device)

    def prompts_of(examples: Sequence[Example]) -> list[tuple[Tensor, list[Tensor]]]:
        batch = processor.batchify([prompt_of(example) for example in examples]).to(
            embed.weight.device, embed.weight.dtype
        )
        embeds = model.prepare_inputs_embeds(**vars(batch)) if batch.pixel_values.shape[1] else embed(batch.input_ids)
        prefixes = [row[mask.bool()] for row, mask in zip(embeds, batch.attention_mask, strict=True)]
        return [
            (prefix, [continuation(text) for text in (example["answer"], *rivals(example))])
            for prefix, example in zip(prefixes, examples, strict=True)
        ]

    return _language_task(model.language_model, tokenizer, prompts_of)


def continuation_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The same without a chat, for any causal language model: the answer follows the question after a space."""
    weight = next(model.parameters())

    def ids(text: str, **settings) -> Tensor:
        return torch.tensor(tokenizer(text, **settings)["input_ids"], device=weight.device)

    def prompts_of(examples: Sequence[Example]) -> list[tuple[Tensor, list[Tensor]]]:
        return [
            (
                ids(example["question"]),
                [ids(f" {text}", add_special_tokens=False) for text in (example["answer"], *rivals(example))],
            )
            for example in examples
        ]

    return _language_task(model, tokenizer, prompts_of)


def _language_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts_of: Callable) -> Task:
    parts = find_decoder_parts(model)

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        forced = teacher_force_batch(model, prompts_of(examples))
        yield Reading(forced, parts.ln_out, parts.phi, model.config.get_text_config().vocab_size)

    return Task(len(parts.layers), read, lambda example, token: str(tokenizer.decode([token])))


def tower_task(vit, image_processor, siglip, tokenizer, examples: Sequence[Example]) -> Task:
    """`{"image", "caption", "candidates"}`: which candidate the image shows.

    The temperature is the one that SigLIP was trained with. The texts of all `examples` are embedded here, once.
    """
    texts = list(dict.fromkeys(text for example in examples for text in example["candidates"]))
    row_of = {text: row for row, text in enumerate(texts)}
    weight, depth, tau = next(vit.parameters()), tower_depth(vit), siglip_temperature(siglip)
    text_bank = l2_normalize(build_text_bank(siglip, tokenizer, texts).to(weight.device).float(), dim=-1)

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        pixels = image_processor([load_image(example["image"]) for example in examples]).to(weight)
        features = pooled_features(vit, pixels, [1, *range(1, depth + 1)])  # layer 0 has none: layer 1 fills its row
        done = 0
        for candidates, group in groupby(examples, key=lambda example: example["candidates"]):
            captions = [example["caption"] for example in group]
            bank = text_bank[[row_of[text] for text in candidates]]

            def phi(z: Tensor, columns: Tensor | None = None, bank: Tensor = bank) -> Tensor:
                return l2_normalize(z.float(), dim=-1) @ (bank if columns is None else bank[columns]).T / tau

            targets = torch.tensor([candidates.index(caption) for caption in captions], device=weight.device)
            places = torch.arange(len(captions), device=weight.device)[:, None]
            forced = TeacherForced(features[:, done : done + len(captions)], targets, list(places))
            yield Reading(forced, None, phi, len(candidates))
            done += len(captions)

    return Task(depth, read, lambda example, candidate: example["candidates"][candidate])


# --- measures --------------------------------------------------------------------------------------------------------


def metric_names(examples: Sequence[Example]) -> list[str]:
    """What `measure` gives of each example: means over its true tokens, and whether all of it is right.

    prob, log_prob: of the true token. rank: 1 + the number of more probable tokens. top1: share of rank 1. kept: share
    that APC keeps; a dropped token has probability 0, and the log_prob and rank that q_N gives it. exact: every true
    token is top-1, as greedy decoding needs it. accuracy: the true choice has the highest sum of log-probabilities,
    where a dropped token counts -1000, as in the DoLa paper's evaluation; a tie is wrong.
    """
    return ["prob", "log_prob", "rank", "top1", "kept", "exact"] + (["accuracy"] if "choices" in examples[0] else [])


def headline(metrics: Sequence[str]) -> str:
    """The metric that layers are chosen by."""
    return "accuracy" if "accuracy" in metrics else "prob"


@torch.inference_mode()
def measure(task: Task, examples: Sequence[Example], layers: Sequence[int], alphas: Sequence[float]) -> np.ndarray:
    """Metrics of a batch of examples: float32 `[examples, metrics, alphas, 2 + layers]`.

    The last axis holds the baseline, APC only, then DoLa-static at each layer. Raises ValueError for a layer or alpha
    out of range.
    """
    scores = [
        continuation
        for reading in task.read(examples)
        for continuation in score_states(*reading[:3], logits_per_place=reading[3], layers=layers, alphas=alphas)
    ]
    rows, start = [], 0
    for example in examples:
        count = 1 + len(rivals(example))
        rows.append(_metrics(scores[start : start + count]))
        start += count
    return torch.stack(rows).cpu().numpy()


def _metrics(continuations: Sequence[ContinuationScores]) -> Tensor:
    """The true continuation, then its rivals, to `[metrics, alphas, 2 + layers]`."""
    every = [_every_decoding(scores) for scores in continuations]
    (log_p, rank), baseline = every[0], continuations[0].baseline
    kept = log_p > -torch.inf
    rank = torch.where(kept, rank, baseline.rank)
    tokens = (log_p.exp(), fill_dropped(log_p, baseline.log_p), rank.float(), (rank == 1).float(), kept.float())
    metrics = [*(token.mean(-1) for token in tokens), (rank == 1).all(-1).float()]
    if len(every) > 1:
        sums = torch.stack([fill_dropped(log_p).sum(-1) for log_p, _ in every])
        metrics.append((sums[0] > sums[1:].amax(0)).float())
    return torch.stack(metrics)


def _every_decoding(scores: ContinuationScores) -> TokenScores:
    """Baseline, APC only and every layer side by side, `[alphas, 2 + layers, T]`."""
    both = ((scores.baseline.log_p, scores.apc_only.log_p, scores.static.log_p),
            (scores.baseline.rank, scores.apc_only.rank, scores.static.rank))  # fmt: skip
    return TokenScores(*(torch.cat([q.expand_as(apc)[:, None], apc[:, None], p], dim=1) for q, apc, p in both))


# --- one step, looked at ---------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """The step that decided how an example came out: which token of which text, and the top-5 there.

    `continuation` is 0 for the truth, else the number of the rival; `top` is `trace_step`'s.
    """

    continuation: int
    step: int
    steps: int
    token: int
    top: dict[str, Any]


@torch.inference_mode()
def find_decision(task: Task, example: Example, layer: int, alpha: float, better: bool) -> Decision:
    """The step at which DoLa did most to make an example right (`better`) or wrong.

    Without choices it is a true token that came to be, or ceased to be, top-1. With choices it is the token, of the
    truth or of its strongest rival, whose log-probability moved most that way.
    """
    reading = next(iter(task.read([example])))
    forced = reading.forced
    scores = score_states(*reading[:3], logits_per_place=reading[3], layers=[layer], alphas=[alpha])
    sign = 1 if better else -1
    truth = scores[0]
    if len(scores) == 1:
        gain = sign * (truth.static.log_p[0, 0].exp() - truth.baseline.log_p.exp())
        flip = sign * ((truth.static.rank[0, 0] == 1).int() - (truth.baseline.rank == 1).int())
        continuation, step = 0, int((flip * 2 + gain).argmax())
    else:
        before = [s.baseline.log_p for s in scores]
        after = [fill_dropped(s.static.log_p[0, 0]) for s in scores]
        losing = torch.stack([log_p.sum() for log_p in (before if better else after)])
        rival = 1 + int(losing[1:].argmax())
        shared = set(forced.places[0].tolist()) & set(forced.places[rival].tolist())
        moves = [
            (float(way * sign * (after[k] - before[k])[t]), k, t)
            for k, way in ((0, 1), (rival, -1))
            for t, place in enumerate(forced.places[k].tolist())
            if place not in shared
        ]
        _, continuation, step = max(moves)
    place = forced.places[continuation][step : step + 1]
    log_qN = compute_logprobs_from_hidden(forced.hidden[-1, place], None, reading.phi)
    log_qj = compute_logprobs_from_hidden(forced.hidden[layer, place], reading.ln_out, reading.phi)
    p_hat = probs_from_scores(contrast_with_apc_from_logprobs(log_qN, log_qj, alpha))
    top = trace_step(log_qN, log_qj, p_hat)
    return Decision(continuation, step, len(forced.places[continuation]), int(forced.targets[place]), top)
