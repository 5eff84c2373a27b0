import os
from types import SimpleNamespace

import pytest
import torch

import run_batch_prompts
from conftest import GOLDEN
from generation_inference import Decoding, fill_noise, format_image_prompt, make_generators, sample_image_tokens
from janus.dola import loading
from janus.dola.loading import load_pretrained_model, resolve_device, resolve_dtype


@pytest.mark.parametrize("name", ["tpux", "xla", "meta", "cuda:x", ""])
def test_a_device_that_nothing_here_runs_on_is_unknown(name):
    with pytest.raises(ValueError, match=r"is unknown \(expected auto, cpu, cuda, cuda:N or mps\)"):
        resolve_device(name)


@pytest.mark.parametrize(("there", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_cuda_device_beyond_those_that_are_there_is_refused(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ValueError, match=f"{name!r} asked for, but this machine has {there} CUDA devices"):
        resolve_device(name)


def test_mps_is_taken_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps' asked for, but this machine has no MPS device"):
        resolve_device("mps")


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 * there)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device("auto") == torch.device(expected)
    monkeypatch.setenv("LOCAL_RANK", "3")  # of torchrun
    assert resolve_device("auto") == torch.device("cuda:3" if there else "cpu")


def test_a_numbered_cuda_device_becomes_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(loading.MultiModalityCausalLM, "from_pretrained", lambda _, **to: SimpleNamespace(**to))
    _, _, loaded = load_pretrained_model(GOLDEN, device="cuda:1")
    loaded = vars(loaded)
    assert (loaded["dtype"], loaded["device"]) == (torch.bfloat16, torch.device("cuda:1"))
    assert current == [torch.device("cuda:1")]


# --- Apple's GPU, and every device that is not CUDA ------------------------------------------------------------------


@pytest.mark.parametrize(("newer", "auto"), [(True, torch.bfloat16), (False, torch.float32)])
def test_mps_has_bfloat16_from_macos_14_on(monkeypatch, newer, auto):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version == (14, 0) and newer)
    mps = torch.device("mps")
    assert resolve_dtype("auto", mps) == auto
    assert resolve_dtype("float16", mps) == torch.float16
    if newer:
        assert resolve_dtype("bfloat16", mps) == torch.bfloat16
    else:
        with pytest.raises(ValueError, match="bfloat16 on MPS needs macOS 14 or newer"):
            resolve_dtype("bfloat16", mps)
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("samples", [slice(None), slice(1, 3)])
def test_where_a_device_is_neither_cuda_nor_cpu_the_noise_is_the_cpus(samples):
    class Elsewhere(torch.Tensor):
        """A tensor that says that it is on MPS."""

        device = property(lambda self: torch.device("mps"))  # pyright: ignore[reportAssignmentType]

        def new_empty(self, size, **options):
            assert torch.device(options["device"]).type == "cpu"
            return torch.empty(size)

        def exponential_(self, *_, **__):
            raise AssertionError("drawn on the device")

    noise = [torch.zeros(2, len(range(4)[samples]), 5) for _ in range(2)]
    generators = make_generators([7, 8], torch.device("mps"))
    assert [generator.device.type for generator in generators if generator] == ["cpu", "cpu"]
    fill_noise(noise[0].as_subclass(Elsewhere), generators, 4, samples)
    fill_noise(noise[1], make_generators([7, 8], torch.device("cpu")), 4, samples)
    assert noise[0].min() > 0 and torch.equal(*noise)


def test_away_from_cuda_no_function_of_cuda_is_called(monkeypatch, golden, tmp_path):
    asked = {"is_available", "device_count", "is_initialized", "is_current_stream_capturing", "default_generators"}

    def refuse(*_, **__):
        raise AssertionError("a function of CUDA was called")

    for name, value in vars(torch.cuda).items():
        if callable(value) and not isinstance(value, type) and name not in asked and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, refuse)
    for name in ("CUDAGraph", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    common = ["x", "--model", str(GOLDEN), "--device", "cpu", "--prompt", "a dog", "--parallel_size", "1"]
    monkeypatch.setattr("sys.argv", [*common, "--ab", "--trace", "--outdir", str(tmp_path)])
    run_batch_prompts.main()
    prompt = format_image_prompt(golden.processor, "a dog")
    for decoding in (Decoding(), Decoding((1, 2))):
        sample_image_tokens(golden.model, golden.processor, [prompt], decoding, parallel_size=1, seeds=[0])
    run_batch_prompts.free_cached_memory()


def test_images_per_batch_go_by_the_memory_of_mps_and_by_a_guess_where_the_system_does_not_tell(monkeypatch, golden):
    def fitting(kind):
        weight = type("Weight", (), {"device": torch.device(kind), "element_size": lambda self: 4})()
        embeddings = type("Embeddings", (), {"weight": weight})()
        monkeypatch.setattr(golden.model.language_model, "get_input_embeddings", lambda: embeddings)
        return run_batch_prompts.images_per_batch(golden.model, 2, 10, 16, 1)

    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3_000_000, raising=False)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1_000_000, raising=False)
    some = fitting("mps")
    assert 1 <= some < 64
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 0, raising=False)
    assert some < fitting("mps") <= 64
    monkeypatch.setattr(os, "sysconf_names", {})
    assert fitting("cpu") == 64
