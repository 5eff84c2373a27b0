"""The vision prior on the language side, under the name that the plans give it."""

from janus.dola.fusion import VisionPriorLogitsProcessor, first_token_ids, vision_prior

__all__ = ["VisionPriorLogitsProcessor", "first_token_ids", "vision_prior"]
