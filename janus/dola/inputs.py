"""What a processor makes of a question and its images, to what the two towers read."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad


def pixel_values(image_processor, images: Sequence[Image.Image]) -> Tensor:
    """`[n, 3, H, W]` of PIL images, by the image processor here or by the original's, which gives them by name."""
    pixels = image_processor(images)
    return pixels if isinstance(pixels, Tensor) else pixels["pixel_values"]


def pad_together(batches: Sequence[Any], pad_id: int) -> Any:
    """A processor's batches as one: padded on the left, and with as many places for images as the fullest has."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.input_ids.shape[1] for batch in batches)
    most_images = max(batch.pixel_values.shape[1] for batch in batches)

    def join(name: str, fill: int = 0) -> Tensor:
        values = [getattr(batch, name) for batch in batches]
        return torch.cat([pad(x, (length - x.shape[1], 0), value=fill) for x in values])

    def join_images(name: str) -> Tensor:
        values = [getattr(batch, name) for batch in batches]
        return torch.cat([pad(x, (0, 0) * (x.dim() - 2) + (0, most_images - x.shape[1])) for x in values])

    return SimpleNamespace(
        sft_format=[text for batch in batches for text in batch.sft_format],
        input_ids=join("input_ids", pad_id),
        attention_mask=join("attention_mask"),
        images_seq_mask=join("images_seq_mask"),
        pixel_values=join_images("pixel_values"),
        images_emb_mask=join_images("images_emb_mask"),
    )


def embed_inputs(mmgpt, batch) -> Tensor:
    """A processor's batch to embeddings `[batch, T, width]`, image features in the places of the image tokens."""
    if batch.images_emb_mask.any():
        return mmgpt.prepare_inputs_embeds(**vars(batch))
    return mmgpt.language_model.get_input_embeddings()(batch.input_ids)


def embed_each(mmgpt, vl_chat_processor, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Tensor]:
    """Rendered prompts, each on one image, to embeddings `[T, width]` each; the tower reads the images together."""
    weight = mmgpt.language_model.get_input_embeddings().weight
    batches = [
        vl_chat_processor(prompt=prompt, images=[image], force_batchify=True).to(weight.device, weight.dtype)
        for prompt, image in zip(prompts, images, strict=True)
    ]
    together = pad_together(batches, vl_chat_processor.pad_id)
    embeds = embed_inputs(mmgpt, together)
    return [row[real] for row, real in zip(embeds, together.attention_mask.bool(), strict=True)]
