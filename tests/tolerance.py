"""What float32 allows: the tolerances of all tests."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Every tolerance of the suite comes from here, not from what one machine gave. A sum of n float32 numbers is off by
# about eps * sqrt(n) of their size, in whatever order and with whatever fused operations a machine's kernels add it up
# (roundings are as good as random; n * eps, the worst case, is not met). What passes through many sums is off by all of
# their roundings together, so n counts the terms of all of them: of a network, the fan-in of every weight. The size is
# that of the numbers added: for log-probabilities, and what comes from them, that of the logits. The factor is for what
# is not counted: the roundings of both sides of a comparison, softmax and norms. Ranks and other counts are compared as
# the range that they have when every log-probability may be off by so much.


def float32_error(terms: int, size: float = 1.0) -> float:
    """How far a float32 number may be off that `terms` additions of numbers up to `size` made."""
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(terms) * size


def terms_of(*networks: nn.Module) -> int:
    """The terms of all sums on the way through networks: the fan-in of every weight."""
    return sum(weight[0].numel() for network in networks for weight in network.parameters() if weight.ndim > 1)


def assert_close(got: Any, expected: Any, terms: int, size: float | None = None) -> None:
    """Same shape, and equal but for `float32_error`; `size` is by default that of the largest number expected."""
    got, expected = (np.asarray(x.detach().double() if isinstance(x, Tensor) else x, float) for x in (got, expected))
    assert got.shape == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    error = float32_error(terms, finite.max(initial=0.0) if size is None else size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=error, equal_nan=False)
