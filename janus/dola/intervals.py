"""What may be said of differences between decodings: paired intervals, and choices judged on what did not choose."""

from typing import NamedTuple

import numpy as np

FEWEST = 10
"""Examples that an honest interval needs."""


def bootstrap(differences: np.ndarray, draws: int = 2000, at_a_time: int = 100) -> np.ndarray:
    """95% intervals of means over examples, `[examples, k]` to `[k, 2]`, from resampled examples of a fixed seed."""
    count, rng = len(differences), np.random.default_rng(0)
    even = np.full(count, 1 / count)
    means = [rng.multinomial(count, even, at_a_time) @ differences / count for _ in range(draws // at_a_time)]
    return np.quantile(np.concatenate(means), [0.025, 0.975], axis=0).T


def paired(differences: np.ndarray) -> list[float]:
    """`[mean, low, high]` of differences `[examples]`."""
    return [float(differences.mean()), *bootstrap(differences[:, None])[0].tolist()]


class HeldOut(NamedTuple):
    """The best candidate of one half of the examples, judged on the other half, both ways.

    `chosen` is the candidate that each half chose. The differences, `[mean, low, high]` over all examples, are those of
    the chosen candidate over the baseline, and over the best of APC only, which is chosen on the same half.
    """

    chosen: tuple[int, int]
    over_baseline: list[float]
    over_apc_only: list[float]

    @property
    def better(self) -> bool:
        """Whether both differences are above 0 to the lower ends of their intervals."""
        return min(self.over_baseline[1], self.over_apc_only[1]) > 0


def hold_out(baseline: np.ndarray, apc_only: np.ndarray, candidates: np.ndarray) -> HeldOut | None:
    """Two-fold: `[examples]`, `[examples, a]` and `[examples, k]`, larger is better; None below `FEWEST` examples.

    The halves are drawn with a fixed seed.
    """
    count = len(baseline)
    if count < FEWEST:
        return None
    first = np.random.default_rng(0).permutation(count) < count // 2
    chosen, over_baseline, over_apc_only = [], np.empty(count), np.empty(count)
    for choosing in (first, ~first):
        candidate, mask = (int(x[choosing].mean(0).argmax()) for x in (candidates, apc_only))
        chosen.append(candidate)
        over_baseline[~choosing] = (candidates[:, candidate] - baseline)[~choosing]
        over_apc_only[~choosing] = (candidates[:, candidate] - apc_only[:, mask])[~choosing]
    return HeldOut((chosen[0], chosen[1]), paired(over_baseline), paired(over_apc_only))
