import numpy as np
import pytest

from janus.dola import intervals
from janus.dola.intervals import hold_out, paired


def test_a_paired_interval_holds_the_true_mean_as_often_as_it_says():
    held = 0
    for seed in range(200):
        low, high = paired(np.random.default_rng(seed).normal(0.3, 1, 60))[1:]
        held += low <= 0.3 <= high
    assert 0.90 * 200 <= held <= 0.98 * 200


def test_held_out_examples_judge_what_the_others_chose():
    rng = np.random.default_rng(0)
    baseline = rng.normal(0, 1, 100)
    gains = np.array([0.0, 0.5, 0.2])
    candidates = baseline[:, None] + gains + rng.normal(0, 0.1, (100, 3))
    apc_only = baseline[:, None] + np.array([0.1, -0.2])
    found = hold_out(baseline, apc_only, candidates)
    assert found is not None and found.chosen == (1, 1) and found.better
    assert found.over_baseline[0] == pytest.approx((candidates[:, 1] - baseline).mean())
    assert found.over_apc_only[0] == pytest.approx((candidates[:, 1] - apc_only[:, 0]).mean())


def test_each_half_is_judged_by_the_choice_of_the_other():
    count = 40
    first = np.random.default_rng(0).permutation(count) < count // 2  # the halves, as hold_out draws them
    candidates = np.where(first[:, None], [1.0, 0.0], [0.0, 2.0])
    found = hold_out(np.zeros(count), np.zeros((count, 1)), candidates)
    assert found is not None and found.chosen == (0, 1)
    assert found.over_baseline == [0, 0, 0] and not found.better  # each wins where it was chosen, and only there


def test_too_few_examples_are_not_judged():
    few = np.ones((intervals.FEWEST - 1, 1))
    assert hold_out(0 * few[:, 0], 0 * few, few) is None
