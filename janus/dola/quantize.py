"""The linear layers of a LLaMA's blocks in 8 or 4 bits, one at a time, each by the library that does it on any device.

Both compute in the dtype of what comes in, so that everything that reads hidden states reads a quantised model's too.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes"}


def linear_quantizer(quantize: str) -> Callable[[nn.Linear], nn.Linear]:
    """What puts a linear layer's weight into 8 or 4 bits where it lies, and returns the layer to have in its place.

    "int8" is symmetric with a scale for each output; "int4" is NF4 in blocks of 64, their scales in 8 bits. Raises
    ValueError for another name, and where the library for it is not installed.
    """
    if quantize not in LIBRARIES:
        raise ValueError(f"quantize must be {' or '.join(LIBRARIES)}, got {quantize!r}")
    try:
        with _without_notes():
            return _int8_quantizer() if quantize == "int8" else _int4_quantizer()
    except ImportError:
        raise ValueError(f"{quantize} needs {LIBRARIES[quantize]}: pip install {LIBRARIES[quantize]}") from None


def quantize_blocks(llama, quantize: str) -> None:
    """Put the blocks of a LlamaModel into 8 or 4 bits, in place. Raises ValueError as `linear_quantizer`."""
    put = linear_quantizer(quantize)
    for name, module in list(llama.layers.named_modules()):
        if isinstance(module, nn.Linear):
            llama.layers.set_submodule(name, put(module))


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep off the terminal which of their kernels for other machines the libraries did not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _int8_quantizer() -> Callable[[nn.Linear], nn.Linear]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig(set_inductor_config=False)

    def put(linear: nn.Linear) -> nn.Linear:
        quantize_(linear, config)
        return linear

    return put


def _int4_quantizer() -> Callable[[nn.Linear], nn.Linear]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    four_bits: Any = Params4bit  # made by its __new__, which type checkers do not follow

    def put(linear: nn.Linear) -> nn.Linear:
        weight = linear.weight
        quantized = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        quantized.weight = four_bits(weight.data, quant_type="nf4").to(weight.device)
        quantized.bias = linear.bias
        quantized.support_avx512bf16_for_cpu = False  # its packing asks for widths of multiples of 32
        return quantized

    return put
