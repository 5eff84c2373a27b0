"""The SigLIP whose texts the vision tower's features are compared with: read as the rest of a checkpoint is."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel, SiglipTokenizer

from janus.dola.checkpoint_files import (
    CheckpointError,
    load_weights,
    read_settings,
    read_tokenizer,
    refusing,
    resolve_directory,
)
from janus.dola.schema import REQUIRED, Field, Nullable, flag, mismatch, number, one_of, text, whole

PART = {
    "hidden_size": whole(1, 1 << 14, 768),
    "intermediate_size": whole(1, 1 << 17),
    "num_hidden_layers": whole(1, 128),
    "num_attention_heads": whole(1, 512, 12),
    "hidden_act": one_of("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu"),
    "layer_norm_eps": number(1e-12, 0.1),
}
SIGLIP = {
    "model_type": one_of("siglip", default=REQUIRED),
    "text_config": {
        **PART,
        "vocab_size": whole(1, 1 << 22, 32000),
        "max_position_embeddings": whole(1, 1 << 14),
        "projection_size": Nullable(whole(1, 1 << 14)),
    },
    "vision_config": {
        **PART,
        "image_size": whole(1, 1 << 12, 224),
        "patch_size": whole(1, 1 << 12, 16),
        "num_channels": whole(1, 64),
        "vision_use_head": flag(),
    },
}
"""config.json of a SiglipModel; what it leaves out has transformers' defaults."""

TOKENIZER = {
    "tokenizer_class": Nullable(text()),
    "pad_token": Field("a token", lambda v: type(_content(v)) is str, REQUIRED),
    "padding_side": one_of("left", "right", default="right"),
}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_config(directory: Path) -> SiglipConfig:
    path = directory / "config.json"
    settings = read_settings(path, SIGLIP)
    for part in ("text_config", "vision_config"):
        width, heads = settings[part]["hidden_size"], settings[part]["num_attention_heads"]
        if width % heads:
            raise CheckpointError(f"{path}: {mismatch(f'{part}.num_attention_heads', f'a divisor of {width}', heads)}")
    patch, side = settings["vision_config"]["patch_size"], settings["vision_config"]["image_size"]
    if patch > side:
        raise CheckpointError(f"{path}: {mismatch('vision_config.patch_size', f'at most image_size {side}', patch)}")
    # The defaults of these ids lie outside the default vocabulary, and transformers says so; nothing here reads them.
    settings["text_config"] |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    with refusing(f"{path}: not a config of SigLIP"):
        return SiglipConfig(**settings)


def _read_tokenizer(directory: Path, config: Any) -> PreTrainedTokenizerBase:
    path = directory / "tokenizer.json"
    settings = read_settings(directory / "tokenizer_config.json", TOKENIZER)
    if settings.get("tokenizer_class") == "SiglipTokenizer":  # of the published ones: it is not all in tokenizer.json
        path = directory / "spiece.model"
        with refusing(f"{path}: not a tokenizer"):
            tokenizer: Any = SiglipTokenizer.from_pretrained(directory)
    else:
        tokenizer = read_tokenizer(
            path, padding_side=settings["padding_side"], model_max_length=config.max_position_embeddings
        )
        pad_token = _content(settings["pad_token"])
        if pad_token not in tokenizer.get_vocab():
            raise CheckpointError(f"{path}: does not hold the pad_token of tokenizer_config.json, {pad_token!a}")
        tokenizer.pad_token = pad_token
    last, vocab_size = max(tokenizer.get_vocab().values()), config.vocab_size
    if last >= vocab_size:
        raise CheckpointError(f"{path}: its last token is {last}, the vocab_size of config.json {vocab_size}")
    with refusing(f"{path}: not a tokenizer of text"):
        tokenizer(["A dog 2 é 画"], padding="max_length", truncation=True, max_length=config.max_position_embeddings)
    return tokenizer


def load_text_encoder(path_or_hub_id: str | os.PathLike) -> tuple[Any, Any]:
    """A SiglipModel in float32 on the CPU, and its tokenizer. Raises CheckpointError."""
    directory = resolve_directory(path_or_hub_id)
    config = _read_config(directory)
    tokenizer = _read_tokenizer(directory, config.text_config)
    with refusing(f"{directory / 'config.json'}: not a model that can be built"), torch.device("meta"):
        model = SiglipModel(config)
    load_weights(model, directory, dtype=torch.float32)
    return model.eval(), tokenizer


def find_text_encoder(model: str, text_encoder: str | None) -> tuple[Any, Any]:
    """The text encoder named, or the one that lies in the checkpoint as `siglip/`. Raises ValueError without either."""
    if text_encoder is None and not (Path(model) / "siglip").is_dir():
        raise ValueError(f"{model} has no siglip/ text encoder: name one with --text_encoder")
    return load_text_encoder(text_encoder or Path(model) / "siglip")
