from pathlib import Path

import numpy as np
import pytest
import torch

from tools import scenes
from tools import train_janus_tiny as train


@pytest.fixture(scope="module")
def tokenizer():
    return train.build_tokenizer()


def test_the_tokenizer_keeps_any_text_and_the_words_of_the_scenes_whole(tokenizer):
    for text in ("画一只狗 😀\n\ttab", "naïve café", scenes.two_object_scenes()[0].caption):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for word in (*scenes.COLOURS, *scenes.SHAPES, *scenes.BACKGROUNDS, *scenes.SIZES):
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(" " + word).ids) == 1
    for token in (*train.SPECIAL_FIRST, *train.SPECIAL_LAST, *train.ROLES):
        assert len(tokenizer.encode(token).ids) == 1


def test_near_misses_are_seen_scenes_that_differ():
    rng = np.random.default_rng(0)
    for scene in train.ONE[::40] + train.TWO[::1500]:
        misses = train.near_misses(scene, rng)
        assert misses and scene not in misses
        assert not any(map(scenes.is_held_out, misses))


def test_only_the_answers_and_their_eos_are_learned(tokenizer, tmp_path: Path):
    processor = train.write_processor(tokenizer, tmp_path)
    asked = "<|User|>: What?\n\n<|Assistant|>: red<｜end▁of▁sentence｜><|User|>: How?\n\n<|Assistant|>: a blue star"
    ids = torch.tensor([processor.tokenizer.encode(asked + "<｜end▁of▁sentence｜>")])
    labels = train.answer_labels(ids, processor)
    assert processor.tokenizer.decode(labels[labels != -100]) == (
        " red<｜end▁of▁sentence｜> a blue star<｜end▁of▁sentence｜>"
    )


def test_a_resumed_stage_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path):
    def run(work: Path, stops: list[int]) -> torch.Tensor:
        work.mkdir()
        weight = torch.empty(0)
        for steps in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 1)

            def loss_at(step: int, model=model) -> torch.Tensor:
                x = torch.from_numpy(train.rng_at("toy", step).normal(size=(4, 3))).float()
                return (model(x) - x.sum(-1, keepdim=True)).pow(2).mean()

            train.fit("toy", model, loss_at, steps, lambda _: 0.01, work)
            weight = model.weight
        return weight

    assert torch.equal(run(tmp_path / "once", [9]), run(tmp_path / "resumed", [4, 9]))


def test_text_not_trained_on_is_what_the_held_out_lists_say():
    assert not any(map(scenes.is_held_out, train.ONE + train.TWO))
    assert len(train.ONE) == 259 and len(train.TWO) == 12180
