"""DoLa on the SigLIP tower, under the name that the plans give it."""

from janus.dola.rerank import build_probs_from_rep, rerank_with_dola_siglip, rerank_with_dola_static_siglip

__all__ = ["build_probs_from_rep", "rerank_with_dola_siglip", "rerank_with_dola_static_siglip"]
