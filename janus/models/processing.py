"""Text and images to model inputs: tokenizer, chat format, image tokens, pixel values."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from janus.dola.checkpoint_files import (
    CheckpointError,
    hub_keywords,
    read_settings,
    read_tokenizer,
    refusing,
    resolve_directory,
)
from janus.dola.schema import ABSENT, REQUIRED, Nullable, mismatch, number, one_of, several, whole
from janus.models.checkpoint import read_config
from janus.utils.conversation import EOS, SYSTEM_PROMPT, render_conversation

BOS = "<｜begin▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE_TOKENS = ("<image_placeholder>", "<begin_of_image>", "<end_of_image>")

SIDE = whole(1, 1 << 12)
IMAGE_PROCESSOR = {
    "image_size": SIDE,
    "size": Nullable({"height": whole(1, 1 << 12, REQUIRED), "width": whole(1, 1 << 12, REQUIRED)}),
    "min_size": Nullable(SIDE),
    "image_mean": several(number(-1, 2), 3, 3, REQUIRED),
    "image_std": several(number(1e-3, 1e3), 3, 3, REQUIRED),
    "background_color": Nullable(several(whole(0, 255), 3, 3)),
    "do_resize": Nullable(one_of(True)),
    "do_rescale": Nullable(one_of(True)),
    "do_normalize": Nullable(one_of(True)),
    "rescale_factor": Nullable(number(0.0039215, 0.0039216)),
    "resample": Nullable(one_of(3)),
}
"""Either format's; what says how to prepare an image otherwise than Janus does is not accepted."""

PROCESSOR = {
    "num_image_tokens": whole(1, 1 << 20),
    "add_special_token": one_of(False),  # true keeps a placeholder for which no feature comes: the original fails on it
    "sft_format": one_of("deepseek"),
}


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """`tokenizer.json` with Janus's special tokens, and one BOS in front of whatever it encodes.

    transformers' own loading would rebuild the tokenizer from its class name and lose both the splitting rules and
    the BOS, so the file is read as it is. Raises CheckpointError.
    """
    path = directory / "tokenizer.json"
    tokenizer = read_tokenizer(path, padding_side="left")
    vocabulary = tokenizer.get_vocab()
    tokens = (BOS, EOS, PAD, *IMAGE_TOKENS)
    if missing := [token for token in tokens if token not in vocabulary]:
        raise CheckpointError(f"{path}: Janus's special tokens are missing: {', '.join(missing)}")
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    with refusing(f"{path}: not a tokenizer of text"):
        ids = tokenizer.encode("".join(tokens[1:]))
    if split := [token for token in tokens if ids.count(vocabulary[token]) != 1]:
        raise CheckpointError(f"{path}: Janus's special tokens are not read as one token each: {', '.join(split)}")
    return tokenizer


@dataclass
class VLMImageProcessor:
    """Images to square, normalised pixel values, as the original code prepares them."""

    image_size: int = 384
    min_size: int = 14
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    background_color: Sequence[int] = (127, 127, 127)

    @classmethod
    def from_directory(cls, directory: Path) -> "VLMImageProcessor":
        """Read `preprocessor_config.json`, or the `image_processor` of `processor_config.json`, of either format.

        What they leave out beside sizes, mean and std keeps its default. Raises CheckpointError.
        """
        path, nested = directory / "preprocessor_config.json", directory / "processor_config.json"
        settings: dict[str, Any] = {}
        if not path.exists() and nested.exists():
            settings = read_settings(nested, {"image_processor": Nullable(IMAGE_PROCESSOR)}).get("image_processor", {})
        if settings:
            path = nested
        else:
            settings = read_settings(path, IMAGE_PROCESSOR)
        size = settings.get("size", dict.fromkeys(("height", "width"), settings.get("image_size", ABSENT)))
        side, min_size = size["height"], settings.get("min_size", cls.min_size)
        for key, found, expected, holds in (
            ("image_size", side, SIDE.expected, side is not ABSENT),
            ("size.width", size["width"], f"its height, {side}", size["width"] == side),
            ("min_size", min_size, f"at most image_size, {side}", side is not ABSENT and min_size <= side),
        ):
            if not holds:
                raise CheckpointError(f"{path}: {mismatch(key, expected, found)}")
        names = [field.name for field in fields(cls)]
        return cls(**{name: settings[name] for name in names if name in settings} | {"image_size": side})

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images to pixel values `[n, 3, image_size, image_size]`, float32."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        longest = max(image.size)
        width, height = (max(int(side / longest * self.image_size), self.min_size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(self.background_color))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        pixels = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255.0)
        return ((pixels - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)).permute(2, 0, 1)


@dataclass
class BatchedInputs:
    """A left-padded batch; `prepare_inputs_embeds(**vars(batch))` takes it as it is.

    input_ids, attention_mask, images_seq_mask: `[batch, T]`; pixel_values: `[batch, n, 3, H, W]`;
    images_emb_mask: `[batch, n, num_image_tokens]`.
    """

    sft_format: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    images_seq_mask: Tensor
    pixel_values: Tensor
    images_emb_mask: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "BatchedInputs":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved["pixel_values"] = moved["pixel_values"].to(dtype or self.pixel_values.dtype)
        return replace(self, **moved)


class VLChatProcessor:
    """Conversations and images to a batch of model inputs, under the names of the original code."""

    def __init__(
        self,
        image_processor: VLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        num_image_tokens: int = 576,
        add_special_token: bool = False,
        sft_format: str = "deepseek",
    ):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.system_prompt = SYSTEM_PROMPT
        self.image_tag, self.image_start_tag, self.image_end_tag = IMAGE_TOKENS
        vocabulary = tokenizer.get_vocab()
        self.image_id, self.image_start_id, self.image_end_id = (vocabulary[token] for token in IMAGE_TOKENS)
        self.pad_id = vocabulary[PAD]

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, **others: Any) -> "VLChatProcessor":
        """Read the processor of either checkpoint format, and hold it against `config.json` where that lies beside it.

        Of further keywords, those that choose a hub snapshot are taken and TypeError is raised for the rest. Raises
        CheckpointError for what the files hold.
        """
        directory = resolve_directory(path_or_hub_id, **hub_keywords(cls.__name__, others))
        path = directory / "processor_config.json"
        settings = read_settings(path, PROCESSOR) if path.exists() else {}
        processor = cls(VLMImageProcessor.from_directory(directory), load_tokenizer(directory), **settings)
        if (directory / "config.json").exists():
            processor._check_fits(directory)
        return processor

    def _check_fits(self, directory: Path) -> None:
        config, _ = read_config(directory)
        siglip: Any = config.siglip
        side, patches = siglip.image_size, (siglip.image_size // siglip.patch_size) ** 2
        vocab_size = config.language_config.vocab_size
        last_token, image_size = max(self.tokenizer.get_vocab().values()), self.image_processor.image_size
        for what, found, expected, holds in (
            ("the last token of tokenizer.json", last_token, f"below vocab_size {vocab_size}", last_token < vocab_size),
            ("image_size of the image processor", image_size, f"the tower's {side}", image_size == side),
            ("num_image_tokens", self.num_image_tokens, f"the tower's {patches}", self.num_image_tokens == patches),
        ):
            if not holds:
                raise CheckpointError(f"{directory}: {mismatch(what, f'{expected} (config.json)', found)}")

    def save_pretrained(self, save_directory: str | os.PathLike, **_) -> None:
        """Write tokenizer and settings in the original format."""
        directory = Path(save_directory)
        self.tokenizer.save_pretrained(directory)
        processor = {
            "processor_class": type(self).__name__,
            "image_tag": self.image_tag,
            "num_image_tokens": self.num_image_tokens,
            "add_special_token": self.add_special_token,
            "sft_format": self.sft_format,
        }
        preprocessor = {
            "processor_class": type(self).__name__,
            "image_processor_type": type(self.image_processor).__name__,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.image_processor).items()},
        }
        for name, settings in (("processor_config.json", processor), ("preprocessor_config.json", preprocessor)):
            (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def apply_sft_template_for_multi_turn_prompts(
        self, conversations: Sequence[dict], sft_format: str = "deepseek", system_prompt: str = ""
    ) -> str:
        """The conversation as one string. Raises ValueError for a chat format other than "deepseek"."""
        if sft_format != "deepseek":
            raise ValueError(f"sft_format {sft_format!r} is unknown (expected 'deepseek')")
        return render_conversation(conversations, system_prompt)

    def __call__(
        self,
        *,
        prompt: str | None = None,
        conversations: Sequence[dict] | None = None,
        images: Sequence[Image.Image] = (),
        force_batchify: bool = True,
    ) -> BatchedInputs:
        """One prompt (a rendered string, or a conversation) and its images as a batch of one.

        Raises ValueError where the number of images is not the number of `<image_placeholder>`s.
        """
        if prompt is None:
            prompt = self.apply_sft_template_for_multi_turn_prompts(
                conversations or [], self.sft_format, self.system_prompt
            )
        return self.batchify([(prompt, images)])

    def batchify(self, prompts: Sequence[tuple[str, Sequence[Image.Image]]]) -> BatchedInputs:
        """Rendered prompts, each with its images, as one left-padded batch."""
        rows = [self._input_ids(prompt, len(images)) for prompt, images in prompts]
        length = max(len(row) for row in rows)
        most_images = max(len(images) for _, images in prompts)
        size = self.image_processor.image_size
        ids = torch.full((len(rows), length), self.pad_id)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        pixel_values = torch.zeros(len(rows), most_images, 3, size, size)
        images_emb_mask = torch.zeros((len(rows), most_images, self.num_image_tokens), dtype=torch.bool)
        for i, (row, (_, images)) in enumerate(zip(rows, prompts, strict=True)):
            ids[i, length - len(row) :] = torch.tensor(row)
            attention_mask[i, length - len(row) :] = 1
            if images:
                pixel_values[i, : len(images)] = self.image_processor(images)
                images_emb_mask[i, : len(images)] = True
        return BatchedInputs(
            sft_format=[prompt for prompt, _ in prompts],
            input_ids=ids,
            attention_mask=attention_mask,
            images_seq_mask=ids == self.image_id,
            pixel_values=pixel_values,
            images_emb_mask=images_emb_mask,
        )

    def _input_ids(self, prompt: str, num_images: int) -> list[int]:
        ids = self.tokenizer.encode(prompt)
        if ids.count(self.image_id) != num_images:
            raise ValueError(f"{ids.count(self.image_id)} {self.image_tag} in the prompt for {num_images} images")
        one_image = [self.image_start_id, *[self.image_id] * self.num_image_tokens, self.image_end_id]
        if self.add_special_token:
            one_image.insert(0, self.image_id)
        return [i for token in ids for i in (one_image if token == self.image_id else [token])]
