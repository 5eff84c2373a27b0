import numpy as np
import pytest

from tools import scenes
from tools.scenes import Scene

ALL = scenes.one_object_scenes() + scenes.two_object_scenes()


def test_captions_follow_the_grammar_and_name_each_scene_once():
    one = Scene((("orange", "star"),), "gray", size="large")
    two = Scene((("red", "cross"), ("blue", "circle")), "black", relation="left of")
    assert one.caption == "a large orange star on a gray background"
    assert two.caption == "a red cross left of a blue circle on a black background"
    assert len(scenes.one_object_scenes()) == 288 and len(scenes.two_object_scenes()) == 13536
    assert len({scene.caption for scene in ALL}) == len(ALL)


def test_a_tenth_of_the_combinations_is_held_out_and_a_pair_in_either_order():
    assert sum(map(scenes.is_held_out, scenes.one_object_scenes())) == 29
    assert sum(map(scenes.is_held_out, scenes.two_object_scenes())) == 113 * 2 * 2 * 3
    pair = next(scene for scene in scenes.two_object_scenes() if scenes.is_held_out(scene))
    assert scenes.is_held_out(Scene(pair.objects[::-1], "white", relation="above"))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_shape_fills_its_place_and_leaves_the_background_alone(shape: str):
    image = scenes.render(Scene((("red", shape),), "white", size="large"))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[32, 32]) == (220, 40, 40)
    rows, columns = np.nonzero((image != 245).any(-1))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    assert abs(top - (32 - 0.38 * 64)) <= 1 and abs(left + right - 63) <= 1
    if shape != "star":
        assert abs(bottom - top - 0.76 * 64) <= 2 and abs(right - left - 0.76 * 64) <= 2
    assert tuple(image[1, 1]) == (245, 245, 245)


def test_drawing_twice_from_one_seed_gives_one_image():
    first, second = (scenes.draw(ALL[0], np.random.default_rng(3)) for _ in range(2))
    assert (first == second).all()


def test_every_question_on_every_scene_has_one_answer():
    for scene in ALL[::7]:
        asked = scenes.questions(scene)
        assert len({question for _, question, _ in asked}) == len(asked)
    two = Scene((("red", "cross"), ("red", "circle")), "black", relation="above")
    answers = {question: answer for _, question, answer in scenes.questions(two)}
    assert answers["What is above the red circle?"] == "a red cross"
    assert answers["What colour is the cross?"] == "red" and answers["How many objects are there?"] == "two"
    assert "What shape is the red object?" not in answers


def test_the_judge_reads_jittered_noisy_drawings_back():
    rng = np.random.default_rng(0)
    for scene in rng.permutation(np.array(ALL, dtype=object))[:60]:
        image = scenes.render(scene, *rng.uniform(-2, 2, 2)) + rng.normal(0, 15, (64, 64, 3))
        assert scenes.judge(image.clip(0, 255).astype(np.uint8))[0] == scene


def test_the_judge_measures_the_distance_to_the_nearest_drawing():
    scene, distance = scenes.judge(scenes.render(ALL[5], 1, -2))
    assert scene == ALL[5] and distance < 0.5
    image = scenes.render(ALL[5]).astype(np.int16)
    image[:8, :8] += np.where(image[:8, :8] > 128, -100, 100)
    assert scenes.judge(image.astype(np.uint8))[1] == pytest.approx(100 / 8, abs=0.1)
