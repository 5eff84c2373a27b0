"""What turns examples into states at the places where something true is known, a forward pass for some of them."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dola_runtime import guide_logits
from janus.dola.decoder_parts import find_decoder_parts
from janus.dola.files import load_image
from janus.dola.inputs import embed_inputs, pixel_values
from janus.dola.layer_search.examples import Example, rivals
from janus.dola.rerank import build_text_bank, pooled_features, siglip_temperature, tower_depth
from janus.dola.scoring import TeacherForced, teacher_force_batch

STATES_BYTES = 2**30
"""Bound on the states of all layers of one forward pass; what of a batch goes beyond it is read in another pass."""
IMAGES_PER_PASS = 8
"""The same for a tower, whose states are some 60 MB an image in float32 (SigLIP-L/16 at 384 pixels)."""


class Reading(NamedTuple):
    """Some examples after their forward pass, and how their states become logits; what `score_states` takes.

    `forced.places` has one entry for an example's truth, then one for each of its rivals, example by example.
    """

    forced: TeacherForced
    ln_out: Callable[[Tensor], Tensor] | None
    phi: Callable[..., Tensor]
    logits_per_place: int


class Task(NamedTuple):
    """A way to read examples; they keep their order over the readings, none of which the generator holds on to.

    Every task reads its contrast layers through the final norm unless `norm=False`.
    """

    num_layers: int
    read: Callable[[Sequence[Example]], Iterator[Reading]]
    name_token: Callable[[Example, int], str]


def image_task(
    model,
    processor,
    cfg_weight: float,
    encode_prompts: Callable[[Sequence[str]], tuple[Tensor, Tensor | None]],
    norm: bool = True,
) -> Task:
    """`{"prompt", "image"}`: the image's own VQ codes, forced after the prompt, guided before the contrast.

    `encode_prompts` gives ids `[2 * texts, T]`, conditional and unconditional in turn, and which of them are no padding
    (None: all). A place's state is that of both rows, `[2, width]`, as decoding pairs them.
    """
    llama, embed = model.language_model.model, model.language_model.get_input_embeddings()
    unit_range = copy(processor.image_processor)
    unit_range.image_mean = unit_range.image_std = (0.5, 0.5, 0.5)  # pixels in [-1, 1]
    vq = model.gen_vision_model
    if embed.weight.dtype != torch.float32:  # there the nearest code is another one now and then
        vq = deepcopy(vq).float()

    def codes_of(example: Example) -> Tensor:
        pixels = pixel_values(unit_range, [load_image(example["image"])]).to(embed.weight.device)
        return vq.encode(pixels)[2][2]

    def phi(h: Tensor, columns: Tensor | None = None) -> Tensor:
        logits = model.gen_head(h) if columns is None else model.gen_head(h)[..., columns]
        return guide_logits(logits.float(), cfg_weight)[..., 0, :]

    def force(codes: Tensor, ids: Tensor, valid: Tensor | None) -> TeacherForced:
        painted = model.prepare_gen_img_embeds(codes[:, :-1]).repeat_interleave(2, dim=0)
        placed = {}
        if valid is not None:
            mask = pad(valid, (0, painted.shape[1]), value=True).long()
            placed = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        hidden = read_states(
            llama,
            lambda h: h[:, ids.shape[1] - 1 :].unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1),
            inputs_embeds=torch.cat([embed(ids), painted], dim=1),
            **placed,
        )
        places = torch.arange(codes.numel(), device=codes.device).view_as(codes)
        return TeacherForced(hidden, codes.flatten(), list(places))

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        codes = torch.stack([codes_of(example) for example in examples])
        ids, valid = encode_prompts([example["prompt"] for example in examples])
        lengths = [[ids.shape[1] + codes.shape[1]] * 2] * len(examples)
        for some in bounded_passes(lengths, (len(llama.layers) + 1) * embed.weight[0].nbytes):
            pairs = slice(2 * some.start, 2 * some.stop)
            yield Reading(
                force(codes[some], ids[pairs], None if valid is None else valid[pairs]),
                llama.norm if norm else None,
                phi,
                2 * model.gen_embed.weight.shape[0],
            )

    return Task(len(llama.layers), read, lambda example, code: f"code {code}")


def read_states(llama, pick: Callable[[Tensor], Tensor], inputs_embeds: Tensor, **placed: Tensor) -> Tensor:
    """`pick` of all that transformers' `hidden_states` would hold, `[N + 1, ...]`, with one copy of it in memory."""
    picked = pick(inputs_embeds)
    hidden = picked.new_empty((len(llama.layers) + 1, *picked.shape))

    def keep(layer: int, _block, args: tuple[Tensor, ...]) -> None:
        hidden[layer] = pick(args[0])

    hooks = [block.register_forward_pre_hook(partial(keep, layer)) for layer, block in enumerate(llama.layers)]
    try:
        hidden[-1] = pick(llama(inputs_embeds=inputs_embeds, use_cache=False, **placed).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden


def bounded_passes(lengths: Sequence[Sequence[int]], bytes_per_position: int) -> Iterator[slice]:
    """Cut examples, each with the lengths of its rows, into passes whose padded states fit into `STATES_BYTES`.

    No pass is without an example, however long its rows.
    """
    start = rows = longest = 0
    for i, of_example in enumerate(lengths):
        rows, longest = rows + len(of_example), max(longest, *of_example)
        if i > start and rows * longest * bytes_per_position > STATES_BYTES:
            yield slice(start, i)
            start, rows, longest = i, len(of_example), max(of_example)
    yield slice(start, len(lengths))


def answers_task(model, processor, render_question: Callable[[str, int], str], norm: bool = True) -> Task:
    """`{"question", "answer"}`, with `image` and `choices` or without: the answer's words and its end, in the chat.

    `render_question` gives the chat of a question on a number of images, up to the answer.
    """
    tokenizer, weight = processor.tokenizer, model.language_model.get_input_embeddings().weight

    def prefix(example: Example) -> Tensor:
        images = [load_image(example["image"])] if "image" in example else []
        batch = processor(prompt=render_question(example["question"], len(images)), images=images)
        return embed_inputs(model, batch.to(weight.device, weight.dtype))[0]

    def continuation(text: str) -> Tensor:
        ids = tokenizer.encode(f" {text.strip()}", add_special_tokens=False)
        return torch.tensor([*ids, tokenizer.eos_token_id], device=weight.device)

    def prompts_of(examples: Sequence[Example]) -> list[tuple[Tensor, list[Tensor]]]:
        return [
            (prefix(example), [continuation(text) for text in (example["answer"], *rivals(example))])
            for example in examples
        ]

    return _language_task(model.language_model, tokenizer, prompts_of, norm)


def continuation_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, norm: bool = True) -> Task:
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

    return _language_task(model, tokenizer, prompts_of, norm)


def _language_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts_of: Callable, norm: bool
) -> Task:
    parts, config = find_decoder_parts(model), model.config.get_text_config()

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        prompts = prompts_of(examples)
        lengths = [[len(prefix) + len(ids) for ids in continuations] for prefix, continuations in prompts]
        for some in bounded_passes(lengths, (len(parts.layers) + 1) * config.hidden_size * model.dtype.itemsize):
            yield Reading(
                teacher_force_batch(model, prompts[some]),
                parts.ln_out if norm else None,
                parts.phi,
                config.vocab_size,
            )

    return Task(len(parts.layers), read, lambda example, token: str(tokenizer.decode([token])))


def tower_task(vit, image_processor, siglip, tokenizer, examples: Sequence[Example], norm: bool = True) -> Task:
    """`{"image", "caption", "candidates"}`: which candidate the image shows.

    The temperature is the one that SigLIP was trained with. The texts of all `examples` are embedded here, once.
    """
    texts = list(dict.fromkeys(text for example in examples for text in example["candidates"]))
    row_of = {text: row for row, text in enumerate(texts)}
    weight, depth, tau = next(vit.parameters()), tower_depth(vit), siglip_temperature(siglip)
    text_bank = l2_normalize(build_text_bank(siglip, tokenizer, texts).to(weight.device).float(), dim=-1)

    def features_of(examples: Sequence[Example]) -> Tensor:
        pixels = pixel_values(image_processor, [load_image(example["image"]) for example in examples]).to(weight)
        return pooled_features(vit, pixels, [1, *range(1, depth + 1)], norm)  # layer 0 has none: layer 1 fills its row

    def read(examples: Sequence[Example]) -> Iterator[Reading]:
        parts = [examples[start : start + IMAGES_PER_PASS] for start in range(0, len(examples), IMAGES_PER_PASS)]
        features = torch.cat([features_of(part) for part in parts], dim=1)
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
