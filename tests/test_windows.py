"""Several tokens per pass: the tokens of one by one, whatever the window, the decoding and the batch."""

from typing import Any

import pytest
import torch
from test_generation_inference import DECODINGS, one_graph, plain_dola

import generation_inference
from generation_inference import (
    Decoding,
    EagerBackbone,
    Record,
    format_image_prompt,
    generate,
    generate_with_dola,
    generate_with_dola_static,
    sample_image_tokens,
)
from janus.dola import static_backbone
from janus.dola.cli import JANUS_TINY
from janus.dola.loading import load_pretrained_model
from janus.dola.prompt_files import read_prompts
from janus.dola.static_backbone import StaticBackbone
from run_batch_prompts import EXAMPLE_PROMPTS
from tolerance import assert_close, terms_of

SEEDS = [4, 5, 6, 7]


@pytest.fixture(scope="module")
def tiny():
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    return model, processor, [format_image_prompt(processor, p.text) for p in read_prompts(EXAMPLE_PROMPTS, 4)]


@pytest.fixture
def passes(monkeypatch):
    """The rows that each pass read: the length of the list is the number of passes after the first."""
    rows = []
    read = StaticBackbone.__call__

    def counted(self, embeds):
        rows.append(len(embeds))
        return read(self, embeds)

    monkeypatch.setattr(StaticBackbone, "__call__", counted)
    return rows


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_every_window_gives_the_tokens_of_one_by_one(golden, decoding):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    assert len({len(processor.tokenizer.encode(prompt)) for prompt in prompts}) > 1
    how: dict[str, Any] = {"parallel_size": 3, "seeds": SEEDS}
    one_by_one = sample_image_tokens(model, processor, prompts, decoding, window=1, **how)
    for window in (2, 5, 16, 40):
        assert torch.equal(sample_image_tokens(model, processor, prompts, decoding, window=window, **how), one_by_one)
    some = sample_image_tokens(model, processor, prompts, decoding, window=5, samples=slice(1, 3), **how)
    assert torch.equal(some, one_by_one[:, 1:])


@pytest.mark.parametrize("order", ["guide_first", "contrast_first"])
def test_windows_give_the_tokens_of_a_plain_float64_implementation(golden, order):
    model, processor, prompt = golden.model, golden.processor, golden.facts["sft"][2]
    for generate_dola, layers in (generate_with_dola_static, [4]), (generate_with_dola, [1, 3, 5]):
        expected, _ = plain_dola(model, processor, prompt, layers, 0.1, 3.0, 0.9, 3, 11, order)
        which: dict[str, Any] = {"layer": 4} if len(layers) == 1 else {"candidate_layers": layers}
        how: dict[str, Any] = {
            "alpha": 0.1,
            "cfg_weight": 3.0,
            "temperature": 0.9,
            "cfg_order": order,
            "parallel_size": 3,
            "seed": 11,
        }
        _, tokens = generate_dola(model, processor, prompt, **which, **how, window=6, return_tokens=True)
        assert torch.equal(tokens, expected)


def test_off_with_windows_gives_the_tokens_of_the_reference_loop_and_leaves_its_generator(
    golden, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, processor, prompt = golden.model, golden.processor, golden.facts["sft"][0]
    torch.manual_seed(9)
    reference, after = generate(model, processor, prompt, 1.0, 3, 5.0), torch.get_rng_state()
    torch.manual_seed(9)
    decoding = Decoding(cfg_weight=5.0)
    (tokens,) = sample_image_tokens(model, processor, [prompt], decoding, parallel_size=3, window=4)
    assert torch.equal(tokens, reference.long()) and torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("decoding", [Decoding(cfg_weight=1.5), Decoding((6,), cfg_weight=1.5)], ids=str)
def test_a_trained_model_takes_a_third_of_the_passes_to_the_same_tokens(tiny, passes, decoding):
    model, processor, prompts = tiny
    for i, prompt in enumerate(prompts):
        how: dict[str, Any] = {"parallel_size": 1, "seeds": [i]}
        windows = sample_image_tokens(model, processor, [prompt], decoding, **how)
        counted = len(passes)
        assert torch.equal(windows, sample_image_tokens(model, processor, [prompt], decoding, window=1, **how))
        del passes[counted:]
    assert len(passes) + len(prompts) < 64 * len(prompts) / 3


# --- the pace of each image ------------------------------------------------------------------------------------------


def test_finished_images_leave_the_work_and_every_token_is_told_once(tiny, passes):
    model, processor, prompts = tiny
    told = []
    how: dict[str, Any] = {"parallel_size": 3, "seeds": SEEDS}
    decoding = Decoding((6,), cfg_weight=1.5)
    tokens = sample_image_tokens(model, processor, prompts, decoding, window=8, on_step=told.append, **how)
    assert torch.equal(tokens, sample_image_tokens(model, processor, prompts, decoding, window=1, **how))
    del passes[len(told) - 1 :]
    assert passes[0] == 24 and passes == sorted(passes, reverse=True) and len(set(passes)) > 3
    assert sum(told) == tokens.numel() and told[0] == len(tokens.flatten(0, 1))
    assert len(told) < 64 / 2


def test_one_by_one_tells_of_a_token_of_every_image_per_step(golden):
    told = []
    how: dict[str, Any] = {"parallel_size": 3, "window": 1, "on_step": told.append}
    sample_image_tokens(golden.model, golden.processor, golden.facts["sft"][:2], Decoding(), **how)
    assert told == [6] * 16


def test_whoever_watches_sees_final_tokens_that_no_later_pass_changes(tiny):
    model, processor, prompts = tiny
    seen: list[tuple[list[int], torch.Tensor]] = []
    tokens = sample_image_tokens(
        model,
        processor,
        prompts[:1],
        Decoding((6,), cfg_weight=1.5),
        parallel_size=3,
        seeds=SEEDS[:1],
        window=8,
        watch=lambda draft: seen.append((draft.final.tolist(), draft.tokens.clone())),
    )
    assert seen[0][0] == [1, 1, 1] and seen[-1][0] == [64, 64, 64]
    for final, drawn in seen:
        assert all(torch.equal(drawn[i, :n], tokens[0, i, :n]) for i, n in enumerate(final))


def test_the_trace_is_that_of_one_by_one(golden):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    terms = terms_of(model.gen_aligner, model.language_model, model.gen_head)
    for decoding in DECODINGS:
        guidance = decoding.cfg_weight + abs(1 - decoding.cfg_weight)
        size = guidance * float(golden.tensors["gen0.step0.gen_logits"].abs().max()) / decoding.temperature
        records = [Record(8, 16, top_k=5) for _ in range(2)]
        for record, window in zip(records, (1, 6), strict=True):
            sample_image_tokens(
                model, processor, prompts, decoding, parallel_size=2, seeds=SEEDS, window=window, record=record
            )
        traces = [record.steps() for record in records]
        assert len(traces[0]) == len(traces[1]) == 16
        for one, other in zip(*traces, strict=True):
            assert one.keys() == other.keys()
            for key in ("layer", "argmax_changed", "draw_changed"):
                assert one.get(key) == other.get(key)
            for key in ("q_N", "q_j", "p_hat"):
                for row, other_row in zip(one[key], other[key], strict=True):
                    assert_close([p for _, p in row], [p for _, p in other_row], terms, size)
            assert_close(one["jsd"], other["jsd"], terms, size)


# --- captured steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODINGS, ids=str)
def test_captured_windows_give_the_same_tokens_over_buckets_batches_and_leaving_images(
    golden, passes, monkeypatch, decoding
):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    how: dict[str, Any] = {"parallel_size": 2, "seeds": SEEDS}
    expected = sample_image_tokens(model, processor, prompts, decoding, window=1, **how)
    monkeypatch.setattr(static_backbone, "uses_graphs", lambda device: True)
    monkeypatch.setattr(static_backbone, "GRAPH_BUCKET", 8)
    captured = []

    def capture(step, space):
        captured.append(space)
        return one_graph(step, space)

    monkeypatch.setattr(static_backbone, "capture", capture)
    passes.clear()
    assert torch.equal(sample_image_tokens(model, processor, prompts, decoding, window=4, **how), expected)
    assert set(passes) <= {16, 8, 4, 2}
    assert len(captured) > 1 and len(set(map(id, captured))) == 1
    first = len(captured)
    backwards = sample_image_tokens(
        model, processor, prompts[::-1], decoding, window=4, parallel_size=2, seeds=SEEDS[::-1]
    )
    assert torch.equal(backwards.flip(0), expected) and len(captured) <= first + 2  # nearly all steps were there


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_backbone_with_a_cache_of_its_own_goes_one_by_one(golden, monkeypatch):
    model, processor, prompts = golden.model, golden.processor, golden.facts["sft"]
    expected = sample_image_tokens(model, processor, prompts, Decoding((4,)), parallel_size=2, seeds=SEEDS)
    monkeypatch.setattr(generation_inference, "pick_backbone", lambda _: EagerBackbone)
    told = []
    tokens = sample_image_tokens(
        model, processor, prompts, Decoding((4,)), parallel_size=2, seeds=SEEDS, window=8, on_step=told.append
    )
    assert torch.equal(tokens, expected) and len(told) == 16


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_below_one_is_a_value_error_that_names_it(golden, window):
    with pytest.raises(ValueError, match=f"window must be a whole number of at least 1, got {window}"):
        generate_with_dola_static(golden.model, golden.processor, golden.facts["sft"][0], window=window)
