"""What a processor makes of a question and its images, to what the two towers read."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

FILLED_CACHES = int(transformers.__version__.partition(".")[0]) >= 5
"""Whether `generate` goes on from a cache where it is given embeddings."""


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


@torch.inference_mode()
def read_prompts(mmgpt, batches: Sequence[Any], pad_id: int, copies: int = 1) -> dict[str, Any]:
    """Prepared questions as what `generate` is called with; what several begin with, up to the images, is read once.

    copies: how many sequences `generate` makes of each, beams among them. The mask tells a place's position, as it does
    for padding, so that there may be padding between what is read once and the rest.
    """
    heads = [
        1 + int(batch.images_seq_mask[0].nonzero().max()) if batch.images_seq_mask.any() else 0 for batch in batches
    ]
    begins = [
        (batch.input_ids[0, :head].cpu().numpy().tobytes(), batch.pixel_values.float().cpu().numpy().tobytes())
        for batch, head in zip(batches, heads, strict=True)
    ]
    different = list(dict.fromkeys(begins))
    if len(different) == len(batches) or not all(heads) or not FILLED_CACHES:
        together = pad_together(batches, pad_id)
        return {"inputs_embeds": embed_inputs(mmgpt, together), "attention_mask": together.attention_mask}
    first = [begins.index(begin) for begin in different]
    read = pad_together([cut(batches[row], 0, heads[row]) for row in first], pad_id)
    rest = pad_together([cut(batch, head, None) for batch, head in zip(batches, heads, strict=True)], pad_id)
    embeds, words = embed_inputs(mmgpt, read), mmgpt.language_model.get_input_embeddings()
    positions = (read.attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = mmgpt.language_model.model(
        inputs_embeds=embeds, attention_mask=read.attention_mask, position_ids=positions, use_cache=True
    ).past_key_values
    row_of = torch.tensor([different.index(begin) for begin in begins], device=embeds.device)
    cache.batch_select_indices(row_of.repeat_interleave(copies))
    return {
        "inputs_embeds": torch.cat([embeds[row_of], words(rest.input_ids)], dim=1),
        "attention_mask": torch.cat([read.attention_mask[row_of], rest.attention_mask], dim=1),
        "past_key_values": cache,
    }


def cut(batch, start: int, stop: int | None) -> SimpleNamespace:
    """Some of the tokens of a processor's batch."""
    tokens = {name: getattr(batch, name)[:, start:stop] for name in ("input_ids", "attention_mask", "images_seq_mask")}
    return SimpleNamespace(**vars(batch) | tokens)


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
