"""A question and its images, prepared by a processor, to what the language model reads."""

from torch import Tensor


def embed_inputs(mmgpt, batch) -> Tensor:
    """A processor's batch to embeddings `[batch, T, width]`, image features in the places of the image tokens."""
    if batch.pixel_values.shape[1]:
        return mmgpt.prepare_inputs_embeds(**vars(batch))
    return mmgpt.language_model.get_input_embeddings()(batch.input_ids)
