"""Scorers of an image against its prompt, each against the same sum written out plainly."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generation_inference import format_question
from janus.dola.cli import JANUS_TINY
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, tower_depth
from janus.dola.scorers import CAPTION_QUESTION, VQA_QUESTION, Reader, make_scorer, needs_model
from janus.dola.text_encoder import load_text_encoder
from tolerance import assert_close, terms_of
from tools import scenes

PROMPTS = ["a red circle", "two cats on a mat", "a dog"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.fixture(scope="module")
def reader(golden) -> Reader:
    return Reader(golden.model, golden.processor, partial(format_question, golden.processor))


@pytest.fixture(scope="module")
def score(reader, text_encoder, images):
    def with_spec(spec: str, images: Sequence[Image.Image] = images, prompts: Sequence[str] = PROMPTS) -> list[float]:
        return list(make_scorer(spec, reader, lambda: load_text_encoder(text_encoder))(images, prompts))

    return with_spec


@torch.inference_mode()
def states(golden, image: Image.Image, question: str, answer: list[int]) -> tuple[torch.Tensor, ...]:
    """All layers' states `[T, width]` of one chat, its answer behind it."""
    processor, llama = golden.processor, golden.model.language_model.model
    batch = processor(prompt=format_question(processor, question), images=[image])
    embeds = golden.model.prepare_inputs_embeds(**vars(batch))
    embeds = torch.cat([embeds, llama.embed_tokens(torch.tensor([answer], dtype=torch.long))], dim=1)
    return tuple(h[0] for h in llama(inputs_embeds=embeds, output_hidden_states=True).hidden_states)


@torch.inference_mode()
def log_probs(golden, h: torch.Tensor) -> np.ndarray:
    logits = golden.model.language_model.lm_head(h).double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def p_hat(
    golden, hidden: Sequence[torch.Tensor], layer: int, alpha: float, norm: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log p_hat and log q_N, `[T, vocab]`."""
    ln_out = golden.model.language_model.model.norm
    log_qN = log_probs(golden, hidden[-1])
    log_qj = log_probs(golden, ln_out(hidden[layer]) if norm else hidden[layer])
    kept = log_qN >= np.log(alpha) + log_qN.max(-1, keepdims=True) if alpha else np.full(log_qN.shape, True)
    F = np.where(kept, log_qN - log_qj, -np.inf)
    return F - np.log(np.exp(F - F.max(-1, keepdims=True)).sum(-1, keepdims=True)) - F.max(-1, keepdims=True), log_qN


def terms(golden) -> int:
    return terms_of(golden.model.vision_model, golden.model.aligner, golden.model.language_model)


READINGS = [("", None), (",layer=2", (2, 0.1, True)), (",layer=3,alpha=0.6,norm=off", (3, 0.6, False))]


WHOLE = [(",layer=2,alpha=0", (2, 0.0, True)), (",layer=3,alpha=0,norm=off", (3, 0.0, False))]
"""A random model's mask drops nearly every true token; without it the contrast is seen."""


@pytest.mark.parametrize(("options", "reading"), READINGS + WHOLE)
def test_caption_is_the_mean_log_probability_of_the_prompt_as_the_answer(golden, images, score, options, reading):
    expected, tokenizer = [], golden.processor.tokenizer
    for image, prompt in zip(images, PROMPTS, strict=True):
        answer = [*tokenizer.encode(f" {prompt}", add_special_tokens=False), tokenizer.eos_token_id]
        hidden = [h[-len(answer) - 1 : -1] for h in states(golden, image, CAPTION_QUESTION, answer)]
        log_p, log_qN = (log_probs(golden, hidden[-1]),) * 2 if reading is None else p_hat(golden, hidden, *reading)
        told = [(log_p[t, token], log_qN[t, token]) for t, token in enumerate(answer)]
        expected.append(np.mean([p if np.isfinite(p) else q for p, q in told]))
    assert_close(score(f"caption{options}"), expected, terms(golden), max(map(abs, expected)))


@pytest.mark.parametrize(("options", "reading"), READINGS + WHOLE)
def test_vqa_is_the_share_of_yes_among_yes_and_no(golden, images, score, options, reading):
    expected, tokenizer = [], golden.processor.tokenizer
    for image, prompt in zip(images, PROMPTS, strict=True):
        p = {"yes": 0.0, "no": 0.0}
        for word in p:
            spellings = [space + form for form in (word, word.capitalize()) for space in ("", " ")]
            rows = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
            for ids in {
                tuple(row[: next(k for k, i in enumerate(row) if tokenizer.decode([i]).strip()) + 1]) for row in rows
            }:
                hidden = [h[-len(ids) :] for h in states(golden, image, VQA_QUESTION.format(prompt), list(ids[:-1]))]
                log_p, _ = (log_probs(golden, hidden[-1]),) * 2 if reading is None else p_hat(golden, hidden, *reading)
                p[word] += np.exp(sum(log_p[t, token] for t, token in enumerate(ids)))
        expected.append(p["yes"] / (p["yes"] + p["no"]) if p["yes"] + p["no"] else 0.5)
    assert set(expected) != {0.5} or (options, reading) not in [READINGS[0], *WHOLE], "something is told"
    assert_close(score(f"vqa{options}"), expected, terms(golden), 1.0)


def test_vqa_tells_captions_from_near_misses_though_janus_tiny_spells_its_space():
    """Its tokenizer has no " yes": the next token is a space, and says nothing."""
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    score = make_scorer("vqa", Reader(model, processor, partial(format_question, processor)), lambda: (None, None))
    shown = scenes.one_object_scenes()[::13]
    wrong = [replace(scene, size={"small": "large", "large": "small"}[str(scene.size)]) for scene in shown]
    images = [Image.fromarray(scenes.render(scene)) for scene in shown]
    own, other = (score(images, [scene.caption for scene in named]) for named in (shown, wrong))
    assert np.mean([a > 0.5 for a in own]) > 0.8 and np.mean([b < 0.5 for b in other]) > 0.8


@pytest.mark.parametrize("layer", [None, 1])
def test_tower_is_the_cosine_of_the_feature_and_the_text(golden, images, text_encoder, score, layer):
    siglip, tokenizer = load_text_encoder(text_encoder)
    bank = build_text_bank(siglip, tokenizer, PROMPTS)
    tower = golden.model.vision_model.vision_tower
    with torch.inference_mode():
        pixels = golden.processor.image_processor(images)
        h, cosines = tower.embeddings(pixels), []
        for block in tower.encoder.layers:
            h = block(h, None)
            z = tower.head(tower.post_layernorm(h))
            cosines.append((z * bank).sum(-1) / z.norm(dim=-1) / bank.norm(dim=-1))
    expected = cosines[-1] if layer is None else cosines[-1] - cosines[layer - 1]
    spec = "tower" if layer is None else f"tower,layer={layer}"
    assert_close(score(spec), expected, terms_of(tower), 1.0)


@pytest.mark.parametrize("spec", ["caption", "vqa", "tower", "caption,layer=2"])
def test_images_are_scored_together_as_one_by_one(golden, images, score, spec):
    one_by_one = [score(spec, [image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    assert_close(score(spec, images * 4, PROMPTS * 4), one_by_one * 4, terms(golden), max(1.0, *map(abs, one_by_one)))


@pytest.mark.parametrize("name", ["caption", "tower"])
def test_the_last_layer_is_no_contrast(golden, score, name):
    model = golden.model
    depth = len(model.language_model.model.layers)
    depth = depth if name == "caption" else tower_depth(model.vision_model.vision_tower)
    assert score(f"{name},layer={depth}") == score(name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", "expected caption, vqa, tower, or module:function"),
        ("clip:", "expected caption, vqa, tower, or module:function"),
        ("os.system('x'):y", "expected caption, vqa, tower, or module:function"),
        ("caption,cfg=3", "reads with layer, alpha, norm, not with cfg_weight"),
        ("tower,layer=2,alpha=0.5", "reads with layer, norm, not with alpha"),
        ("vqa,alpha=0.5", "DoLa in its reading needs a layer"),
        ("caption,layer=2,alpha=7", "alpha must be in"),
        ("caption,layer=99", "layer must be in 1.."),
        ("no_such_module:score", "No module named"),
        ("tools.scenes:no_such", "no_such"),
        ("tools.scenes:SIDE", "SIDE is no function"),
    ],
)
def test_a_spec_that_is_none_is_one_line(score, spec, message):
    with pytest.raises(ValueError, match=r"^(scorer|alpha|layer)") as error:
        score(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def gives_nothing(images, prompts):
    return None


def gives_one_number(images, prompts):
    return [1.0]


def gives_nan(images, prompts):
    return torch.tensor([1.0, float("nan"), 2.0])


def gives_words(images, prompts):
    return ["good"] * len(images)


@pytest.mark.parametrize("function", [gives_nothing, gives_one_number, gives_nan, gives_words])
def test_a_function_that_scores_not_every_image_is_refused(score, function):
    with pytest.raises(ValueError, match=f"^scorer '{__name__}:{function.__name__}'"):
        score(f"{__name__}:{function.__name__}")


def test_a_function_of_the_current_directory_is_found_and_needs_no_model(images, tmp_path, monkeypatch):
    Path(tmp_path / "my_scorer.py").write_text("def width(images, prompts):\n    return [i.width for i in images]\n")
    monkeypatch.chdir(tmp_path)
    assert not needs_model("my_scorer:width") and needs_model("vqa")
    assert make_scorer("my_scorer:width", None, lambda: (None, None))(images, PROMPTS) == [16.0] * 3


def test_the_judge_of_drawn_scenes_scores_drawings_and_refuses_what_is_none(images):
    rng = np.random.default_rng(0)
    drawn = [*scenes.one_object_scenes()[:2], scenes.two_object_scenes()[5]]
    pictures, captions = [Image.fromarray(scenes.draw(s, rng)) for s in drawn], [s.caption for s in drawn]
    assert scenes.prompt_met(pictures, captions) == [1, 1, 1]
    assert scenes.prompt_met(pictures, captions[1:] + captions[:1]) == [0, 0, 0]
    bitten = np.asarray(pictures[0]).copy()
    bitten[:12, :12] = 255 - bitten[:12, :12]
    spoilt = [Image.fromarray(bitten), *pictures[1:]]
    assert scenes.prompt_met(spoilt, captions) == [1, 1, 1] and scenes.prompt_met_clean(spoilt, captions) == [0, 1, 1]
    with pytest.raises(ValueError, match="'a dog' is no caption"):
        scenes.prompt_met(pictures[:1], ["a dog"])
    with pytest.raises(ValueError, match="64 x 64 pixels"):
        scenes.prompt_met(images[:1], captions[:1])
