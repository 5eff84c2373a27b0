"""Text to image with Janus: the reference loop, and the same loop with DoLa between hidden states and next token.

Everything here works on any object with the attribute names of a Janus model, the original code's included.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from dola_runtime import (
    DEFAULT_ALPHA,
    DEFAULT_LAYER_RATIO,
    check_alpha,
    check_cfg_weight,
    check_gamma,
    check_temperature,
    contrast_layers,
    guide_logits,
    guide_scores,
    pick_contrast_layers,
    probs_from_scores,
    trace_step,
)

DECODED_TOGETHER = 16
"""Images that the VQ decoder turns to pixels at a time: its full-size feature maps are what takes memory there."""

FASTEST_WINDOWS = {1: 16, 4: 4}
"""Window by the most images decoded together that it is for; 1 beyond."""

# --- prompts and pictures --------------------------------------------------------------------------------------------


def chat_roles(tokenizer) -> tuple[str, str]:
    """The (user, assistant) names a checkpoint was trained with: Janus-Pro has tokens of its own for them."""
    if len(tokenizer.encode("<|User|>", add_special_tokens=False)) == 1:
        return "<|User|>", "<|Assistant|>"
    return "User", "Assistant"


def render_chat(vl_chat_processor, turns: Sequence[str], system_prompt: str = "") -> str:
    """The chat string of `turns`, the user's first and then by turns; an odd number asks for the assistant's next."""
    roles = chat_roles(vl_chat_processor.tokenizer)
    turns = [*turns, ""] if len(turns) % 2 else turns
    return vl_chat_processor.apply_sft_template_for_multi_turn_prompts(
        conversations=[{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)],
        sft_format=vl_chat_processor.sft_format,
        system_prompt=system_prompt,
    )


def format_image_prompt(vl_chat_processor, text: str) -> str:
    """The text as the chat string that asks for an image, ending in `<begin_of_image>`."""
    return render_chat(vl_chat_processor, [text]) + vl_chat_processor.image_start_tag


def format_question(vl_chat_processor, question: str | Sequence[str], num_images: int = 1) -> str:
    """The question, behind as many images, as the chat string that asks for its answer.

    A chat is its turns, the user's first and last; the images are shown in the first.
    """
    first, *others = [question] if isinstance(question, str) else question
    content = f"{vl_chat_processor.image_tag}\n" * num_images + first
    return render_chat(vl_chat_processor, [content, *others], vl_chat_processor.system_prompt)


def pack_prompts(
    vl_chat_processor, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Rendered prompts to ids `[2 * prompts, T]`, each followed by its unconditional twin, left-padded.

    The twin has the pad id for every id but the first and the last. The mask of real tokens is None where no row
    needed padding: then, as in the reference loop, nothing is masked.
    """
    encoded = [vl_chat_processor.tokenizer.encode(prompt) for prompt in prompts]
    length, pad = max(map(len, encoded)), vl_chat_processor.pad_id
    ids = torch.full((2 * len(prompts), length), pad)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(encoded):
        start = length - len(row)
        ids[2 * i, start:] = torch.tensor(row)
        ids[2 * i + 1, start], ids[2 * i + 1, -1] = row[0], row[-1]
        valid[2 * i : 2 * i + 2, start:] = True
    return ids.to(device), None if valid.all() else valid.to(device)


def image_geometry(mmgpt, vl_chat_processor) -> tuple[int, int]:
    """(side of a generated image, side of the patch one code stands for), in pixels."""
    return vl_chat_processor.image_processor.image_size, 2 ** (mmgpt.gen_vision_model.decoder.num_resolutions - 1)


def num_image_tokens(mmgpt, vl_chat_processor) -> int:
    """How many codes a generated image has."""
    size, patch = image_geometry(mmgpt, vl_chat_processor)
    return (size // patch) ** 2


class Sampling(TypedDict):
    cfg_weight: float
    temperature: float


def default_sampling(mmgpt, cfg_weight: float | None = None, temperature: float | None = None) -> Sampling:
    """Guidance and temperature: what is given, else the checkpoint's own, else 5 and 1.

    Its own are `guidance_scale` and `temperature` of its generation_config.json.
    """
    own = getattr(mmgpt, "generation_config", None)

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    return {
        "cfg_weight": first(cfg_weight, getattr(own, "guidance_scale", None), 5.0),
        "temperature": first(temperature, getattr(own, "temperature", None), 1.0),
    }


@torch.inference_mode()
def tokens_to_images(mmgpt, tokens: Tensor) -> list[Image.Image]:
    """VQ codes `[n, side * side]` to n square RGB images."""
    side, images = math.isqrt(tokens.shape[1]), []
    for part in tokens.split(DECODED_TOGETHER):
        shape = [len(part), mmgpt.gen_embed.weight.shape[1], side, side]
        decoded = mmgpt.gen_vision_model.decode_code(part.to(torch.int), shape=shape).float().permute(0, 2, 3, 1)
        pixels = ((decoded + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)  # on the device: a quarter to copy
        images += [Image.fromarray(image) for image in pixels.cpu().numpy()]
    return images


# --- the reference loop ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    temperature: float = 1,
    parallel_size: int = 16,
    cfg_weight: float = 5,
    image_token_num_per_image: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
) -> Tensor:
    """The reference loop: `parallel_size` images of one rendered prompt, saved to `generated_samples/`.

    Sizes default to the checkpoint's own. Returns the tokens, `[parallel_size, T]` int32.
    """
    own_size, own_patch = image_geometry(mmgpt, vl_chat_processor)
    img_size, patch_size = img_size or own_size, patch_size or own_patch
    image_token_num_per_image = image_token_num_per_image or (img_size // patch_size) ** 2
    embed = mmgpt.language_model.get_input_embeddings()
    device = embed.weight.device

    input_ids = torch.LongTensor(vl_chat_processor.tokenizer.encode(prompt))
    tokens = torch.zeros((parallel_size * 2, len(input_ids)), dtype=torch.int, device=device)
    for i in range(parallel_size * 2):
        tokens[i, :] = input_ids
        if i % 2 != 0:
            tokens[i, 1:-1] = vl_chat_processor.pad_id
    inputs_embeds = embed(tokens)
    generated_tokens = torch.zeros((parallel_size, image_token_num_per_image), dtype=torch.int, device=device)

    outputs = None
    for i in range(image_token_num_per_image):
        outputs = mmgpt.language_model.model(
            inputs_embeds=inputs_embeds, use_cache=True, past_key_values=outputs.past_key_values if outputs else None
        )
        logits = mmgpt.gen_head(outputs.last_hidden_state[:, -1, :])
        logit_cond, logit_uncond = logits[0::2, :], logits[1::2, :]
        logits = logit_uncond + cfg_weight * (logit_cond - logit_uncond)
        probs = torch.softmax(logits / temperature, dim=-1)
        next_token = torch.multinomial(probs, num_samples=1)
        generated_tokens[:, i] = next_token.squeeze(dim=-1)
        next_token = torch.cat([next_token, next_token], dim=1).view(-1)
        inputs_embeds = mmgpt.prepare_gen_img_embeds(next_token).unsqueeze(dim=1)

    os.makedirs("generated_samples", exist_ok=True)
    for i, image in enumerate(tokens_to_images(mmgpt, generated_tokens)):
        image.save(os.path.join("generated_samples", f"img_{i}.jpg"))
    return generated_tokens


# --- how a token is chosen -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from the hidden states. Raises ValueError for a value outside its range.

    layers: contrast layers as `hidden_states` counts them; one is DoLa-static, several are early exit's candidates,
        none is the baseline, which samples from the last layer itself.
    gamma: the contrast's weight; 1 is DoLa, 0 leaves the APC mask alone, with layers or without.
    norm: read the contrast layers through LN_out.
    cfg_order: "guide_first" contrasts the guided layers, "contrast_first" guides the contrasted branches.
    """

    layers: tuple[int, ...] = ()
    alpha: float = DEFAULT_ALPHA
    gamma: float = 1.0
    norm: bool = True
    temperature: float = 1.0
    cfg_weight: float = 5.0
    cfg_order: str = "guide_first"

    def __post_init__(self):
        check_alpha(self.alpha)
        check_gamma(self.gamma)
        check_temperature(self.temperature)
        check_cfg_weight(self.cfg_weight)
        if self.cfg_order not in ("guide_first", "contrast_first"):
            raise ValueError(f"cfg_order must be 'guide_first' or 'contrast_first', got {self.cfg_order!r}")

    @property
    def baseline(self) -> "Decoding":
        """The same sampling with neither contrast nor mask."""
        return replace(self, layers=(), gamma=1.0)


class Choice(NamedTuple):
    """What a step draws from, and what it came from: `probs` (p_hat), `log_qN`, `log_qj`, each `[rows, vocab]`.

    log_qN and log_qj may be off by a constant per row; where nothing is contrasted they are the same. `candidate` is
    early exit's choice among the layers, `[rows]`, else None. With "contrast_first" all but probs have both branches'
    rows, conditional and unconditional ones alternating.
    """

    probs: Tensor
    log_qN: Tensor
    log_qj: Tensor
    candidate: Tensor | None


def choose_token(logits: Tensor, decoding: Decoding) -> Choice:
    """Head logits `[1 + layers, 2 * images, vocab]`, the last layer's first, branches alternating, to p_hat."""
    if not decoding.layers and decoding.gamma != 0:
        guided = guide_logits(logits[0], decoding.cfg_weight)
        return Choice(torch.softmax(guided / decoding.temperature, dim=-1), guided, guided, None)
    guide_first = decoding.cfg_order == "guide_first"
    log_q = torch.log_softmax(guide_logits(logits, decoding.cfg_weight) if guide_first else logits, dim=-1)
    scores, log_qj, candidate = contrast_layers(log_q[0], log_q[1:], decoding.alpha, decoding.gamma)
    if not guide_first:
        scores = guide_scores(scores, decoding.cfg_weight)
    return Choice(probs_from_scores(scores, decoding.temperature), log_q[0], log_qj, candidate)


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """`argmax(p / noise)` with Exp(1) noise: what `torch.multinomial(p, 1)` draws, `[rows, vocab]` -> `[rows]`."""
    return (probs / noise).argmax(-1)


def describe_choice(choice: Choice, decoding: Decoding, noise: Tensor, top_k: int) -> dict[str, Tensor]:
    """What DoLa did in a step to each of its images, `[images]`; q_N is the guided one, which the baseline draws from.

    argmax_changed: whether p_hat's argmax is another than q_N's; layer: the one contrasted with. With a `top_k` also
    what `trace_step` tells, and draw_changed: whether the baseline would have drawn another token with this noise.
    """
    branches = len(choice.log_qN) // len(choice.probs)
    log_qN, log_qj = (guide_logits(x, decoding.cfg_weight) if branches == 2 else x for x in choice[1:3])
    told = {"argmax_changed": choice.probs.argmax(-1) != log_qN.argmax(-1)}
    if decoding.layers:
        chosen = torch.zeros_like(log_qN[:, 0], dtype=torch.long)
        chosen = chosen if choice.candidate is None else choice.candidate[::branches]
        told["layer"] = torch.tensor(decoding.layers, device=log_qN.device)[chosen]
    if top_k:
        told |= trace_step(log_qN, log_qj, choice.probs, top_k)
        noise = noise.reshape(log_qN.shape)
        unchanged = draw(torch.softmax(log_qN / decoding.temperature, dim=-1), noise)
        told["draw_changed"] = unchanged != draw(choice.probs, noise)
    return told


class Record:
    """What DoLa did at each token of each image: the values of `describe_choice`, each `[images, T, ...]`."""

    def __init__(self, images: int, num_tokens: int, top_k: int = 0):
        self.shape, self.top_k = (images, num_tokens), top_k
        self.values: dict[str, Tensor] = {}

    def put(self, draft: "Draft", told: dict[str, Tensor]) -> None:
        """Note what was told `[working * n, ...]` of the first n tokens not final; redraws replace it."""
        for name, value in told.items():
            if name not in self.values:
                self.values[name] = value.new_zeros((*self.shape, *value.shape[1:]))
            value = value.unflatten(0, (len(draft.rows), -1))
            places = draft.places(0, value.shape[1])
            if draft.window == 1:
                self.values[name][draft.rows[:, None], places] = value
            else:
                inside = places < draft.num_tokens  # a window may reach beyond the last token
                rows = draft.rows[:, None].expand_as(places)
                self.values[name][rows[inside], places[inside]] = value[inside]

    def steps(self) -> list[dict[str, Any]]:
        """The same as one dict per token, lists over the images, with (token, probability) pairs for the top-k."""
        listed = {name: value.transpose(0, 1).tolist() for name, value in self.values.items()}
        for name in [name.removesuffix("_tokens") for name in listed if name.endswith("_tokens")]:
            tokens = listed.pop(f"{name}_tokens")
            listed[name] = [
                [list(zip(*pair, strict=True)) for pair in zip(*step, strict=True)]
                for step in zip(tokens, listed[name], strict=True)
            ]
        return [dict(zip(listed, step, strict=True)) for step in zip(*listed.values(), strict=True)]


# --- the backbone: embeddings in, readable states of the wanted layers out --------------------------------------------


class EagerBackbone:
    """The language model's own forward pass with its own cache, one token at a time: any object, any transformers.

    Reads the contrast layers of `decoding`, through LN_out unless its `norm` is False. The other backbone also needs
    the rows that are decoded together, the length of the longest sequence, and the window, which here is always 1.
    """

    window = 1

    def __init__(self, llama, decoding: Decoding, rows: int, length: int, window: int):
        self.llama, self.layers, self.norm = llama, decoding.layers, decoding.norm
        self.past, self.valid = None, None

    def prefill(self, embeds: Tensor, valid: Tensor | None, repeat: Tensor) -> Tensor:
        """Read prompts `[prompts, T, width]` (`valid` `[prompts, T]` marks tokens), repeated by indices `repeat`."""
        self.valid = None if valid is None else valid[repeat]
        return self(embeds[repeat])

    def __call__(self, embeds: Tensor) -> Tensor:
        """`[rows, T, width]` to the last position's `[1 + layers, rows, 1, width]`, the last layer, normed, first."""
        placed: dict[str, Tensor] = {}
        if self.valid is not None:
            if self.past is not None:
                self.valid = torch.nn.functional.pad(self.valid, (0, 1), value=True)
            positions = (self.valid.long().cumsum(-1) - 1).clamp(min=0)
            placed = {"attention_mask": self.valid.long(), "position_ids": positions[:, -embeds.shape[1] :]}
        outputs = self.llama(
            inputs_embeds=embeds,
            use_cache=True,
            past_key_values=self.past,
            output_hidden_states=bool(self.layers),
            **placed,
        )
        self.past = outputs.past_key_values
        states = [outputs.hidden_states[layer][:, -1:] for layer in self.layers]
        return torch.stack(
            [outputs.last_hidden_state[:, -1:], *(self.llama.norm(h) if self.norm else h for h in states)]
        )

    def run(self, step: Callable[..., Any], done: Sequence[int], *inputs: Tensor) -> Any:
        """One step on tensors that begin with an axis of images, of which so many tokens are done; calls self once."""
        return step(*inputs)

    def keep(self, images: Sequence[int]) -> list[int]:
        """Go on with these images, out of those in work: with a window of 1 all or none."""
        return list(images)


def pick_backbone(llama) -> type[Any]:
    """The static-cache backbone where this is transformers' own LLaMA with sdpa, else the eager one."""
    try:
        from janus.dola.static_backbone import StaticBackbone
    except ImportError:  # a checkout of the original code
        return EagerBackbone
    return StaticBackbone if StaticBackbone.serves(llama) else EagerBackbone


# --- several tokens per pass -----------------------------------------------------------------------------------------


def pick_window(window: int | None, images: int) -> int:
    """The window asked for, else the one that measured fastest with so many images at once (docs/windows.md).

    Raises ValueError for one below 1.
    """
    if window is None:
        return next((fastest for most, fastest in FASTEST_WINDOWS.items() if images <= most), 1)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
    return window


class Draft:
    """Tokens of images in work: of each the final ones, and behind them guesses at those that follow.

    A token is a function of the tokens before it and of its own noise (`draw`). So a pass may redraw a whole window of
    guesses: all redraws up to the first that differs from its guess, that one included, are what drawing one by one
    gives (the sequence is the fixed point of this Jacobi iteration). Images progress each at its own pace.
    """

    def __init__(self, images: int, num_tokens: int, window: int, device: torch.device):
        self.num_tokens, self.window = num_tokens, window
        self.tokens = torch.zeros((images, num_tokens + 2 * window), dtype=torch.long, device=device)
        self.final = torch.zeros(images, dtype=torch.long, device=device)  # how many of an image's tokens are final
        self.rows = torch.arange(images, device=device)  # of the images in work
        self.images, self.done = list(range(images)), [0] * images  # both on the host, of those in work

    def places(self, start: int, stop: int) -> Tensor:
        """From `start` to `stop`, counted from the first token not final, of each image in work, `[working, n]`."""
        return self.final[self.rows, None] + torch.arange(start, stop, device=self.final.device)

    def inputs(self) -> Tensor:
        """What each image in work reads next: its last final token, then guesses, `[working, window]`."""
        return self.tokens[self.rows[:, None], self.places(-1, self.window - 1)].clamp(min=0)

    def accept(self, drawn: Tensor) -> list[range]:
        """Take redraws `[working, n]` of the first n tokens not final; the places of each image that are so now."""
        places, rows, before = self.places(0, drawn.shape[1]), self.rows[:, None], self.done
        if self.window == 1:
            self.final += 1
            self.done = [n + 1 for n in before]
        else:
            agreed = (drawn == self.tokens[rows, places])[:, :-1].long().cumprod(1).sum(1)
            self.final[self.rows] = (self.final[self.rows] + 1 + agreed).clamp(max=self.num_tokens)
            self.done = self.final[self.rows].tolist()
        self.tokens[rows, places] = drawn
        self.guess(places[:, -1:])
        return list(map(range, before, self.done))

    def guess(self, last: Tensor) -> None:
        """Fill the window behind the places `last` `[working, 1]` with the tokens above, in the first row the last."""
        beyond, side = torch.arange(self.window - 1, device=last.device), math.isqrt(self.num_tokens)
        above = last + 1 + beyond % side - side
        rows = self.rows[:, None]
        self.tokens[rows, last + 1 + beyond] = self.tokens[rows, torch.where(above < 0, last, above)]

    def result(self) -> Tensor:
        """The tokens `[images, T]`. Raises ValueError where some were drawn from probabilities that are NaN."""
        tokens = self.tokens[:, : self.num_tokens]
        if (tokens < 0).any():
            image, place = (tokens < 0).nonzero()[0].tolist()
            raise ValueError(
                f"the model gave NaN at token {place} of image {image}: its dtype may be too narrow for it"
            )
        return tokens

    def unfinished(self) -> list[int]:
        """Which of the images in work lack tokens, as indices into them."""
        return [i for i, done in enumerate(self.done) if done < self.num_tokens]

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these of the images in work."""
        if len(kept) == len(self.images):
            return
        self.rows = self.rows[list(kept)]
        self.images, self.done = [self.images[i] for i in kept], [self.done[i] for i in kept]


class Noise:
    """Exp(1) noise of every image and place, drawn in the order of one by one, and kept until it is used.

    Place after place, each prompt's generator draws for all of its `parallel_size` samples, whichever are asked for.
    """

    def __init__(self, draft: Draft, seeds: Sequence[int | None], parallel_size: int, samples: slice, vocab: int):
        device, places = draft.tokens.device, 1 if draft.window == 1 else draft.num_tokens
        self.draft, self.generators = draft, make_generators(seeds, device)
        self.parallel_size, self.samples, self.drawn = parallel_size, samples, 0
        self.values = torch.empty((len(seeds), len(range(parallel_size)[samples]), places, vocab), device=device)

    def take(self, n: int) -> Tensor:
        """That of the first n tokens not final of each image in work, `[working, n, vocab]`."""
        places, draft = self.values.shape[2], self.draft
        while self.drawn < min(max(draft.done) + n, draft.num_tokens):
            fill_noise(self.values[:, :, self.drawn % places], self.generators, self.parallel_size, self.samples)
            self.drawn += 1
        values = self.values.flatten(0, 1)
        if places > 1:
            values = values[draft.rows[:, None], draft.places(0, n).clamp(max=places - 1)]
        self.taken = values
        return values


# --- the loop --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample_image_tokens(
    mmgpt,
    vl_chat_processor,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    parallel_size: int = 16,
    seeds: Sequence[int | None] | None = None,
    samples: slice = slice(None),
    window: int | None = None,
    record: Record | None = None,
    on_step: Callable[[int], None] | None = None,
    watch: Callable[[Draft], None] | None = None,
) -> Tensor:
    """Image tokens `[prompts, samples, T]` int64 for rendered prompts, all in one batch.

    Each prompt's noise is drawn from a generator of its own seed for all of its `parallel_size` samples, whatever else
    is in the batch and whichever `samples` of them are asked for; a seed of None takes torch's global generator.
    `window` tokens of an image are decoded per pass (`Draft`, `pick_window`). `on_step` is called after each pass with
    the number of tokens, over all images, that it made final, and `watch` with the tokens themselves.
    """
    llama, embed = mmgpt.language_model.model, mmgpt.language_model.get_input_embeddings()
    device, num_tokens = embed.weight.device, num_image_tokens(mmgpt, vl_chat_processor)
    ids, valid = pack_prompts(vl_chat_processor, prompts, device)
    repeat = repeat_pairs(len(prompts), len(range(parallel_size)[samples])).to(device)
    images, length = len(repeat) // 2, ids.shape[1] + num_tokens
    backbone = pick_backbone(llama)(llama, decoding, 2 * images, length, pick_window(window, images))
    draft = Draft(images, num_tokens, backbone.window, device)
    noise = Noise(draft, seeds or [None] * len(prompts), parallel_size, samples, len(mmgpt.gen_embed.weight))
    step = partial(decode_window, mmgpt, decoding, backbone)
    drawn, choice = draw_tokens(mmgpt, decoding, backbone.prefill(embed(ids), valid, repeat), noise.take(1))
    while True:
        if record is not None:
            record.put(draft, describe_choice(choice, decoding, noise.taken, record.top_k))
        spans = draft.accept(drawn)
        if on_step is not None:
            on_step(sum(map(len, spans)))
        if watch is not None:
            watch(draft)
        draft.keep(backbone.keep(draft.unfinished()))
        if not draft.images:
            return draft.result().reshape(len(prompts), -1, num_tokens)
        drawn, choice = backbone.run(step, draft.done, draft.inputs(), noise.take(draft.window))


def repeat_pairs(prompts: int, samples: int) -> Tensor:
    """Which packed row each decoded one repeats, `[2 * prompts * samples]`; prompt p is packed in rows 2p, 2p + 1."""
    return torch.arange(2 * prompts).view(prompts, 1, 2).expand(-1, samples, 2).reshape(-1)


def make_generators(seeds: Iterable[int | None], device: torch.device) -> list[torch.Generator | None]:
    """A generator for each seed: CUDA's own on CUDA, the CPU's for every other device."""
    where = device if device.type == "cuda" else "cpu"
    return [None if seed is None else torch.Generator(where).manual_seed(seed) for seed in seeds]


def fill_noise(noise: Tensor, generators: Sequence[torch.Generator | None], parallel_size: int, samples: slice) -> None:
    """Exp(1) noise of one place into `[prompts, samples, vocab]`: of all of a prompt's samples, those asked for."""
    for of_prompt, generator in zip(noise, generators, strict=True):
        device = noise.device if generator is None else generator.device
        if len(of_prompt) == parallel_size and device.type == noise.device.type:
            of_prompt.exponential_(generator=generator)
        else:
            whole = noise.new_empty((parallel_size, noise.shape[-1]), device=device)
            of_prompt.copy_(whole.exponential_(generator=generator)[samples])


def draw_tokens(mmgpt, decoding: Decoding, states: Tensor, noise: Tensor) -> tuple[Tensor, Choice]:
    """Read states `[1 + layers, 2 * images, n, width]` and draw n tokens of each image, `[images, n]`; of NaN, -1."""
    images, n = noise.shape[:2]
    states = states.unflatten(1, (images, 2)).transpose(2, 3).flatten(1, 3)  # the branches alternate
    choice = choose_token(mmgpt.gen_head(states).float(), decoding)
    tokens = draw(choice.probs, noise.flatten(0, 1))
    drawn_from = choice.probs.gather(-1, tokens[:, None])[:, 0]  # argmax takes NaN for the largest
    return tokens.masked_fill(drawn_from.isnan(), -1).view(images, n), choice


def decode_window(mmgpt, decoding: Decoding, backbone, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Choice]:
    """Tokens `[images, n]` through the backbone, and what follows each of them; both branches read the same."""
    embeds = mmgpt.prepare_gen_img_embeds(tokens.repeat_interleave(2, dim=0))
    return draw_tokens(mmgpt, decoding, backbone(embeds), noise)


# --- one prompt ------------------------------------------------------------------------------------------------------


def generate_decoded(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    decoding: Decoding,
    *,
    parallel_size: int = 16,
    seed: int | None = None,
    window: int | None = None,
    trace: list[dict[str, Any]] | None = None,
) -> tuple[list[Image.Image], Tensor]:
    """Images of one rendered prompt by any decoding, and their tokens `[parallel_size, T]` int64.

    Decodings called with one seed share their noise, whatever the `window`, the tokens of an image decoded per pass. A
    list given as `trace` receives one dict per token (`Record.steps`), with the top-5.
    """
    record = None if trace is None else Record(parallel_size, num_image_tokens(mmgpt, vl_chat_processor), top_k=5)
    (tokens,) = sample_image_tokens(
        mmgpt,
        vl_chat_processor,
        [prompt],
        decoding,
        parallel_size=parallel_size,
        seeds=[seed],
        window=window,
        record=record,
    )
    if trace is not None and record is not None:
        trace += record.steps()
    return tokens_to_images(mmgpt, tokens), tokens


class SamplingOptions(TypedDict, total=False):
    """What both DoLa forms take beside their layers, for the type checker; defaults stand in the functions."""

    alpha: float
    gamma: float
    norm: bool
    cfg_order: str
    use_dola: bool
    temperature: float
    parallel_size: int
    cfg_weight: float | None
    seed: int | None
    window: int | None
    trace: list[dict[str, Any]] | None


class StaticOptions(SamplingOptions, total=False):
    layer: int | None
    layer_ratio: float


class EarlyExitOptions(SamplingOptions, total=False):
    candidate_layers: Sequence[int]


@overload
def generate_with_dola_static(
    mmgpt, vl_chat_processor, prompt: str, *, return_tokens: Literal[False] = False, **options: Unpack[StaticOptions]
) -> list[Image.Image]: ...
@overload
def generate_with_dola_static(
    mmgpt, vl_chat_processor, prompt: str, *, return_tokens: Literal[True], **options: Unpack[StaticOptions]
) -> tuple[list[Image.Image], Tensor]: ...
def generate_with_dola_static(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    *,
    # DoLa
    layer: int | None = None,
    layer_ratio: float = DEFAULT_LAYER_RATIO,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    cfg_order: str = "guide_first",
    use_dola: bool = True,
    # sampling
    temperature: float | None = None,
    parallel_size: int = 16,
    cfg_weight: float | None = None,
    seed: int | None = None,
    window: int | None = None,
    # output
    return_tokens: bool = False,
    trace: list[dict[str, Any]] | None = None,
) -> list[Image.Image] | tuple[list[Image.Image], Tensor]:
    """Images of one rendered prompt, contrasting the last layer with a fixed earlier one at every step.

    `layer` is in 1..N (N, like `use_dola=False`, samples from the last layer: in float32 the tokens of `generate` for
    the same seed); without it, `layer_ratio` of the depth. `gamma=0` is APC only, and `norm=False` reads the layer
    without LN_out. `cfg_weight` and `temperature` default to the checkpoint's own. `window` tokens of an image are
    decoded per pass, to the same tokens (None: what measured fastest). A list given as `trace` receives one dict per
    token (`Record.steps`). Returns the PIL images, or with `return_tokens` (images, tokens `[parallel_size, T]` int64).
    Raises ValueError for a layer, ratio, alpha, gamma, temperature, cfg_weight, cfg_order or window out of range.
    """
    layers = pick_contrast_layers(len(mmgpt.language_model.model.layers), layer, layer_ratio)
    sampling = default_sampling(mmgpt, cfg_weight, temperature)
    decoding = Decoding(layers, alpha, gamma, norm, cfg_order=cfg_order, **sampling)
    images, tokens = generate_decoded(
        mmgpt,
        vl_chat_processor,
        prompt,
        decoding if use_dola else decoding.baseline,
        parallel_size=parallel_size,
        seed=seed,
        window=window,
        trace=trace,
    )
    return (images, tokens) if return_tokens else images


@overload
def generate_with_dola(
    mmgpt, vl_chat_processor, prompt: str, *, return_tokens: Literal[False] = False, **options: Unpack[EarlyExitOptions]
) -> list[Image.Image]: ...
@overload
def generate_with_dola(
    mmgpt, vl_chat_processor, prompt: str, *, return_tokens: Literal[True], **options: Unpack[EarlyExitOptions]
) -> tuple[list[Image.Image], Tensor]: ...
def generate_with_dola(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    *,
    # DoLa
    candidate_layers: Sequence[int] = (22, 24, 26, 28),
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    cfg_order: str = "guide_first",
    use_dola: bool = True,
    # sampling
    temperature: float | None = None,
    parallel_size: int = 16,
    cfg_weight: float | None = None,
    seed: int | None = None,
    window: int | None = None,
    # output
    return_tokens: bool = False,
    trace: list[dict[str, Any]] | None = None,
) -> list[Image.Image] | tuple[list[Image.Image], Tensor]:
    """The early-exit form: at every step, each row contrasts with the candidate that differs most from the last layer.

    Candidates outside 1..N-1 are dropped. Otherwise as `generate_with_dola_static`; raises ValueError also where no
    candidate is left.
    """
    layers = pick_contrast_layers(len(mmgpt.language_model.model.layers), candidate_layers=candidate_layers)
    sampling = default_sampling(mmgpt, cfg_weight, temperature)
    decoding = Decoding(layers, alpha, gamma, norm, cfg_order=cfg_order, **sampling)
    images, tokens = generate_decoded(
        mmgpt,
        vl_chat_processor,
        prompt,
        decoding if use_dola else decoding.baseline,
        parallel_size=parallel_size,
        seed=seed,
        window=window,
        trace=trace,
    )
    return (images, tokens) if return_tokens else images


DEFAULT_PROMPT = "a red circle above a blue star on a white background"


def main() -> None:
    from janus.dola.cli import CommandParser, add_model_arguments, positive
    from janus.dola.loading import load_pretrained_model

    parser = CommandParser(description="The reference text-to-image loop: one prompt to generated_samples/.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help='what to paint (default: "%(default)s")')
    parser.add_argument("--parallel_size", type=positive, default=16, help="images (default: %(default)s)")
    parser.add_argument("--cfg_weight", type=float, help="guidance (default: the checkpoint's own, else 5)")
    parser.add_argument("--temperature", type=float, help="above 0 (default: the checkpoint's own, else 1)")
    parser.add_argument("--seed", type=int, help="seed of torch's generator (default: none)")
    args = parser.parse_args()
    if args.temperature is not None:
        check_temperature(args.temperature)
    if args.cfg_weight is not None:
        check_cfg_weight(args.cfg_weight)
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    sampling = default_sampling(model, args.cfg_weight, args.temperature)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    prompt = format_image_prompt(processor, args.prompt)
    generate(model, processor, prompt, parallel_size=args.parallel_size, **sampling)
    print(f"{args.parallel_size} images in generated_samples/")


if __name__ == "__main__":
    try:
        from janus.dola.cli import run_command
    except ImportError:
        print("error: this command needs the folder janus/dola/ beside it", file=sys.stderr)
        raise SystemExit(2) from None
    run_command(main)
