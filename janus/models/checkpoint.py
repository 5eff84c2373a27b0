"""Reading and writing Janus checkpoints: the names of both formats, and the files they lie in."""

import ctypes
import json
import os
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, JanusConfig

from janus.models.configuration import MultiModalityConfig

if TYPE_CHECKING:
    from janus.models.modeling import MultiModalityCausalLM


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message is one line that names the file and the cause."""


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """`stored` is a name prefix in the files, `own` the same in the model; `#` stands for a block number.

    `stored_thirds` and `own_thirds` say which thirds of the rows a fused tensor contributes or receives;
    `leading_axis` marks a stored tensor with an extra first axis of length 1.
    """

    stored: str
    own: str
    stored_thirds: tuple[int, int] = (0, 3)
    own_thirds: tuple[int, int] = (0, 3)
    leading_axis: bool = False


def _under(stored: str, own: str, *rules: Rule) -> tuple[Rule, ...]:
    """The rules with both prefixes put in front."""
    return tuple(Rule(stored + r.stored, own + r.own, r.stored_thirds, r.own_thirds, r.leading_axis) for r in rules)


ORIGINAL_FORMAT = (
    *_under(
        "vision_model.vision_tower.",
        "vision_model.vision_tower.",
        Rule("pos_embed", "embeddings.position_embedding.weight", leading_axis=True),
        Rule("patch_embed.proj.", "embeddings.patch_embedding."),
        Rule("blocks.#.norm1.", "encoder.layers.#.layer_norm1."),
        Rule("blocks.#.norm2.", "encoder.layers.#.layer_norm2."),
        Rule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.q_proj.", stored_thirds=(0, 1)),
        Rule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.k_proj.", stored_thirds=(1, 2)),
        Rule("blocks.#.attn.qkv.", "encoder.layers.#.self_attn.v_proj.", stored_thirds=(2, 3)),
        Rule("blocks.#.attn.proj.", "encoder.layers.#.self_attn.out_proj."),
        Rule("blocks.#.mlp.", "encoder.layers.#.mlp."),
        Rule("norm.", "post_layernorm."),
        Rule("attn_pool.latent", "head.probe"),
        Rule("attn_pool.q.", "head.attention.in_proj_", own_thirds=(0, 1)),
        Rule("attn_pool.kv.", "head.attention.in_proj_", own_thirds=(1, 3)),
        Rule("attn_pool.proj.", "head.attention.out_proj."),
        Rule("attn_pool.norm.", "head.layernorm."),
        Rule("attn_pool.mlp.", "head.mlp."),
    ),
    *(
        rule
        for aligner in ("aligner.", "gen_aligner.")
        for rule in _under(
            aligner,
            aligner,
            Rule("layers.0.", "fc1."),
            *(Rule(f"layers.{2 * k + 2}.", f"hidden_layers.{k}.") for k in range(4)),
        )
    ),
    Rule("gen_head.output_mlp_projector.", "gen_head.proj_out."),
    *(
        rule
        for half, blocks in (("encoder.", "down.#."), ("decoder.", "up.#."))
        for rule in _under(
            f"gen_vision_model.{half}",
            f"gen_vision_model.{half}",
            Rule("conv_blocks.#.res.", f"{blocks}block."),
            Rule("conv_blocks.#.attn.", f"{blocks}attn."),
            Rule("conv_blocks.#.downsample.", f"{blocks}downsample."),
            Rule("conv_blocks.#.upsample.", f"{blocks}upsample."),
            Rule("mid.0.", "mid.block_1."),
            Rule("mid.1.", "mid.attn_1."),
            Rule("mid.2.", "mid.block_2."),
        )
    ),
)

TRANSFORMERS_FORMAT = (
    *_under(
        "model.vision_model.",
        "vision_model.vision_tower.",
        Rule("", ""),
        Rule("encoder.layers.#.self_attn.projection_layer.", "encoder.layers.#.self_attn.out_proj."),
    ),
    Rule("model.aligner.", "aligner."),
    Rule("model.vqmodel.", "gen_vision_model."),
    Rule("model.generation_embeddings.", "gen_embed."),
    Rule("model.generation_aligner.", "gen_aligner."),
    Rule("model.generation_head.", "gen_head."),
    Rule("model.language_model.", "language_model.model."),
    Rule("lm_head.", "language_model.lm_head."),
)

IGNORED = ("gen_vision_model.quantize.codebook_used", "language_model.model.rotary_emb.inv_freq")
"""Buffers in some files that carry no weights: a usage counter, and a table computed from the config."""


def _translate(name: str, prefix: str, replacement: str) -> str | None:
    """`name` with `prefix` replaced, block numbers carried over; None where it does not start with the prefix."""
    match = re.match(re.escape(prefix).replace(r"\#", r"(\d+)"), name)
    if match is None:
        return None
    for number in match.groups():
        replacement = replacement.replace("#", number, 1)
    return replacement + name[match.end() :]


def _rows(tensor: Tensor, thirds: tuple[int, int]) -> Tensor:
    if thirds == (0, 3):
        return tensor
    size = tensor.shape[0] // 3
    return tensor[thirds[0] * size : thirds[1] * size]


# --- files -----------------------------------------------------------------------------------------------------------


def resolve_directory(path_or_hub_id: str | os.PathLike) -> Path:
    """A local directory as it is, a hub id as the directory of its downloaded snapshot. Raises CheckpointError."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint directory, found a file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory")
    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: bad id, not found, gated, offline
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_hub_id}: no such directory, and not available from the hub ({cause})"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_config(directory: Path) -> tuple[MultiModalityConfig, tuple[Rule, ...]]:
    """The checkpoint's config in the original form, and the table that translates its weight names."""
    path = directory / "config.json"
    content = read_json(path)
    try:
        match content.get("model_type"):
            case "multi_modality":
                return MultiModalityConfig.from_dict(content), ORIGINAL_FORMAT
            case "janus":
                return MultiModalityConfig.from_transformers(JanusConfig.from_dict(content)), TRANSFORMERS_FORMAT
    except Exception as error:  # transformers validates with several exception types
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    raise CheckpointError(
        f"{path}: model_type {content.get('model_type')!r} is not Janus's (expected 'multi_modality' or 'janus')"
    )


def _weight_files(directory: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            shards = [directory / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
            if not shards:
                raise CheckpointError(f"{index}: names no shard in weight_map")
            if missing := [shard for shard in shards if not shard.is_file()]:
                raise CheckpointError(f"{missing[0]}: missing shard, named in {index.name}")
            return shards
    raise CheckpointError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or sharded")


def _drop_pages(tensor: Tensor) -> None:
    """Give a memory-mapped tensor's pages back to the system once it is copied, so that they do not pile up."""
    if sys.platform == "linux":
        page = os.sysconf("SC_PAGESIZE")
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)  # 4: MADV_DONTNEED


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, one at a time, so that the file is never in memory as a whole."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        else:
            mapped = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError("expected a dict of tensors")
            for name, tensor in tensors.items():
                yield name, tensor
                if mapped:
                    _drop_pages(tensor)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        cause = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path}: truncated, or not a file of plain tensors ({cause})") from None


# --- model <-> files -------------------------------------------------------------------------------------------------


def _checkpoint_dtype(path: Path) -> torch.dtype:
    return next((t.dtype for _, t in _read_tensors(path) if t.is_floating_point()), torch.float32)


@torch.no_grad()
def load_model(
    cls: type["MultiModalityCausalLM"],
    path_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    config: MultiModalityConfig | None = None,
) -> "MultiModalityCausalLM":
    """Build the model without memory, then fill it tensor by tensor in the target dtype and device."""
    directory = resolve_directory(path_or_hub_id)
    file_config, rules = read_config(directory)
    files = _weight_files(directory)
    if dtype in (None, "auto"):
        dtype = _checkpoint_dtype(files[0])
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    assert isinstance(dtype, torch.dtype)
    try:
        with torch.device("meta"):
            model = cls(config or file_config)
    except ValueError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
    own = _materialise(model, dtype, torch.device(device))

    filled: dict[str, int] = defaultdict(int)
    unexpected = []
    for file in files:
        for name, tensor in _read_tensors(file):
            used = False
            for rule in rules:
                target = _translate(name, rule.stored, rule.own)
                if target is None or target not in own:
                    continue
                source = _rows(tensor[0] if rule.leading_axis else tensor, rule.stored_thirds)
                _copy(own[target], source, rule.own_thirds, f"{file}: {name}")
                filled[target] += rule.own_thirds[1] - rule.own_thirds[0]
                used = True
            if not used and name in own:
                _copy(own[name], tensor, (0, 3), f"{file}: {name}")
                filled[name] += 3
            elif not used and name not in IGNORED:
                unexpected.append(name)
    head = "language_model.lm_head.weight"
    if rules is TRANSFORMERS_FORMAT and not filled[head]:  # tied there: stored once, as the embedding
        own[head].copy_(own["language_model.model.embed_tokens.weight"])
        filled[head] = 3
    missing = [name for name in own if filled[name] != 3]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = ", ..." if len(names) > 3 else ""
            raise CheckpointError(f"{directory}: {len(names)} {kind} weights ({', '.join(names[:3])}{more})")
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(directory / "generation_config.json"))
    return model.eval()


def _materialise(model: "MultiModalityCausalLM", dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Give a model built on the meta device its memory; returns its (empty) parameters by name."""
    own = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
                module._parameters[name] = own[f"{prefix}.{name}".lstrip(".")] = empty
    llama: Any = model.language_model.model
    embeddings: Any = model.vision_model.vision_tower.embeddings
    llama.rotary_emb = type(llama.rotary_emb)(config=llama.config).to(device)
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    return own


def _copy(own: Tensor, stored: Tensor, own_thirds: tuple[int, int], where: str) -> None:
    target = _rows(own, own_thirds)
    if target.shape != stored.shape:
        raise CheckpointError(f"{where} has shape {list(stored.shape)}, the config asks for {list(target.shape)}")
    target.copy_(stored)


def save_model(model: "MultiModalityCausalLM", directory: str | os.PathLike) -> None:
    """Write config.json, model.safetensors and, where the model has one, generation_config.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pieces: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, tensor in model.state_dict().items():
        named = [(_translate(name, rule.own, rule.stored), rule) for rule in ORIGINAL_FORMAT]
        for stored, rule in [(s, r) for s, r in named if s is not None] or [(name, Rule("", ""))]:
            piece = _rows(tensor, rule.own_thirds)
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
