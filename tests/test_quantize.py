import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image

import run_batch_prompts
from benchmarks.small_machines import computed_bytes, num_bytes
from conftest import GOLDEN
from generation_inference import (
    Decoding,
    format_image_prompt,
    image_geometry,
    num_image_tokens,
    sample_image_tokens,
    tokens_to_images,
)
from inference import answer, answer_with_dola_static
from janus.dola import quantize as quantizing
from janus.dola import static_backbone
from janus.dola.cli import JANUS_TINY
from janus.dola.layer_search import __main__ as layer_search
from janus.dola.loading import load_pretrained_model
from janus.models import MultiModalityCausalLM
from tools import scenes

KINDS = tuple(quantizing.LIBRARIES)
ERROR = {"int8": 0.02, "int4": 0.2}
"""Of a layer's output, relative: twice what the libraries give."""


def load(kind, source=GOLDEN, dtype="float32", **options):
    if kind:
        pytest.importorskip(quantizing.LIBRARIES[kind], reason=f"{kind} needs it")
    return load_pretrained_model(source, dtype, "cpu", kind, **options)[1:]


def is_whole(parameter):
    return type(parameter) is torch.nn.Parameter and parameter.is_floating_point()


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(golden, kind):
    _, model = load(kind)
    whole = dict(golden.model.named_parameters())
    for name, parameter in model.named_parameters():
        quantised = name.startswith("language_model.model.layers.") and whole[name].dim() == 2
        assert is_whole(parameter) != quantised, name
        if not quantised:
            assert torch.equal(parameter, whole[name]), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_computes_nearly_what_the_whole_one_does(kind, dtype):
    pytest.importorskip(quantizing.LIBRARIES[kind], reason=f"{kind} needs it")
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 72, bias=False, dtype=getattr(torch, dtype))
    x = torch.randn(2, 5, 96, dtype=linear.weight.dtype)
    expected = linear(x)
    got = quantizing.linear_quantizer(kind)(linear)(x)
    assert got.dtype == expected.dtype
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    assert 0 < error < ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding((1,)), Decoding((1, 2)), Decoding((1,), cfg_order="contrast_first"), Decoding(gamma=0.0)],
)
def test_every_decoding_window_and_backbone_gives_a_quantised_model_the_same_tokens(monkeypatch, kind, decoding):
    processor, model = load(kind)
    prompts = [format_image_prompt(processor, text) for text in ("a dog", "a very big dog")]

    def sample(window):
        return sample_image_tokens(model, processor, prompts, decoding, parallel_size=2, seeds=[0, 1], window=window)

    tokens = sample(1)
    assert torch.equal(sample(4), tokens)
    assert static_backbone.StaticBackbone.serves(model.language_model.model)
    monkeypatch.setattr(static_backbone.StaticBackbone, "serves", staticmethod(lambda llama: False))
    assert torch.equal(sample(1), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_quantised_janus_tiny_are_right_with_dola_and_without(kind):
    processor, model = load(kind, JANUS_TINY)
    scene = scenes.one_object_scenes()[0]
    image = Image.fromarray(scenes.render(scene, 0, 0))
    _, question, expected = scenes.questions(scene)[0]
    assert answer(model, processor, image, question).strip() == expected
    assert answer_with_dola_static(model, processor, image, question, layer=6).strip() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_has_the_bytes_that_are_computed(golden, kind):
    _, model = load(kind, dtype="bfloat16")
    assert num_bytes(model) == sum(computed_bytes(golden.model, kind).values())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_painting_run_keeps_how_its_model_was_quantised_and_paints_again_with_it(tmp_path, monkeypatch, capsys, kind):
    load(kind)
    flags = ["--quantize", kind] if kind else []
    common = ["x", "--model", str(GOLDEN), "--device", "cpu", "--dtype", "float32"]
    painted = [*common, "--prompt", "a dog", "--parallel_size", "1", "--outdir", str(tmp_path / "a"), *flags]
    monkeypatch.setattr(sys, "argv", painted)
    run_batch_prompts.main()
    image = tmp_path / "a" / "0000_a_dog_p0.jpg"
    assert run_batch_prompts.read_settings(image).get("quantize") == kind
    monkeypatch.setattr(sys, "argv", [*common, "--again", str(image), "--outdir", str(tmp_path / "b")])
    run_batch_prompts.main()
    assert "the same tokens" in capsys.readouterr().out
    if kind:
        monkeypatch.setattr(sys, "argv", painted[: -len(flags)])
        with pytest.raises(ValueError, match=r"holds a run with other settings \(quantize\)"):
            run_batch_prompts.main()


def test_what_cannot_be_quantised_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="quantize must be int8 or int4, got 'int2'"):
        load_pretrained_model(GOLDEN, "float32", "cpu", "int2")
    for kind, library in quantizing.LIBRARIES.items():
        for name in (library, f"{library}.quantization", f"{library}.nn"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"^{kind} needs {library}: pip install {library}$"):
            load_pretrained_model(GOLDEN, "float32", "cpu", kind)


def test_what_is_quantised_or_offloaded_is_not_saved(tmp_path):
    for _, model in [load("int8"), load(None, offload=True)]:
        with pytest.raises(ValueError, match="a model that is quantised or offloaded cannot be saved"):
            model.save_pretrained(tmp_path)


MEASURE = """
import sys, torch
from benchmarks.decode_memory import memory
from benchmarks.small_machines import num_bytes
from janus.models import MultiModalityCausalLM
MultiModalityCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantize=sys.argv[3])
before = memory("VmRSS")
model = MultiModalityCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16, quantize=sys.argv[3])
print((memory("VmHWM") - before) / num_bytes(model))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "most"), [("int8", 1.3), ("int4", 1.5)])
def test_loading_a_quantised_model_needs_little_more_than_its_size(tmp_path, kind, most):
    pytest.importorskip(quantizing.LIBRARIES[kind], reason=f"{kind} needs it")
    from test_models import other_config

    config = other_config(hidden_size=640, intermediate_size=1792, num_hidden_layers=24, vocab_size=8000)
    model: Any = MultiModalityCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(GOLDEN), str(tmp_path), kind]
    assert float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < most


# --- offload ---------------------------------------------------------------------------------------------------------


def in_memory(part):
    there = {not parameter.is_meta for parameter in part.parameters()}
    assert len(there) == 1
    return there.pop()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_offloaded_tower_and_vq_are_in_memory_in_turn_and_compute_the_same(golden, kind):
    _, model = load(kind, offload=True)
    parts = [(m.vision_model.vision_tower, m.gen_vision_model) for m in (model, golden.model)]
    tower, vq = parts[0]
    assert not in_memory(tower) and not in_memory(vq)
    blocks = model.get_submodule("language_model.model.layers.0.self_attn.q_proj").weight
    side, size = image_geometry(model, golden.processor)[0], model.config.siglip.image_size
    codes = torch.arange(num_image_tokens(model, golden.processor))[None]
    pixels, picture = torch.rand(1, 3, size, size), torch.rand(1, 3, side, side)
    for _ in range(2):
        assert tokens_to_images(model, codes) == tokens_to_images(golden.model, codes)
        assert in_memory(vq) and not in_memory(tower)
        features, expected = (t.get_intermediate_layers(pixels, n=[0, 1], norm=True) for t, _ in parts)
        assert all(map(torch.equal, features, expected))
        assert torch.equal(*(t.forward_head(features[0]) for t, _ in parts))
        assert in_memory(tower) and not in_memory(vq)
        assert torch.equal(*(v.encode(picture)[2][2] for _, v in parts))
    assert model.get_submodule("language_model.model.layers.0.self_attn.q_proj").weight is blocks
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


def test_a_best_of_run_with_offload_writes_what_it_writes_without(tmp_path, monkeypatch):
    for name, flags in (("whole", []), ("offload", ["--offload"])):
        common = ["x", "--model", str(GOLDEN), "--device", "cpu", "--dtype", "float32", "--prompt", "a dog"]
        monkeypatch.setattr(sys, "argv", [*common, "--best_of", "2", "--outdir", str(tmp_path / name), *flags])
        run_batch_prompts.main()
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(files) >= 3
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "offload" / f).read_bytes() for f in files)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_search_reads_a_quantised_model_and_refuses_an_offloaded_one(tmp_path, monkeypatch, drawings, kind):
    load(kind)
    common = ["x", "answers", "--model", str(GOLDEN), "--device", "cpu", "--data", str(drawings / "answers.jsonl")]
    monkeypatch.setattr(sys, "argv", [*common, "--outdir", str(tmp_path / "out"), "--quantize", kind])
    layer_search.main()
    assert json.loads((tmp_path / "out" / "layer_search.json").read_text())["quantize"] == kind
    monkeypatch.setattr(sys, "argv", [*common, "--outdir", str(tmp_path / "other"), "--offload"])
    with pytest.raises(ValueError, match="--offload: a layer search reads all weights"):
        layer_search.main()
