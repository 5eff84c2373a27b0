"""Layer searches: what the numbers allow to say, and the switches that are written."""

import json

import numpy as np
import pytest

from janus.dola.layer_search.metrics import summarise
from janus.dola.layer_search.report import claims, table, update_switches


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


def test_an_update_keeps_what_else_a_switches_file_holds(tmp_path):
    file = tmp_path / "s.json"
    file.write_text('{"alpha_V": 0.4, "domains": {"art": {"fixed_layer_vit": 3}, "maps": {}}}')
    summary = {
        "best": {"layer": 7, "alpha": 0.2},
        "domains": {"art": {"best": {"layer": 5, "alpha": 0.5}}, "sky": {"best": {"layer": 6, "alpha": 0.2}}},
    }
    update_switches(file, "answers", summary)
    assert json.loads(file.read_text()) == {
        "alpha_V": 0.4,
        "fixed_layer_llm": 7,
        "alpha_L": 0.2,
        "domains": {
            "art": {"fixed_layer_vit": 3, "fixed_layer_llm": 5, "alpha_L": 0.5},
            "maps": {},
            "sky": {"fixed_layer_llm": 6, "alpha_L": 0.2},
        },
    }
