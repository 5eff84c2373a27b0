"""`config.json` of a Janus checkpoint, and the transformers configs that its modules are built from."""

from typing import Any

from transformers import JanusConfig, LlamaConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

SIGLIP_SIZES = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0, "patch_size": 16},
}
VQ_SIZES = {"VQ-16": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}}


class MultiModalityConfig(PreTrainedConfig):
    """The original format's config (`model_type: multi_modality`).

    `language_config` is a LlamaConfig; the other five stay the dicts of the file, `{"cls": ..., "params": {...}}`.
    """

    model_type = "multi_modality"
    sub_configs = {"language_config": LlamaConfig}  # noqa: RUF012

    def __init__(
        self,
        language_config: dict | LlamaConfig | None = None,
        vision_config: dict | None = None,
        aligner_config: dict | None = None,
        gen_vision_config: dict | None = None,
        gen_aligner_config: dict | None = None,
        gen_head_config: dict | None = None,
        **kwargs,
    ):
        if not isinstance(language_config, LlamaConfig):
            # The published files force flash attention, which not every machine has; sdpa runs everywhere.
            language = {k: v for k, v in (language_config or {}).items() if k != "_attn_implementation"}
            language_config = LlamaConfig(**language)
        self.language_config = language_config
        self.vision_config = vision_config or {}
        self.aligner_config = aligner_config or {}
        self.gen_vision_config = gen_vision_config or {}
        self.gen_aligner_config = gen_aligner_config or {}
        self.gen_head_config = gen_head_config or {}
        super().__init__(**kwargs)

    def _params(self, section: str) -> dict[str, Any]:
        return getattr(self, section).get("params", {})

    @property
    def siglip(self) -> SiglipVisionConfig:
        params = self._params("vision_config")
        name = params.get("model_name", "siglip_large_patch16_384")
        sizes = SIGLIP_SIZES.get(name, {}) | params
        if missing := [key for key in SIGLIP_SIZES["siglip_large_patch16_384"] if key not in sizes]:
            raise ValueError(
                f"vision_config.params: model_name {name!r} is unknown (known: {', '.join(SIGLIP_SIZES)}) "
                f"and its sizes {', '.join(missing)} are not given"
            )
        if (params.get("select_layer", -1), params.get("select_feature", "same")) != (-1, "same"):
            raise ValueError("vision_config.params: only select_layer -1 and select_feature 'same' are supported")
        pooling_head: dict[str, Any] = {"vision_use_head": params.get("attn_pool", True)}
        return SiglipVisionConfig(
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=int(sizes["width"] * sizes["mlp_ratio"]),
            patch_size=sizes["patch_size"],
            image_size=params.get("image_size", 384),
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            **pooling_head,
        )

    @property
    def aligner(self) -> JanusVisionConfig:
        params = self._params("aligner_config")
        return JanusVisionConfig(
            hidden_size=params.get("input_dim", 1024),
            projection_dim=params.get("n_embed", 2048),
            depth=params.get("depth", 2),
        )

    @property
    def vq(self) -> JanusVQVAEConfig:
        cls = self.gen_vision_config.get("cls", "VQ-16")
        params = self._params("gen_vision_config")
        sizes = VQ_SIZES.get(cls, {}) | params
        if missing := [key for key in VQ_SIZES["VQ-16"] if key not in sizes]:
            raise ValueError(f"gen_vision_config: cls {cls!r} is unknown and {', '.join(missing)} are not given")
        return JanusVQVAEConfig(
            embed_dim=params.get("n_embed", 8),
            num_embeddings=params.get("image_token_size", 16384),
            latent_channels=sizes["z_channels"],
            base_channels=sizes["ch"],
            channel_multiplier=sizes["ch_mult"],
            num_res_blocks=sizes["num_res_blocks"],
        )

    @property
    def gen_aligner(self) -> JanusVQVAEConfig:
        params = self._params("gen_aligner_config")
        return JanusVQVAEConfig(
            embed_dim=params.get("input_dim", 8),
            projection_dim=params.get("n_embed", 2048),
            num_hidden_layers=params.get("depth", 2),
        )

    @property
    def gen_head(self) -> JanusVQVAEConfig:
        params = self._params("gen_head_config")
        return JanusVQVAEConfig(
            image_token_embed_dim=params.get("n_embed", 2048),
            projection_dim=params.get("image_token_embed", 2048),
            num_embeddings=params.get("image_token_size", 16384),
        )

    @classmethod
    def from_transformers(cls, config: JanusConfig) -> "MultiModalityConfig":
        """The same model, described in the original format. The transformers format has no pooling head."""
        text: Any = config.text_config
        vision: Any = config.vision_config
        vq: Any = config.vq_config
        return cls(
            language_config=LlamaConfig(**{**text.to_dict(), "tie_word_embeddings": False}),
            vision_config=_section(
                "vision",
                "CLIPVisionTower",
                image_size=vision.image_size,
                model_name="siglip",
                select_feature="same",
                select_layer=-1,
                width=vision.hidden_size,
                layers=vision.num_hidden_layers,
                heads=vision.num_attention_heads,
                mlp_ratio=vision.mlp_ratio,
                patch_size=vision.patch_size,
                attn_pool=False,
            ),
            aligner_config=_section(
                "aligner",
                "MlpProjector",
                depth=vision.depth,
                input_dim=vision.hidden_size,
                n_embed=vision.projection_dim,
            ),
            gen_vision_config=_section(
                "gen_vision",
                "VQ-16",
                image_token_size=vq.num_embeddings,
                n_embed=vq.embed_dim,
                ch=vq.base_channels,
                ch_mult=list(vq.channel_multiplier),
                num_res_blocks=vq.num_res_blocks,
                z_channels=vq.latent_channels,
            ),
            gen_aligner_config=_section(
                "gen_aligner",
                "MlpProjector",
                depth=vq.num_hidden_layers,
                input_dim=vq.embed_dim,
                n_embed=vq.projection_dim,
            ),
            gen_head_config=_section(
                "gen_head",
                "vision_head",
                image_token_embed=vq.projection_dim,
                image_token_size=vq.num_embeddings,
                n_embed=vq.image_token_embed_dim,
            ),
        )


def _section(model_type: str, cls: str, **params) -> dict:
    if model_type.endswith("aligner"):
        params["projector_type"] = "mlp_gelu"
    return {"cls": cls, "model_type": model_type, "params": params}
