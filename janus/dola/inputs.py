"""What a processor makes of a question and its images, to what the two towers read."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor


def pixel_values(image_processor, images: Sequence[Image.Image]) -> Tensor:
    """`[n, 3, H, W]` of PIL images, by the image processor here or by the original's, which gives them by name."""
    pixels = image_processor(images)
    return pixels if isinstance(pixels, Tensor) else pixels["pixel_values"]


def embed_inputs(mmgpt, batch) -> Tensor:
    """A processor's batch to embeddings `[batch, T, width]`, image features in the places of the image tokens."""
    if batch.images_emb_mask.any():
        return mmgpt.prepare_inputs_embeds(**vars(batch))
    return mmgpt.language_model.get_input_embeddings()(batch.input_ids)
