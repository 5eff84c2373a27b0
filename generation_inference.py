"""Text to image with Janus: the reference loop, and the same loop with DoLa between hidden states and next token.

Everything here works on any object with the attribute names of a Janus model, the original code's included.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dola_runtime import (
    apc_mask,
    contrast_with_apc_from_logprobs,
    guide_logits,
    guide_scores,
    pick_static_layer_index,
    probs_from_scores,
    sanitize_candidate_layers,
    select_layer_by_jsd,
)

DECODED_TOGETHER = 16
"""Images that the VQ decoder turns to pixels at a time: its full-size feature maps are what takes memory there."""


def chat_roles(tokenizer) -> tuple[str, str]:
    """The (user, assistant) names a checkpoint was trained with: Janus-Pro has tokens of its own for them."""
    if len(tokenizer.encode("<|User|>", add_special_tokens=False)) == 1:
        return "<|User|>", "<|Assistant|>"
    return "User", "Assistant"


def format_image_prompt(vl_chat_processor, text: str) -> str:
    """The text as the chat string that asks for an image, ending in `<begin_of_image>`."""
    user, assistant = chat_roles(vl_chat_processor.tokenizer)
    rendered = vl_chat_processor.apply_sft_template_for_multi_turn_prompts(
        conversations=[{"role": user, "content": text}, {"role": assistant, "content": ""}],
        sft_format=vl_chat_processor.sft_format,
        system_prompt="",
    )
    return rendered + vl_chat_processor.image_start_tag


def image_geometry(mmgpt, vl_chat_processor) -> tuple[int, int]:
    """(side of a generated image, side of the patch one code stands for), in pixels."""
    return vl_chat_processor.image_processor.image_size, 2 ** (mmgpt.gen_vision_model.decoder.num_resolutions - 1)


def own_guidance(mmgpt) -> float:
    """The checkpoint's own guidance: `guidance_scale` of its generation_config.json, 5 where it carries none."""
    return getattr(getattr(mmgpt, "generation_config", None), "guidance_scale", None) or 5.0


@torch.inference_mode()
def tokens_to_images(mmgpt, tokens: Tensor, img_size: int, patch_size: int) -> list[Image.Image]:
    """VQ codes `[n, T]` to n RGB images of side `img_size`."""
    side, images = img_size // patch_size, []
    for part in tokens.split(DECODED_TOGETHER):
        shape = [len(part), mmgpt.gen_embed.weight.shape[1], side, side]
        decoded = mmgpt.gen_vision_model.decode_code(part.to(torch.int), shape=shape)
        pixels = decoded.to(torch.float32).cpu().numpy().transpose(0, 2, 3, 1)
        images += [Image.fromarray(image) for image in np.clip((pixels + 1) / 2 * 255, 0, 255).astype(np.uint8)]
    return images


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
    for i, image in enumerate(tokens_to_images(mmgpt, generated_tokens, img_size, patch_size)):
        image.save(os.path.join("generated_samples", f"img_{i}.jpg"))
    return generated_tokens


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from the hidden states. Raises ValueError for a value outside its range.

    layers: contrast layers, counted as `hidden_states` counts them; one is DoLa-static, several are early exit's
        candidates, none samples from the last layer itself.
    cfg_order: "guide_first" contrasts the guided layers, "contrast_first" guides the contrasted branches.
    contrast: False keeps the APC mask but samples from q_N on it.
    """

    layers: tuple[int, ...] = ()
    alpha: float = 0.1
    temperature: float = 1.0
    cfg_weight: float = 5.0
    cfg_order: str = "guide_first"
    contrast: bool = True

    def __post_init__(self):
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0.0 <= self.cfg_weight < float("inf"):
            raise ValueError(f"cfg_weight must be at least 0 and finite, got {self.cfg_weight}")
        if self.cfg_order not in ("guide_first", "contrast_first"):
            raise ValueError(f"cfg_order must be 'guide_first' or 'contrast_first', got {self.cfg_order!r}")


def static_layers(mmgpt, layer: int | None = None, layer_ratio: float = 0.8) -> tuple[int, ...]:
    """The fixed contrast layer, given or by ratio; `layer=N` is the bypass, and gives none.

    Raises ValueError for a layer outside 1..N.
    """
    num_layers = len(mmgpt.language_model.model.layers)
    if layer is None:
        layer = pick_static_layer_index(num_layers, layer_ratio)
    if not 1 <= layer <= num_layers:
        raise ValueError(f"layer must be in 1..{num_layers} (the model has {num_layers} layers), got {layer}")
    return () if layer == num_layers else (layer,)


# --- one step, as functions of tensors -------------------------------------------------------------------------------


def next_token_probs(logits: Tensor, decoding: Decoding, trace: list[dict[str, Any]] | None = None) -> Tensor:
    """Head logits `[1 + layers, 2 * rows, vocab]` to p_hat `[rows, vocab]`.

    The last layer comes first; conditional and unconditional rows alternate.
    """
    if not decoding.layers and decoding.contrast:
        guided = guide_logits(logits[0], decoding.cfg_weight)
        probs = torch.softmax(guided / decoding.temperature, dim=-1)
        if trace is not None:
            log_qN = torch.log_softmax(guided, dim=-1)
            trace.append(trace_step(log_qN, log_qN, probs, None, decoding))
        return probs
    guide_first = decoding.cfg_order == "guide_first"
    log_q = torch.log_softmax(guide_logits(logits, decoding.cfg_weight) if guide_first else logits, dim=-1)
    log_qN, choice = log_q[0], None
    if not decoding.contrast:
        log_qj, scores = log_qN, log_qN.masked_fill(~apc_mask(log_qN, decoding.alpha), -torch.inf)
    else:
        log_qj = log_q[1]
        if len(decoding.layers) > 1:
            choice = select_layer_by_jsd(log_qN, log_q[1:])
            log_qj = log_q[1:].gather(0, choice[None, :, None].expand(1, *log_qN.shape))[0]
        scores = contrast_with_apc_from_logprobs(log_qN, log_qj, decoding.alpha)
    if not guide_first:
        scores = guide_scores(scores, decoding.cfg_weight)
    probs = probs_from_scores(scores, decoding.temperature)
    if trace is not None:
        step = 1 if guide_first else 2  # without guidance before it, a step is traced on the conditional rows
        trace.append(
            trace_step(log_qN[::step], log_qj[::step], probs, None if choice is None else choice[::step], decoding)
        )
    return probs


def trace_step(
    log_qN: Tensor, log_qj: Tensor, probs: Tensor, choice: Tensor | None, decoding: Decoding, top_k: int = 5
) -> dict[str, Any]:
    """One step for diagnosis: top-k (token, probability) of q_N, q_j* and p_hat, DoLa's effect, the layer; per row."""

    def top(p: Tensor) -> list[list[tuple[int, float]]]:
        values, tokens = p.topk(min(top_k, p.shape[-1]))
        return [list(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]

    if choice is None:
        layer = [decoding.layers[0] if decoding.layers else None] * len(probs)
    else:
        layer = [decoding.layers[i] for i in choice.tolist()]
    return {
        "q_N": top(log_qN.exp()),
        "q_j": top(log_qj.exp()),
        "p_hat": top(probs),
        "argmax_changed": (probs.argmax(-1) != log_qN.argmax(-1)).tolist(),
        "layer": layer,
    }


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """`argmax(p / noise)` with Exp(1) noise: what `torch.multinomial(p, 1)` draws, `[rows, vocab]` -> `[rows]`."""
    return (probs / noise).argmax(-1)


# --- the backbone: embeddings in, readable states of the wanted layers at the last position out -----------------------


class EagerBackbone:
    """The language model's own forward pass with its own cache: any object, any transformers."""

    def __init__(self, llama, layers: Sequence[int], **_):
        self.llama, self.layers = llama, layers
        self.past, self.valid = None, None

    def prefill(self, embeds: Tensor, valid: Tensor | None, rows: Tensor, **_) -> Tensor:
        """Read the prompts `[prompts, T, width]`, repeated as `rows` says; `valid` `[prompts, T]` marks real tokens."""
        self.valid = None if valid is None else valid[rows]
        return self(embeds[rows])

    def __call__(self, embeds: Tensor) -> Tensor:
        """`[rows, T, width]` to `[1 + layers, rows, width]`, the last layer first, all of them normed."""
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
        states = [self.llama.norm(outputs.hidden_states[layer][:, -1]) for layer in self.layers]
        return torch.stack([outputs.last_hidden_state[:, -1], *states])


def pick_backbone(llama) -> Callable[..., Any]:
    """The static-cache backbone where this is transformers' own LLaMA with sdpa, else the eager one."""
    try:
        from janus.dola.static_backbone import StaticBackbone
    except ImportError:  # a checkout of the original code
        return EagerBackbone
    return StaticBackbone if StaticBackbone.serves(llama) else EagerBackbone


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
    rows: slice = slice(None),
    num_tokens: int | None = None,
    trace: list[dict[str, Any]] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Image tokens `[prompts, rows, T]` int64 for rendered prompts, all in one batch.

    Each prompt's noise is drawn from a generator of its own seed for all of its `parallel_size` rows, whatever else is
    in the batch and whichever `rows` of them are asked for; a seed of None takes torch's global generator.
    """
    size, patch = image_geometry(mmgpt, vl_chat_processor)
    num_tokens = num_tokens or (size // patch) ** 2
    embed = mmgpt.language_model.get_input_embeddings()
    device = embed.weight.device
    generators = [
        None if seed is None else torch.Generator(device).manual_seed(seed) for seed in seeds or [None] * len(prompts)
    ]
    ids, valid = pack_prompts(vl_chat_processor, prompts)
    per_prompt = len(range(parallel_size)[rows])
    total = per_prompt * len(prompts)
    # prompt p is packed as rows 2p (cond) and 2p + 1 (uncond); every image repeats that pair
    pair = torch.arange(2 * len(prompts)).view(-1, 1, 2).expand(-1, per_prompt, 2).reshape(-1)
    backbone = pick_backbone(mmgpt.language_model.model)(
        mmgpt.language_model.model, decoding.layers, rows=2 * total, length=ids.shape[1] + num_tokens
    )

    def read(states: Tensor) -> Tensor:
        return next_token_probs(mmgpt.gen_head(states).float(), decoding, trace)

    vocab = mmgpt.gen_embed.weight.shape[0]
    noise = torch.empty((len(prompts), per_prompt, vocab), device=device)
    token = torch.empty(total, dtype=torch.long, device=device)
    drawn = torch.empty_like(token)
    tokens = torch.empty((total, num_tokens), dtype=torch.long, device=device)

    def step() -> None:
        embeds = mmgpt.prepare_gen_img_embeds(token.repeat_interleave(2)).unsqueeze(1)
        drawn.copy_(draw(read(backbone(embeds)), noise.view(total, vocab)))

    for i in range(num_tokens):
        for row, generator in zip(noise, generators, strict=True):
            row.copy_(torch.empty((parallel_size, vocab), device=device).exponential_(generator=generator)[rows])
        if i == 0:
            states = backbone.prefill(
                embed(ids.to(device)), None if valid is None else valid.to(device), pair.to(device)
            )
            drawn.copy_(draw(read(states), noise.view(total, vocab)))
        elif trace is None and hasattr(backbone, "run"):
            backbone.run(step)
        else:
            step()
        token.copy_(drawn)
        tokens[:, i] = drawn
        if on_step is not None:
            on_step()
    return tokens.view(len(prompts), per_prompt, num_tokens)


def pack_prompts(vl_chat_processor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
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
    return ids, None if valid.all() else valid


def _generate_one(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    decoding: Decoding,
    parallel_size: int,
    seed: int | None,
    return_tokens: bool,
    trace: list[dict[str, Any]] | None,
) -> Any:
    tokens = sample_image_tokens(
        mmgpt, vl_chat_processor, [prompt], decoding, parallel_size=parallel_size, seeds=[seed], trace=trace
    )[0]
    images = tokens_to_images(mmgpt, tokens, *image_geometry(mmgpt, vl_chat_processor))
    return (images, tokens) if return_tokens else images


def generate_with_dola_static(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    *,
    # DoLa
    layer: int | None = None,
    layer_ratio: float = 0.8,
    alpha: float = 0.1,
    cfg_order: str = "guide_first",
    use_dola: bool = True,
    # sampling
    temperature: float = 1.0,
    parallel_size: int = 16,
    cfg_weight: float = 5.0,
    seed: int | None = None,
    # output
    return_tokens: bool = False,
    trace: list[dict[str, Any]] | None = None,
) -> Any:
    """Images of one rendered prompt, contrasting the last layer with a fixed earlier one at every step.

    `layer` is in 1..N (N, like `use_dola=False`, samples from the last layer: in float32 the tokens of `generate` for
    the same seed); without it, `layer_ratio` of the depth. A list given as `trace` receives one dict per step
    (`trace_step`). Returns the PIL images, or with `return_tokens` (images, tokens `[parallel_size, T]` int64).
    Raises ValueError for a layer, ratio, alpha, temperature, cfg_weight or cfg_order outside its range.
    """
    layers = static_layers(mmgpt, layer, layer_ratio)
    decoding = Decoding(layers if use_dola else (), alpha, temperature, cfg_weight, cfg_order)
    return _generate_one(mmgpt, vl_chat_processor, prompt, decoding, parallel_size, seed, return_tokens, trace)


def generate_with_dola(
    mmgpt,
    vl_chat_processor,
    prompt: str,
    *,
    # DoLa
    candidate_layers: Sequence[int] = (22, 24, 26, 28),
    alpha: float = 0.1,
    cfg_order: str = "guide_first",
    use_dola: bool = True,
    # sampling
    temperature: float = 1.0,
    parallel_size: int = 16,
    cfg_weight: float = 5.0,
    seed: int | None = None,
    # output
    return_tokens: bool = False,
    trace: list[dict[str, Any]] | None = None,
) -> Any:
    """The early-exit form: at every step, each row contrasts with the candidate that differs most from the last layer.

    Candidates outside 1..N-1 are dropped. Otherwise as `generate_with_dola_static`; raises ValueError also where no
    candidate is left.
    """
    layers = sanitize_candidate_layers(candidate_layers, len(mmgpt.language_model.model.layers))
    decoding = Decoding(tuple(layers) if use_dola else (), alpha, temperature, cfg_weight, cfg_order)
    return _generate_one(mmgpt, vl_chat_processor, prompt, decoding, parallel_size, seed, return_tokens, trace)


def main() -> None:
    from janus.dola.cli import CommandParser, add_model_arguments, positive
    from janus.dola.loading import load_pretrained_model

    parser = CommandParser(description="The reference text-to-image loop: one prompt to generated_samples/.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what to paint")
    parser.add_argument("--parallel_size", type=positive, default=16, help="images (default: %(default)s)")
    parser.add_argument("--cfg_weight", type=float, help="guidance (default: the checkpoint's own, else 5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of torch's generator (default: none)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device)
    cfg_weight = own_guidance(model) if args.cfg_weight is None else args.cfg_weight
    Decoding(temperature=args.temperature, cfg_weight=cfg_weight)  # the check of both
    if args.seed is not None:
        torch.manual_seed(args.seed)
    prompt = format_image_prompt(processor, args.prompt)
    generate(model, processor, prompt, args.temperature, args.parallel_size, cfg_weight)
    print(f"{args.parallel_size} images in generated_samples/")


if __name__ == "__main__":
    from janus.dola.cli import run_command

    run_command(main)
