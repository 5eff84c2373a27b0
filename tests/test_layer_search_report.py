"""Layer searches: what the numbers allow to say, and the switches that are written."""

import json

import numpy as np
import pytest

from janus.dola.layer_search.metrics import summarise
from janus.dola.layer_search.report import Decision, claims, decide, table, update_switches
from janus.dola.switches import DoLaSwitches


def made_up(gain: dict[int, float], count: int = 60, noise: float = 0.02) -> np.ndarray:
    """`[examples, 2 metrics, 2 alphas, 2 + 5 layers]`: prob 0.5 for the baseline, 0.52 for APC only, and the gains."""
    rng = np.random.default_rng(1)
    prob = np.full((count, 2, 7), 0.5) + rng.normal(0, 0.1, (count, 1, 1))
    prob[..., 1] += 0.02
    for layer, more in gain.items():
        prob[:, 1, 1 + layer] += more + rng.normal(0, noise, count)
    return np.stack([prob, prob], axis=1)


def test_the_best_layer_stands_beside_the_baseline_and_the_mask_alone():
    summary = summarise(made_up({4: 0.1, 2: 0.01}), ["prob", "rank"], 6, range(1, 6), (0.1, 0.2))
    best = summary["best"]
    assert (best["layer"], best["alpha"]) == (4, 0.2)
    assert best["value"] == pytest.approx(summary["means"]["prob"]["dola"][1][3])
    mean, low, high = best["over_baseline"]
    assert low < mean < high and mean == pytest.approx(0.1, abs=0.01) and high - low < 0.02
    assert best["over_apc_only"][0] == pytest.approx(mean - 0.02)
    assert summary["over_baseline"]["dola"][1][3] == pytest.approx(best["over_baseline"], abs=1e-9)
    assert "Best: layer 4 at alpha 0.2" in claims(summary)[0] and "adds to the mask" in claims(summary)[1]
    assert "*" in table(summary)


def test_no_claim_is_made_for_what_the_mask_explains_nor_for_noise():
    explained = summarise(made_up({4: 0.02}), ["prob", "rank"], 6, range(1, 6), (0.1, 0.2))
    assert claims(explained)[0].startswith("Best:") and "adds nothing certain" in claims(explained)[1]
    lost = summarise(made_up(dict.fromkeys(range(1, 6), -0.1))[:, :, 1:], ["prob", "rank"], 6, range(1, 6), (0.2,))
    assert claims(lost)[0].startswith("No layer is better than the baseline")


def test_each_domain_has_its_layer_and_says_when_it_is_no_better():
    values = np.concatenate([made_up({4: 0.1}), made_up({4: 0.1, 1: 0.105}), made_up({2: 0.1}), made_up({2: 0.1})[:3]])
    domains = ["same"] * 60 + ["alike"] * 60 + ["other"] * 60 + ["few"] * 3
    summary = summarise(values, ["prob", "rank"], 6, range(1, 6), (0.1, 0.2), domains)
    said = {line.split()[1]: line for line in claims(summary)[2:]}
    assert summary["best"]["layer"] == 4
    assert [summary["domains"][name]["best"]["layer"] for name in ("same", "alike", "other")] == [4, 1, 2]
    assert "is best, as overall" in said["same"]
    assert "not better" in said["alike"] and "not better" in said["few"]
    assert "is better than layer 4" in said["other"]


def decided(gain: dict[int, float], count: int = 60) -> Decision:
    return decide(summarise(made_up(gain, count), ["prob", "rank"], 6, range(1, 6), (0.1, 0.2)), "made up")


def test_a_contrast_is_on_only_where_it_beats_baseline_and_mask_on_examples_that_did_not_choose_it():
    better = decided({4: 0.1, 2: 0.01})
    assert better[:3] == (True, 4, 0.2) and better.why.startswith("on: the best contrast, chosen on one half")
    explained = decided({4: 0.02})
    assert not explained.on and "over APC only" in explained.why
    assert not decided(dict.fromkeys(range(1, 6), -0.1)).on
    few = decided({4: 0.1}, count=9)
    assert not few.on and few.why == "off: fewer than 10 examples (made up)"


def test_the_luck_of_the_best_of_many_switches_next_to_nothing_on():
    """Of 45 layers of pure noise the best often lies above the baseline and the mask; held out, it seldom does."""
    lucky, switched_on = 0, 0
    for seed in range(40):
        own = np.random.default_rng(seed).normal(0.5, 0.1, (40, 1, 47))
        summary = summarise(np.stack([own, own], axis=1), ["prob", "rank"], 46, range(1, 46), (0.1,))
        lucky += min(summary["best"]["over_baseline"][1], summary["best"]["over_apc_only"][1]) > 0
        switched_on += decide(summary, "noise").on
    assert lucky >= 10 and switched_on <= 2


def test_an_update_keeps_what_else_a_switches_file_holds(tmp_path):
    file = tmp_path / "s.json"
    file.write_text(
        '{"alpha_V": 0.4, "why": {"tower": "off: t"}, "domains": {"art": {"fixed_layer_vit": 3}, "maps": {}}}'
    )
    decisions = {
        None: Decision(True, 7, 0.2, "on: a"),
        "art": Decision(False, 5, 0.5, "off: b"),
        "sky": Decision(True, 6, 0.2, "on: c"),
    }
    update_switches(file, "answers", decisions)
    on, off = {"use_dola_lm_static": True}, {"use_dola_lm_static": False}
    assert json.loads(file.read_text()) == {
        "alpha_V": 0.4,
        **on,
        "fixed_layer_llm": 7,
        "alpha_L": 0.2,
        "why": {"tower": "off: t", "answers": "on: a"},
        "domains": {
            "art": {"fixed_layer_vit": 3, **off, "fixed_layer_llm": 5, "alpha_L": 0.5, "why": {"answers": "off: b"}},
            "maps": {},
            "sky": {**on, "fixed_layer_llm": 6, "alpha_L": 0.2, "why": {"answers": "on: c"}},
        },
    }
    assert DoLaSwitches.from_json(file, "art").fixed_layer_llm == 5


def test_what_was_not_searched_is_off_in_a_new_file(tmp_path):
    update_switches(tmp_path / "s.json", "tower", {None: Decision(True, 3, 0.1, "on: a")})
    switches = DoLaSwitches.from_json(tmp_path / "s.json")
    assert switches.use_dola_siglip_static and not switches.use_dola_lm_static and not switches.use_dola_gen_static
