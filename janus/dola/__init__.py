"""DoLa beside the model: all of it that is neither a root script nor the model itself."""

import logging

__version__ = "0.2.0"

for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed
    logging.getLogger(noisy).setLevel(logging.ERROR)
