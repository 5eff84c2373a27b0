from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generation_inference import tokens_to_images
from janus.dola.cli import JANUS_TINY
from janus.dola.loading import load_pretrained_model
from tolerance import assert_close, terms_of
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


@torch.no_grad()
def test_the_bank_holds_seen_drawings_and_samples_half_of_them_unshifted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train, "ONE", train.ONE[:3])
    monkeypatch.setattr(train, "TWO", train.TWO[:5])
    _, _, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    vq = train.VQ(train.janus_config(512))
    vq.vq.load_state_dict(model.gen_vision_model.state_dict())
    train.encode_drawings(vq.eval(), tmp_path / "codes.pt")
    monkeypatch.setattr(train, "TWO", train.TWO[::-1])  # as many drawings, others in each place: encoded anew
    bank = train.encode_drawings(vq, tmp_path / "codes.pt")
    assert bank.codes.shape == (3 * 9 + 5 * 3, 64)
    for (scene, _), image in zip(bank.drawings, tokens_to_images(model, bank.codes), strict=True):
        assert scenes.judge(np.asarray(image))[0] == scene and not scenes.is_held_out(scene)
    sampled = [bank.drawings[k] for k in bank.sample(np.random.default_rng(0), 20_000)]
    one = [shift for scene, shift in sampled if scene.size]
    two = [shift for scene, shift in sampled if scene.relation]
    assert len(one) / len(sampled) == pytest.approx(0.35, abs=0.02)
    for shifts in (one, two):
        assert shifts.count((0, 0)) / len(shifts) == pytest.approx(0.5, abs=0.02)


def test_no_oblong_passes_for_a_drawing_that_a_caption_names():
    rng = np.random.default_rng(0)
    for _ in range(200):
        image, background = train.draw_oblong(rng)
        assert (image == scenes.BACKGROUNDS[background]).all(-1).any()
        assert scenes.judge(image)[1] > scenes.CLEAN


def test_only_the_answers_and_their_eos_are_learned(tokenizer, tmp_path: Path):
    processor = train.write_processor(tokenizer, tmp_path)
    asked = "<|User|>: What?\n\n<|Assistant|>: red<｜end▁of▁sentence｜><|User|>: How?\n\n<|Assistant|>: a blue star"
    ids = torch.tensor([processor.tokenizer.encode(asked + "<｜end▁of▁sentence｜>")])
    labels = train.answer_labels(ids, processor)
    assert processor.tokenizer.decode(labels[labels != -100]) == (
        " red<｜end▁of▁sentence｜> a blue star<｜end▁of▁sentence｜>"
    )


@torch.no_grad()
def test_packed_questions_are_read_as_each_would_be_alone():
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    batch = [train.ONE[3], train.TWO[70]]
    images = [Image.fromarray(scenes.render(scene)) for scene in batch]
    head = processor.batchify([(train.render_question(processor, "?", "")[0], [image]) for image in images])
    before = head.input_ids.shape[1]
    turns = train.pack_turns(processor, [scenes.questions(scene) for scene in batch], before)
    embeds = torch.cat([model.prepare_inputs_embeds(**vars(head)), model.get_input_embeddings()(turns.ids)], dim=1)
    backbone = model.language_model.model
    packed = backbone(inputs_embeds=embeds, attention_mask=turns.mask, position_ids=turns.position_ids)
    terms = terms_of(model.vision_model, model.aligner, backbone)
    for row, (scene, image) in enumerate(zip(batch, images, strict=True)):
        at = before
        for _, question, answer in scenes.questions(scene):
            text = "".join(train.render_question(processor, question, answer))
            alone = processor.batchify([(text, [image])])
            states = backbone(inputs_embeds=model.prepare_inputs_embeds(**vars(alone))).last_hidden_state[0, before:]
            assert torch.equal(turns.ids[row, at - before :][: len(states)], alone.input_ids[0, before:])
            assert_close(packed.last_hidden_state[row, at:][: len(states)], states, terms)
            at += len(states)


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
