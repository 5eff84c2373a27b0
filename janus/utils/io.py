"""Loading a checkpoint, under the name that Janus code uses."""

from janus.dola.loading import load_pretrained_model

__all__ = ["load_pretrained_model"]
