import pytest
import torch

from conftest import GOLDEN
from janus.dola import loading
from janus.dola.loading import load_pretrained_model, resolve_device


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
    monkeypatch.setattr(loading.MultiModalityCausalLM, "from_pretrained", lambda _, **to: to)
    _, _, loaded = load_pretrained_model(GOLDEN, device="cuda:1")
    assert loaded == {"dtype": torch.bfloat16, "device": torch.device("cuda:1")}
    assert current == [torch.device("cuda:1")]
