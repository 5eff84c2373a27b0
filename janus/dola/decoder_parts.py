"""What DoLa reads in any decoder-only model of transformers: its blocks, its final norm, its head."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn, tanh
from transformers import PreTrainedModel

NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class DecoderParts(NamedTuple):
    """What DoLa reads in a causal language model: `decoder.layers[j - 1]` makes `hidden_states[j]`."""

    decoder: nn.Module
    layers: nn.ModuleList
    ln_out: nn.Module
    phi: Callable[..., Tensor]
    """`phi(h, columns=None)`: normed states `[..., width]` to logits `[..., vocab]`, or to some columns of them."""


def find_decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find the blocks, the final norm and the head of a decoder-only model.

    The head is read with the soft cap of Gemma's logits where the config sets one. Raises ValueError, naming the
    class, for an encoder-decoder, for a model without one of the parts, and for one that rescales its logits
    outside lm_head.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    blocks = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    norms = [norm for norm in (getattr(decoder, name, None) for name in NORM_NAMES) if norm is not None]
    if config.is_encoder_decoder or head is None or not blocks or not norms:
        raise ValueError(f"{name} is not a decoder-only model with a list of blocks, a final norm and an lm_head")
    scales = {key: getattr(config, key) for key in LOGIT_SCALES if getattr(config, key, None) not in (None, 1)}
    if scales:
        raise ValueError(f"{name} rescales its logits after lm_head ({scales}); an earlier layer cannot be read alike")
    cap = getattr(config, "final_logit_softcapping", None)

    def phi(h: Tensor, columns: Tensor | None = None) -> Tensor:
        if columns is None:
            logits = head(h)
        elif type(head) is nn.Linear:
            logits = nn.functional.linear(h, head.weight[columns], None if head.bias is None else head.bias[columns])
        else:
            logits = head(h)[..., columns]
        return logits if cap is None else cap * tanh(logits / cap)

    return DecoderParts(decoder, blocks[0], norms[0], phi)
