"""`config.json` of a Janus checkpoint: what it may hold, and the transformers configs its modules are built from."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from janus.dola.schema import Field, Nullable, complete, either, flag, mismatch, number, one_of, several, text, whole

SIGLIP_SIZES = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0, "patch_size": 16},
}
VQ_SIZES = {"VQ-16": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}}

# --- what config.json may hold ---------------------------------------------------------------------------------------
# The bounds leave room for models many times the published ones, and none for sizes that no machine could build.

MOST_TOKENS = 1 << 22
TOKEN = whole(0, MOST_TOKENS - 1)
ROPE = {
    "rope_type": one_of("default", "linear", "dynamic", "llama3", "yarn"),
    "type": one_of("default", "linear", "dynamic", "llama3", "yarn"),
    "rope_theta": number(1, 1e12),
    "factor": number(1, 1e4),
    "original_max_position_embeddings": whole(1, 1 << 24),
    "low_freq_factor": number(1e-3, 1e3),
    "high_freq_factor": number(1e-3, 1e3),
    "beta_fast": number(1e-3, 1e4),
    "beta_slow": number(1e-3, 1e4),
    "attention_factor": number(1e-3, 1e3),
}
LLAMA = {
    "model_type": one_of("llama"),
    "vocab_size": whole(1, MOST_TOKENS, 32000),
    "hidden_size": whole(1, 1 << 16, 4096),
    "intermediate_size": whole(1, 1 << 20, 11008),
    "num_hidden_layers": whole(1, 256, 32),
    "num_attention_heads": whole(1, 1024, 32),
    "num_key_value_heads": Nullable(whole(1, 1024)),
    "head_dim": Nullable(whole(2, 1 << 12)),
    "hidden_act": one_of("silu", "gelu", "gelu_pytorch_tanh", "relu"),
    "max_position_embeddings": whole(1, 1 << 24),
    "rms_norm_eps": number(1e-12, 0.1),
    "rope_theta": Nullable(number(1, 1e12)),
    "rope_scaling": Nullable(ROPE),
    "rope_parameters": Nullable(ROPE),
    "attention_bias": flag(),
    "mlp_bias": flag(),
    "attention_dropout": number(0, 1),
    "initializer_range": number(0, 1),
    "tie_word_embeddings": flag(),
    "pad_token_id": Nullable(TOKEN),
    "bos_token_id": Nullable(TOKEN),
    "eos_token_id": Nullable(either(TOKEN, several(TOKEN, 1, 64))),
}
VISION = {
    "model_name": text("siglip_large_patch16_384"),
    "image_size": whole(1, 1 << 12, 384),
    "select_layer": one_of(-1),
    "select_feature": one_of("same"),
    "width": whole(1, 1 << 16),
    "layers": whole(1, 256),
    "heads": whole(1, 1024),
    "mlp_ratio": number(0.01, 100),
    "patch_size": whole(1, 1 << 12),
    "attn_pool": flag(True),
}
GEN_VISION = {
    "image_token_size": whole(1, MOST_TOKENS, 16384),
    "n_embed": whole(1, 1 << 12, 8),
    "ch": Field("a multiple of 32 in 32..4096", lambda v: type(v) is int and v in range(32, 4097, 32)),
    "ch_mult": several(whole(1, 64), 1, 12),
    "num_res_blocks": whole(1, 64),
    "z_channels": whole(1, 1 << 12),
}
ALIGNER = {"depth": whole(1, 5, 2), "projector_type": one_of("mlp_gelu"), "n_embed": whole(1, 1 << 16, 2048)}
CONFIG = {
    "language_config": LLAMA,
    "vision_config": {"params": VISION},
    "aligner_config": {"params": {**ALIGNER, "input_dim": whole(1, 1 << 16, 1024)}},
    "gen_vision_config": {"cls": text("VQ-16"), "params": GEN_VISION},
    "gen_aligner_config": {"params": {**ALIGNER, "input_dim": whole(1, 1 << 12, 8)}},
    "gen_head_config": {
        "params": {
            "n_embed": whole(1, 1 << 16, 2048),
            "image_token_embed": whole(1, 1 << 16, 2048),
            "image_token_size": whole(1, MOST_TOKENS, 16384),
        }
    },
}
"""The original format; what a file leaves out has the published sizes."""

EQUAL = {
    "aligner_config.params.input_dim": "vision_config.params.width",
    "aligner_config.params.n_embed": "language_config.hidden_size",
    "gen_aligner_config.params.input_dim": "gen_vision_config.params.n_embed",
    "gen_aligner_config.params.n_embed": "language_config.hidden_size",
    "gen_head_config.params.n_embed": "language_config.hidden_size",
    "gen_head_config.params.image_token_size": "gen_vision_config.params.image_token_size",
}
"""Sizes that must be another's, where one part of the model hands its output to the next."""

TRANSFORMERS_KEYS = {
    "vision_config.params.image_size": "vision_config.image_size",
    "vision_config.params.width": "vision_config.hidden_size",
    "vision_config.params.layers": "vision_config.num_hidden_layers",
    "vision_config.params.heads": "vision_config.num_attention_heads",
    "vision_config.params.mlp_ratio": "vision_config.mlp_ratio",
    "vision_config.params.patch_size": "vision_config.patch_size",
    "aligner_config.params.depth": "vision_config.depth",
    "aligner_config.params.input_dim": "vision_config.hidden_size",
    "aligner_config.params.n_embed": "vision_config.projection_dim",
    "gen_vision_config.params.image_token_size": "vq_config.num_embeddings",
    "gen_vision_config.params.n_embed": "vq_config.embed_dim",
    "gen_vision_config.params.ch": "vq_config.base_channels",
    "gen_vision_config.params.ch_mult": "vq_config.channel_multiplier",
    "gen_vision_config.params.num_res_blocks": "vq_config.num_res_blocks",
    "gen_vision_config.params.z_channels": "vq_config.latent_channels",
    "gen_aligner_config.params.depth": "vq_config.num_hidden_layers",
    "gen_aligner_config.params.input_dim": "vq_config.embed_dim",
    "gen_aligner_config.params.n_embed": "vq_config.projection_dim",
    "gen_head_config.params.image_token_embed": "vq_config.projection_dim",
    "gen_head_config.params.image_token_size": "vq_config.num_embeddings",
    "gen_head_config.params.n_embed": "vq_config.image_token_embed_dim",
}
"""Where the transformers format keeps the original format's sizes; language_config is its text_config."""

TRANSFORMERS_ONLY = {
    "text_config": {},
    "vision_config": {
        "hidden_act": one_of("gelu"),
        "layer_norm_eps": one_of(1e-6),
        "attention_bias": one_of(True),
        "use_qk_norm": one_of(False),
        "num_channels": one_of(3),
    },
    "vq_config": {
        "hidden_act": one_of("gelu"),
        "double_latent": one_of(False),
        "in_channels": one_of(3),
        "out_channels": one_of(3),
    },
}
"""What only the transformers format can say, and only in the way of the original format."""


def _at(content: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def resolve(content: Mapping[str, Any]) -> dict[str, Any]:
    """The original format's content, checked key by key, with what it leaves out. Raises ValueError."""
    values = complete(content, CONFIG)
    vision, gen_vision = values["vision_config"]["params"], values["gen_vision_config"]
    for key, name, known, params in (
        ("vision_config.params.model_name", vision["model_name"], SIGLIP_SIZES, vision),
        ("gen_vision_config.cls", gen_vision["cls"], VQ_SIZES, gen_vision["params"]),
    ):
        params.update({size: value for size, value in known.get(name, {}).items() if size not in params})
        if missing := [size for size in next(iter(known.values())) if size not in params]:
            raise mismatch(key, f"{' or '.join(known)}, or also {', '.join(missing)}", name)
    return values


def check_sizes(values: Mapping[str, Any]) -> None:
    """Whether the parts of a model of these resolved values fit each other. Raises ValueError."""
    for key, source in EQUAL.items():
        if _at(values, key) != _at(values, source):
            raise mismatch(key, f"{source}, which is {_at(values, source)}", _at(values, key))
    language, vision = values["language_config"], values["vision_config"]["params"]
    side, halvings = vision["image_size"], len(values["gen_vision_config"]["params"]["ch_mult"]) - 1
    smallest = max(vision["patch_size"], 2**halvings)  # one patch of the tower, one code of the VQ tokenizer
    heads = language["num_attention_heads"]
    head_dim = language.get("head_dim", language["hidden_size"] // heads)
    key_value_heads, pad = language.get("num_key_value_heads", heads), language.get("pad_token_id", 0)
    for key, found, expected, holds in (
        (
            "language_config.num_attention_heads",
            heads,
            "a divisor of hidden_size",
            language["hidden_size"] % heads == 0,
        ),
        ("language_config.num_key_value_heads", key_value_heads, "a divisor of heads", heads % key_value_heads == 0),
        ("language_config.head_dim", head_dim, "an even number (left out: hidden_size per head)", head_dim % 2 == 0),
        ("language_config.pad_token_id", pad, "less than vocab_size", pad < language["vocab_size"]),
        ("vision_config.params.heads", vision["heads"], "a divisor of width", vision["width"] % vision["heads"] == 0),
        ("vision_config.params.image_size", side, f"at least {smallest}", side >= smallest),
    ):
        if not holds:
            raise mismatch(key, expected, found)


# --- the config ------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {"select_feature": "same", "select_layer": -1, "attn_pool": False},
    },
    "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": {"projector_type": "mlp_gelu"}},
    "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": {}},
    "gen_aligner_config": {
        "cls": "MlpProjector",
        "model_type": "gen_aligner",
        "params": {"projector_type": "mlp_gelu"},
    },
    "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": {}},
}
"""What the original format says beside the sizes, of a model that came in the transformers format."""


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
            # The published files force flash attention, which not every machine has; the table leaves that key out.
            language_config = LlamaConfig(**complete(language_config or {}, LLAMA, "language_config"))
        self.language_config = language_config
        self.vision_config = vision_config or {}
        self.aligner_config = aligner_config or {}
        self.gen_vision_config = gen_vision_config or {}
        self.gen_aligner_config = gen_aligner_config or {}
        self.gen_head_config = gen_head_config or {}
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The config of a file's content, checked; keys the model has no use for are dropped. Raises ValueError."""
        known = {key: config_dict[key] for key in CONFIG if key in config_dict}
        check_sizes(resolve(known))
        return super().from_dict(known, **kwargs)

    @classmethod
    def from_transformers(cls, content: dict[str, Any]) -> "MultiModalityConfig":
        """The same of a file in the transformers format, which has no pooling head. Raises ValueError."""
        complete(content, TRANSFORMERS_ONLY)
        ours = copy.deepcopy(SECTIONS)
        ours["language_config"] = {**content.get("text_config", {}), "tie_word_embeddings": False}
        for key, theirs in TRANSFORMERS_KEYS.items():
            (their_section, their_size), (section, *_, size) = theirs.split("."), key.split(".")
            if their_size in content.get(their_section, {}):
                ours[section]["params"][size] = content[their_section][their_size]
        try:
            return cls.from_dict(ours)
        except ValueError as error:
            message = str(error).replace("language_config", "text_config")
            for key in sorted(TRANSFORMERS_KEYS, key=len, reverse=True):  # gen_aligner_config before aligner_config
                message = message.replace(key, TRANSFORMERS_KEYS[key])
            raise ValueError(message) from None

    def _params(self, section: str) -> dict[str, Any]:
        return resolve({section: getattr(self, section)})[section]["params"]

    @property
    def siglip(self) -> SiglipVisionConfig:
        params = self._params("vision_config")
        further: dict[str, Any] = {"vision_use_head": params["attn_pool"]}
        further["attn_implementation"] = self._attn_implementation
        return SiglipVisionConfig(
            hidden_size=params["width"],
            num_hidden_layers=params["layers"],
            num_attention_heads=params["heads"],
            intermediate_size=int(params["width"] * params["mlp_ratio"]),
            patch_size=params["patch_size"],
            image_size=params["image_size"],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            **further,
        )

    @property
    def aligner(self) -> JanusVisionConfig:
        params = self._params("aligner_config")
        return JanusVisionConfig(
            hidden_size=params["input_dim"], projection_dim=params["n_embed"], depth=params["depth"]
        )

    @property
    def vq(self) -> JanusVQVAEConfig:
        params = self._params("gen_vision_config")
        return JanusVQVAEConfig(
            embed_dim=params["n_embed"],
            num_embeddings=params["image_token_size"],
            latent_channels=params["z_channels"],
            base_channels=params["ch"],
            channel_multiplier=params["ch_mult"],
            num_res_blocks=params["num_res_blocks"],
        )

    @property
    def gen_aligner(self) -> JanusVQVAEConfig:
        params = self._params("gen_aligner_config")
        return JanusVQVAEConfig(
            embed_dim=params["input_dim"], projection_dim=params["n_embed"], num_hidden_layers=params["depth"]
        )

    @property
    def gen_head(self) -> JanusVQVAEConfig:
        params = self._params("gen_head_config")
        return JanusVQVAEConfig(
            image_token_embed_dim=params["n_embed"],
            projection_dim=params["image_token_embed"],
            num_embeddings=params["image_token_size"],
        )
