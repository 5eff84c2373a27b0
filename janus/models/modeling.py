"""The Janus model, composed of transformers' own modules under the attribute names of the original code."""

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVQVAE,
    JanusVQVAEAlignerMLP,
    JanusVQVAEAttnBlock,
    JanusVQVAEHead,
)

from janus.dola.checkpoint_files import hub_keywords
from janus.models import checkpoint
from janus.models.configuration import MultiModalityConfig


class SiglipTower(SiglipVisionModel):
    """SigLIP with the two methods of timm's VisionTransformer that Janus code calls."""

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> tuple:
        """Outputs of blocks `n` (0-based indices, or the last n), each `[batch, patches, width]`, in one forward pass.

        `norm` applies the final LayerNorm; `reshape` gives `[batch, width, h, w]`; `return_prefix_tokens` pairs each
        output with its (empty) prefix tokens. Raises ValueError for an index outside the tower.
        """
        depth = len(self.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if outside := [i for i in wanted if not 0 <= i < depth]:
            raise ValueError(f"the tower's blocks are 0..{depth - 1}, got {outside}")
        h = self.embeddings(x)
        outputs = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            h = block(h, None)
            if i in wanted:
                outputs[i] = self.post_layernorm(h) if norm else h
        features = [outputs[i] for i in wanted]
        if reshape:
            side = math.isqrt(h.shape[1])
            features = [f.transpose(1, 2).unflatten(2, (-1, side)) for f in features]
        if return_prefix_tokens:
            return tuple((f, h.new_empty(h.shape[0], 0, h.shape[2])) for f in features)
        return tuple(features)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool normed features `[batch, patches, width]` to `[batch, width]`; SigLIP has no classifier after it.

        Raises ValueError where the checkpoint has no pooling head (the transformers format drops it).
        """
        if not self.use_head:
            raise ValueError(
                "this checkpoint's vision tower has no pooling head (the transformers format drops attn_pool): "
                "a pooled feature needs a checkpoint in the original format"
            )
        return self.head(x)


class VisionModel(nn.Module):
    """Pixel values `[batch, 3, H, W]` to normed patch features `[batch, patches, width]`."""

    def __init__(self, config: MultiModalityConfig):
        super().__init__()
        self.vision_tower = SiglipTower(config.siglip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        last = len(self.vision_tower.blocks) - 1
        return self.vision_tower.get_intermediate_layers(pixel_values, n=[last], norm=True)[0]


class VQAttention(JanusVQVAEAttnBlock):
    """The VQ tokenizer's attention with its scores in float32: unscaled, they may be more than float16 holds."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        q, k, v = (project(normed).flatten(2).float() for project in (self.q, self.k, self.v))
        scores = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5
        attended = torch.bmm(v, scores.softmax(-1).transpose(1, 2)).unflatten(2, hidden_states.shape[2:])
        return hidden_states + self.proj_out(attended.to(hidden_states.dtype))


class VQModel(JanusVQVAE):
    """The VQ tokenizer, with the l2-normalised codebook and the call signatures of the original code."""

    def __init__(self, config: JanusVQVAEConfig):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, JanusVQVAEAttnBlock):
                module.__class__ = VQAttention

    def nearest_codes(self, z: Tensor) -> Tensor:
        """The code nearest to each vector of z `[batch, code_dim, h, w]`: `[batch, h, w]`, int64.

        Compared in float32 in a model of any dtype: 8 bits of precision do not tell neighbours apart.
        """
        z = F.normalize(z.float(), dim=1)
        codebook = F.normalize(self.quantize.embedding.weight.float(), dim=1)
        return torch.einsum("bchw,nc->bhwn", z, codebook).argmax(-1)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Images `[batch, 3, H, W]` in [-1, 1] to `(quantised, None, (None, None, codes))`, as the original returns it.

        `quantised` is `[batch, code_dim, h, w]`, `codes` `[batch * h * w]`, int64.
        """
        codes = self.nearest_codes(self.quant_conv(self.encoder(pixel_values)))
        quantised = F.normalize(self.quantize.embedding(codes), dim=-1)
        return quantised.permute(0, 3, 1, 2), None, (None, None, codes.flatten())

    def decode_code(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Codes of `batch * h * w` entries, with `shape=[batch, code_dim, h, w]`, to images `[batch, 3, H, W]`."""
        batch, code_dim, h, w = shape
        z = F.normalize(self.quantize.embedding(codes), dim=-1).reshape(batch, h, w, code_dim)
        return self.decoder(self.post_quant_conv(z.permute(0, 3, 1, 2)))


def _to_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """None, the dtype of the files, also for "auto". Raises ValueError."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return None
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _to_device(device: Any, device_map: Any) -> torch.device:
    """The one device that both arguments of `from_pretrained` may name. Raises ValueError."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device is not None and device_map is not None:
        raise ValueError(f"device {device!r} and device_map {device_map!r}: give one of them")
    named: Any = device_map if device is None else device
    try:
        return torch.device("cpu" if named is None else named)
    except (RuntimeError, TypeError):
        raise ValueError(f"device or device_map must name one device, as 'cuda' or 'cuda:0', got {named!r}") from None


class MultiModalityCausalLM(PreTrainedModel):
    """Janus: a LLaMA that reads images through SigLIP and an aligner, and paints them through a VQ codebook."""

    config_class = MultiModalityConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    quantized: str | None = None

    def __init__(self, config: MultiModalityConfig):
        super().__init__(config)
        self.vision_model = VisionModel(config)
        self.aligner = JanusVisionAlignerMLP(config.aligner)
        self.gen_vision_model = VQModel(config.vq)
        self.gen_aligner = JanusVQVAEAlignerMLP(config.gen_aligner)
        self.gen_head = JanusVQVAEHead(config.gen_head)
        self.gen_embed = nn.Embedding(config.vq.num_embeddings, config.gen_aligner.embed_dim)
        self.language_model = LlamaForCausalLM(config.language_config)
        self.post_init()

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def prepare_gen_img_embeds(self, image_ids: Tensor) -> Tensor:
        """VQ codes `[...]` to language-model inputs `[..., width]`."""
        return self.gen_aligner(self.gen_embed(image_ids))

    def prepare_inputs_embeds(
        self, input_ids: Tensor, pixel_values: Tensor, images_seq_mask: Tensor, images_emb_mask: Tensor, **_
    ) -> Tensor:
        """Text embeddings `[batch, T, width]` with image features in the places of the image tokens.

        input_ids, images_seq_mask: `[batch, T]`; pixel_values: `[batch, n, 3, H, W]`; images_emb_mask: `[batch, n, P]`.
        """
        embeds = self.get_input_embeddings()(input_ids.clamp(min=0))
        features = self.aligner(self.vision_model(pixel_values.flatten(0, 1)))
        embeds[images_seq_mask] = features[images_emb_mask.flatten(0, 1)].to(embeds.dtype)
        return embeds

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: MultiModalityConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: torch.device | str | int | dict | None = None,
        attn_implementation: str | None = None,
        quantize: str | None = None,
        offload: bool = False,
        **others: Any,
    ) -> "MultiModalityCausalLM":
        """Load either checkpoint format.

        `dtype` defaults to that of the files, `device` to the CPU; `device_map` is another name for one device, as
        "cuda" or {"": "cuda:0"}. `attn_implementation` is "sdpa" (the default) or "eager". `quantize`, "int8" or
        "int4", is of the linear layers in the LLaMA's blocks; with `offload` only that one of tower and VQ tokenizer is
        in memory that was used last. Of other keywords, those that choose a hub snapshot are taken and TypeError is
        raised for the rest. Raises CheckpointError for what the
        files hold, ValueError for arguments.
        """
        hub = hub_keywords(cls.__name__, others)
        if attn_implementation not in (None, "sdpa", "eager"):
            raise ValueError(f"attn_implementation must be 'sdpa' or 'eager', got {attn_implementation!r}")
        return checkpoint.load_model(
            cls,
            pretrained_model_name_or_path,
            _to_dtype(dtype or torch_dtype),
            _to_device(device, device_map),
            config=config,
            attn_implementation=attn_implementation,
            quantize=quantize,
            offload=offload,
            **hub,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **_) -> None:
        """Write config and weights in the original format."""
        checkpoint.save_model(self, save_directory)
