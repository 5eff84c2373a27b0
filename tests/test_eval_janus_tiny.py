import numpy as np
import pytest

from generation_inference import Decoding
from tools import eval_janus_tiny, scenes
from tools.eval_janus_tiny import SPLITS, count_read, markdown, painting_rates, percent, sample_scenes, wilson


def test_wilson_is_the_textbook_interval_and_stays_within_0_and_1():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == pytest.approx(1.0)
    assert percent((97, 100)) == "97.0 [92, 99]"


def test_the_splits_hold_every_scene_once():
    assert [len(every) for every in SPLITS.values()] == [259, 29, 12180, 1356]
    assert not {s.caption for s in SPLITS["one object, seen"]} & {s.caption for s in SPLITS["one object, held out"]}


def test_a_sample_repeats_itself_for_a_seed_and_goes_round_a_short_list():
    every = SPLITS["one object, held out"]
    sample = sample_scenes(every, 40, seed=1)
    assert sample == sample_scenes(every, 40, seed=1)
    assert set(sample[:29]) == set(every) and sample[29:] == sample[:11]


def test_only_the_image_of_the_scene_itself_counts():
    first, second = sample_scenes(SPLITS["two objects, seen"], 2, seed=3)
    images = [scenes.draw(first, np.random.default_rng(0)), scenes.draw(first, np.random.default_rng(1))]
    assert count_read(images, [first, second]) == (1, 2)


def test_a_painting_is_met_by_its_nearest_drawing_and_clean_or_near_by_its_distance(monkeypatch):
    def paint(model, processor, wanted, decoding):
        """One true drawing, one 9 grey levels off, one 30 off, and one of another scene."""
        drawn = [scenes.render(scene).astype(int) for scene in [*wanted[:3], wanted[0]]]
        return [np.abs(image - off).astype(np.uint8) for image, off in zip(drawn, (0, 9, 30, 0), strict=True)]

    monkeypatch.setattr(eval_janus_tiny, "paint", paint)
    rates = painting_rates(None, None, Decoding(), 4, near=5.0)  # pyright: ignore[reportArgumentType]
    assert all(rate == (3, 4) for rate in rates.met.values()) and rates.met.keys() == SPLITS.keys()
    assert set(rates.clean.values()) == {(2, 4)} and set(rates.near.values()) == {(1, 4)}
    assert 8 < rates.distance < 10


def test_a_table_is_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
