"""What a processor makes of a question and its images, to what the two towers read."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pixel_values(image_processor, images: Sequence[Image.Image]) -> Tensor:
    """`[n, 3, H, W]` of PIL images, by the image processor here or by the original's, which gives them by name."""
    pixels = image_processor(images)
    return pixels if isinstance(pixels, Tensor) else pixels["pixel_values"]


def embed_inputs(mmgpt, batch) -> Tensor:
    """A processor's batch to embeddings `[batch, T, width]`, image features in the places of the image tokens."""
    if batch.images_emb_mask.any():
        return mmgpt.prepare_inputs_embeds(**vars(batch))
    return mmgpt.language_model.get_input_embeddings()(batch.input_ids)


def embed_each(mmgpt, vl_chat_processor, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Tensor]:
    """Rendered prompts, each on one image, to embeddings `[T, width]` each; the tower reads the images together."""
    weight = mmgpt.language_model.get_input_embeddings().weight
    batches = [
        vars(vl_chat_processor(prompt=prompt, images=[image], force_batchify=True).to(weight.device, weight.dtype))
        for prompt, image in zip(prompts, images, strict=True)
    ]
    together = {
        name: pad_sequence([batch[name][0] for batch in batches], batch_first=True)
        for name in ("input_ids", "pixel_values", "images_seq_mask", "images_emb_mask")
    }
    embeds = mmgpt.prepare_inputs_embeds(**together)
    return [row[: batch["input_ids"].shape[1]] for row, batch in zip(embeds, batches, strict=True)]
