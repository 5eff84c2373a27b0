"""Reading and writing Janus checkpoints: the names of both formats, and the config, weights and model they make."""

import copy
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from janus.dola.checkpoint_files import (
    AS_IS,
    CheckpointError,
    WeightRule,
    load_weights,
    read_json,
    read_settings,
    refusing,
    resolve_directory,
    return_freed_memory,
    rows,
    translate,
)
from janus.dola.quantize import linear_quantizer
from janus.dola.schema import Nullable, either, number, several
from janus.models.configuration import TOKEN, MultiModalityConfig

if TYPE_CHECKING:
    from janus.models.modeling import MultiModalityCausalLM

# --- names -----------------------------------------------------------------------------------------------------------


def _under(stored: str, own: str, *rules: WeightRule) -> tuple[WeightRule, ...]:
    """The rules with both prefixes put in front."""
    return tuple(
        WeightRule(stored + r.stored, own + r.own, r.stored_thirds, r.own_thirds, r.leading_axis) for r in rules
    )


ORIGINAL_FORMAT = (
    *_under(
        "vision_model.vision_tower.",
        "vision_model.vision_tower.",
        WeightRule("pos_embed", "embeddings.position_embedding.weight", leading_axis=True),
        WeightRule("patch_embed.proj.", "embeddings.patch_embedding."),
        WeightRule("blocks.#.norm1.", "encoder.layers.#.layer_norm1."),
        WeightRule("blocks.#.norm2.", "encoder.layers.#.layer_norm2."),
        WeightRule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.q_proj.", stored_thirds=(0, 1)),
        WeightRule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.k_proj.", stored_thirds=(1, 2)),
        WeightRule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.v_proj.", stored_thirds=(2, 3)),
        WeightRule("blocks.#.attn.proj.", "encoder.layers.#.self_attn.out_proj."),
        WeightRule("blocks.#.mlp.", "encoder.layers.#.mlp."),
        WeightRule("norm.", "post_layernorm."),
        WeightRule("attn_pool.latent", "head.probe"),
        WeightRule("attn_pool.q.", "head.attention.in_proj_", own_thirds=(0, 1)),
        WeightRule("attn_pool.kv.", "head.attention.in_proj_", own_thirds=(1, 3)),
        WeightRule("attn_pool.proj.", "head.attention.out_proj."),
        WeightRule("attn_pool.norm.", "head.layernorm."),
        WeightRule("attn_pool.mlp.", "head.mlp."),
    ),
    *(
        rule
        for aligner in ("aligner.", "gen_aligner.")
        for rule in _under(
            aligner,
            aligner,
            WeightRule("layers.0.", "fc1."),
            *(WeightRule(f"layers.{2 * k + 2}.", f"hidden_layers.{k}.") for k in range(4)),
        )
    ),
    WeightRule("gen_head.output_mlp_projector.", "gen_head.proj_out."),
    *(
        rule
        for half, blocks in (("encoder.", "down.#."), ("decoder.", "up.#."))
        for rule in _under(
            f"gen_vision_model.{half}",
            f"gen_vision_model.{half}",
            WeightRule("conv_blocks.#.res.", f"{blocks}block."),
            WeightRule("conv_blocks.#.attn.", f"{blocks}attn."),
            WeightRule("conv_blocks.#.downsample.", f"{blocks}downsample."),
            WeightRule("conv_blocks.#.upsample.", f"{blocks}upsample."),
            WeightRule("mid.0.", "mid.block_1."),
            WeightRule("mid.1.", "mid.attn_1."),
            WeightRule("mid.2.", "mid.block_2."),
        )
    ),
)

TRANSFORMERS_FORMAT = (
    *_under(
        "model.vision_model.",
        "vision_model.vision_tower.",
        WeightRule("", ""),
        WeightRule("encoder.layers.#.self_attn.projection_layer.", "encoder.layers.#.self_attn.out_proj."),
    ),
    WeightRule("model.aligner.", "aligner."),
    WeightRule("model.vqmodel.", "gen_vision_model."),
    WeightRule("model.generation_embeddings.", "gen_embed."),
    WeightRule("model.generation_aligner.", "gen_aligner."),
    WeightRule("model.generation_head.", "gen_head."),
    WeightRule("model.language_model.", "language_model.model."),
    WeightRule("lm_head.", "language_model.lm_head."),
)

# --- files -> model --------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> tuple[MultiModalityConfig, tuple[WeightRule, ...]]:
    """The checkpoint's config in the original form, and the table that translates its weight names."""
    path = directory / "config.json"
    content = read_json(path)
    try:
        match content.get("model_type"):
            case "multi_modality":
                return MultiModalityConfig.from_dict(content), ORIGINAL_FORMAT
            case "janus":
                return MultiModalityConfig.from_transformers(content), TRANSFORMERS_FORMAT
    except Exception as error:  # transformers validates with several exception types
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
    raise CheckpointError(
        f"{path}: model_type {content.get('model_type')!r} is not Janus's (expected 'multi_modality' or 'janus')"
    )


GENERATION = {
    "guidance_scale": Nullable(number(0, 1e4)),
    "temperature": Nullable(number(1e-4, 1e4)),
    "pad_token_id": Nullable(TOKEN),
    "bos_token_id": Nullable(TOKEN),
    "eos_token_id": Nullable(either(TOKEN, several(TOKEN, 1, 64))),
}


def load_model(
    cls: type["MultiModalityCausalLM"],
    path_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    config: MultiModalityConfig | None = None,
    attn_implementation: str | None = None,
    quantize: str | None = None,
    offload: bool = False,
    **hub: Any,
) -> "MultiModalityCausalLM":
    """Build the model without memory, then fill it tensor by tensor in the target dtype and device.

    With `quantize` each linear layer of the LLaMA's blocks is quantised as soon as it is filled, before the next is.
    With `offload` tower and VQ tokenizer stay without memory until they are used (`load_in_turn`).
    """
    put = linear_quantizer(quantize) if quantize else None
    directory = resolve_directory(path_or_hub_id, **hub)
    file_config, rules = read_config(directory)
    config = copy.deepcopy(config) or file_config
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    generation = directory / "generation_config.json"
    settings = read_settings(generation, GENERATION) if generation.exists() else None
    with refusing(f"{directory / 'config.json'}: not a model that can be built"), torch.device("meta"):
        model = cls(config)
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}

    def convert(name: str) -> None:
        layer = name.rpartition(".")[0]
        linear = model.get_submodule(layer)
        if put and name.startswith("language_model.model.layers.") and isinstance(linear, nn.Linear):
            with refusing(f"{directory}: {layer} cannot be quantised to {quantize} on {device}"):
                model.set_submodule(layer, put(linear))
            return_freed_memory()  # else three times the quantised model is held

    load = partial(
        load_weights,
        model,
        directory,
        dtype=dtype,
        device=device,
        rules=rules,
        tied=tied if rules is TRANSFORMERS_FORMAT else None,  # stored once there, as the embedding
        convert=convert,
    )
    if offload:
        load_in_turn(model, load)
    else:
        load()
    model.quantized = quantize
    if settings is not None:
        samples = "temperature" in settings or None  # without it transformers does not write a temperature
        model.generation_config = GenerationConfig(**settings, do_sample=samples)
    return model.eval()


OFFLOADED = ("vision_model.", "gen_vision_model.")


def load_in_turn(model: "MultiModalityCausalLM", load: Callable[..., None]) -> None:
    """Load all but tower and VQ tokenizer; of these two, only the one used last is in memory.

    Each is read from the files when it is called and is not there, and the other let go of. Not for threads that use
    both at once.
    """
    load(wanted=lambda name: not name.startswith(OFFLOADED))

    @torch.inference_mode(False)
    def bring(used: str, *_) -> None:
        if any(p.is_meta for p in model.get_submodule(used[:-1]).parameters()):
            for module in (module for part in OFFLOADED for module in model.get_submodule(part[:-1]).modules()):
                for key, parameter in module._parameters.items():
                    module._parameters[key] = (
                        None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"))
                    )
            return_freed_memory()
            load(wanted=lambda name: name.startswith(used))

    for part in OFFLOADED:
        for module in model.get_submodule(part[:-1]).modules():
            module.register_forward_pre_hook(partial(bring, part))


# --- model -> files --------------------------------------------------------------------------------------------------


def save_model(model: "MultiModalityCausalLM", directory: str | os.PathLike) -> None:
    """Write config.json, model.safetensors and, where the model has one, generation_config.json.

    Raises ValueError for a model that is not whole, or not as it was stored.
    """
    if model.quantized or any(p.is_meta for p in model.parameters()):
        raise ValueError("a model that is quantised or offloaded cannot be saved: load it as it is stored")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pieces: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, tensor in model.state_dict().items():
        named = [(translate(name, rule.own, rule.stored), rule) for rule in ORIGINAL_FORMAT]
        for stored, rule in [(s, r) for s, r in named if s is not None] or [(name, AS_IS)]:
            piece = rows(tensor, rule.own_thirds)
            pieces[stored].append((rule.stored_thirds[0], piece[None] if rule.leading_axis else piece))
    weights = {
        stored: torch.cat([piece for _, piece in sorted(parts, key=lambda part: part[0])]).cpu().contiguous()
        for stored, parts in pieces.items()
    }
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    (directory / "config.json").write_text(model.config.to_json_string(), encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
