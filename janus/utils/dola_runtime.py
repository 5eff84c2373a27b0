"""The arithmetic of the root module, under the name that the plans give it."""

from dola_runtime import (
    compute_logprobs_from_hidden,
    contrast_with_apc_from_logits,
    contrast_with_apc_from_logprobs,
    dola_static_from_hidden,
    jsd_from_logprobs,
    pick_static_layer_index,
    sanitize_candidate_layers,
    select_layer_by_jsd,
)

__all__ = [
    "compute_logprobs_from_hidden",
    "contrast_with_apc_from_logits",
    "contrast_with_apc_from_logprobs",
    "dola_static_from_hidden",
    "jsd_from_logprobs",
    "pick_static_layer_index",
    "sanitize_candidate_layers",
    "select_layer_by_jsd",
]
