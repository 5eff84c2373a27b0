"""The Janus model, composed of transformers' own modules under the attribute names of the original code."""

import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, SiglipVisionModel
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVQVAE,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)

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


class VQModel(JanusVQVAE):
    """The VQ tokenizer, with the l2-normalised codebook and the call signatures of the original code."""

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Images `[batch, 3, H, W]` in [-1, 1] to `(quantised, None, (None, None, codes))`, as the original returns it.

        `quantised` is `[batch, code_dim, h, w]`, `codes` `[batch * h * w]`, int64.
        """
        z = F.normalize(self.quant_conv(self.encoder(pixel_values)), dim=1)
        codebook = F.normalize(self.quantize.embedding.weight, dim=1)
        codes = torch.einsum("bchw,nc->bhwn", z, codebook).argmax(-1)
        return codebook[codes].permute(0, 3, 1, 2), None, (None, None, codes.flatten())

    def decode_code(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Codes of `batch * h * w` entries, with `shape=[batch, code_dim, h, w]`, to images `[batch, 3, H, W]`."""
        batch, code_dim, h, w = shape
        z = F.normalize(self.quantize.embedding(codes), dim=-1).reshape(batch, h, w, code_dim)
        return self.decoder(self.post_quant_conv(z.permute(0, 3, 1, 2)))


class MultiModalityCausalLM(PreTrainedModel):
    """Janus: a LLaMA that reads images through SigLIP and an aligner, and paints them through a VQ codebook."""

    config_class = MultiModalityConfig
    _supports_sdpa = True
    _supports_flash_attn = True

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
        device: torch.device | str = "cpu",
        **_,
    ) -> "MultiModalityCausalLM":
        """Load either checkpoint format; `dtype` defaults to that of the files. Raises CheckpointError."""
        return checkpoint.load_model(cls, pretrained_model_name_or_path, dtype or torch_dtype, device, config=config)

    def save_pretrained(self, save_directory: str | os.PathLike, **_) -> None:
        """Write config and weights in the original format."""
        checkpoint.save_model(self, save_directory)
