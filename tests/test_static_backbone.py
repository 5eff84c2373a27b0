"""What the CUDA path does beside arithmetic, with stand-ins for torch.cuda: no device is needed."""

import functools
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_generation_inference import DECODINGS, one_graph

from generation_inference import Decoding, sample_image_tokens, tokens_to_images
from janus.dola import static_backbone
from janus.dola.static_backbone import StaticBackbone, Workspace, beside_decoding, capture, capture_lock

SEEDS = [4, 5, 6, 7]
DEVICE = torch.device("cuda", 1)


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's streams, events and graphs as a list of what was asked of them."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")

    class Stream:
        def __init__(self, device):
            self.device = device
            events.append(("stream", device))

        def wait_event(self, event):
            events.append(("wait", event))

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        events.append(("capture", pool, stream, capture_error_mode, capture_lock.locked()))
        yield
        events.append("captured")

    @contextmanager
    def on_stream(stream):
        events.append(("on", stream))
        yield
        events.append("off")

    pools = iter(range(100))
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "graph": graph,
        "stream": on_stream,
        "graph_pool_handle": lambda: next(pools),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return events


@pytest.fixture
def graphed(monkeypatch):
    """Decoding as on CUDA, with steps that are captured by `one_graph`; the workspaces they were captured in."""
    spaces = []

    def captured(step, space):
        spaces.append(space)
        return one_graph(step, space)

    monkeypatch.setattr(static_backbone, "uses_graphs", lambda device: static_backbone.use_graphs)
    monkeypatch.setattr(static_backbone, "use_graphs", True)
    monkeypatch.setattr(static_backbone, "capture", captured)
    monkeypatch.setattr(static_backbone, "GRAPH_BUCKET", 8)
    static_backbone.kept_workspaces.clear()
    yield spaces
    static_backbone.kept_workspaces.clear()


def sample(golden, decoding=DECODINGS[1], prompts=4, **how):
    """Tokens of the golden prompts, two images each."""
    how = {"parallel_size": 2, "seeds": SEEDS[:prompts], **how}
    return sample_image_tokens(golden.model, golden.processor, golden.facts["sft"][:prompts], decoding, **how)


# --- captures --------------------------------------------------------------------------------------------------------


def test_captures_share_a_pool_and_a_stream_of_their_device_and_fail_for_their_own_threads_faults_alone(fake_cuda):
    space: Any = SimpleNamespace(first=SimpleNamespace(device=DEVICE), pool=None, side=None)
    replays = [capture(lambda k=k: k, space) for k in range(2)]
    assert fake_cuda[0] == ("stream", DEVICE)
    captures = [event for event in fake_cuda if event[0] == "capture"]
    assert captures == [("capture", 0, space.side, "thread_local", True)] * 2 and not capture_lock.locked()
    del fake_cuda[:]
    assert [replay() for replay in replays] == [0, 1] and fake_cuda == ["replay", "replay"]


def test_another_threads_work_has_a_stream_of_its_own_and_waits_for_a_capture_and_for_its_input(fake_cuda):
    space: Any = SimpleNamespace(first=SimpleNamespace(device=DEVICE), pool=None, side=None)
    started = threading.Event()

    def write():
        started.set()
        with beside_decoding(DEVICE, "the tokens are there"):  # type: ignore[arg-type]
            fake_cuda.append(("write", capture_lock.locked()))

    writer = threading.Thread(target=write)

    def step():
        writer.start()
        assert started.wait(10)
        fake_cuda.append("step")

    capture(step, space)
    writer.join()
    assert fake_cuda[fake_cuda.index("step") :][:2] == ["step", "captured"]
    stream, wait, on, write_, off = fake_cuda[-5:]
    assert (stream, wait, write_, off) == (("stream", DEVICE), ("wait", "the tokens are there"), ("write", True), "off")
    assert on[1].device == DEVICE


def test_on_the_cpu_another_thread_waits_for_nothing():
    with capture_lock, beside_decoding(torch.device("cpu"), None):
        pass


@pytest.mark.parametrize("window", [1, 4])
def test_a_step_run_twice_leaves_no_mark(golden, monkeypatch, window):
    expected = sample(golden, window=1)
    run = StaticBackbone.run

    def twice(self, step, done, *inputs):
        run(self, step, done, *inputs)
        return run(self, step, done, *inputs)

    monkeypatch.setattr(StaticBackbone, "run", twice)
    assert torch.equal(sample(golden, window=window), expected)


def test_a_capture_that_fails_is_told_in_one_line_and_steps_run_without_from_then_on(golden, graphed, monkeypatch):
    expected = sample(golden, window=1)

    def fail(step, space):
        graphed.append(space)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(static_backbone, "capture", fail)
    tried = len(graphed)
    with pytest.warns(UserWarning, match="no CUDA graphs.*not permitted") as told:
        for window in (1, 4):
            assert torch.equal(sample(golden, window=window), expected)
    assert len(told) == 1 and len(graphed) == tried + 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_a_capture_without_memory_is_the_callers_to_halve(golden, graphed, monkeypatch, error):
    def fail(step, space):
        raise error

    monkeypatch.setattr(static_backbone, "capture", fail)
    with pytest.raises(RuntimeError, match=str(error)):
        sample(golden)
    assert static_backbone.use_graphs and not static_backbone.kept_workspaces  # freed for the halves


def test_a_batch_takes_the_workspace_of_the_last_one_of_its_shape_and_no_two_batches_share_it(golden, graphed):
    inside = []
    first = sample(golden, on_step=lambda _: inside.append(len(static_backbone.kept_workspaces)))
    assert set(inside[:-1]) == {0} and len(static_backbone.kept_workspaces) == 1
    captures = len(graphed)
    assert torch.equal(sample(golden), first) and len(graphed) == captures
    assert torch.equal(
        sample(golden, DECODINGS[2]), sample(golden, DECODINGS[2], window=1)
    )  # its own graphs, one cache
    assert torch.equal(sample(golden, prompts=2), first[:2])
    ((shape, space),) = static_backbone.kept_workspaces.values()
    assert shape[0] == 8 and isinstance(space, Workspace)  # of the last shape alone


def test_what_a_batch_of_nan_left_in_the_cache_is_not_read_by_the_next(golden, graphed):
    expected = sample(golden)
    ((_, space),) = static_backbone.kept_workspaces.values()
    with torch.inference_mode():
        for layer in space.cache:
            layer.fill_(torch.nan)
    assert torch.equal(sample(golden), expected)


# --- compiled --------------------------------------------------------------------------------------------------------


def test_compiled_passes_give_the_same_tokens_and_serve_the_next_batch_too(golden, monkeypatch):
    expected = sample(golden, prompts=1, window=1)
    monkeypatch.setattr(static_backbone, "use_compile", True)
    traces = []

    def backend(graph, inputs):
        traces.append(graph)
        return graph.forward

    monkeypatch.setattr(static_backbone, "compiled", functools.cache(functools.partial(torch.compile, backend=backend)))
    torch.compiler.reset()
    assert torch.equal(sample(golden, prompts=1, window=16), expected)
    assert static_backbone.use_compile and traces
    traced = len(traces)
    assert torch.equal(sample(golden, prompts=1, window=16), expected) and len(traces) == traced


def test_a_compilation_that_fails_is_told_in_one_line_and_nothing_is_compiled_from_then_on(golden, monkeypatch):
    expected = sample(golden, prompts=1, window=1)
    monkeypatch.setattr(static_backbone, "use_compile", True)
    tries = []

    def fail(function):
        tries.append(function)
        raise RuntimeError("backend='inductor' raised:\nno C++ compiler")

    monkeypatch.setattr(static_backbone, "compiled", fail)
    with pytest.warns(UserWarning, match="not compiled: backend='inductor' raised:$"):
        assert torch.equal(sample(golden, prompts=1, window=16), expected)
    assert len(tries) == 1


# --- what it does not serve ------------------------------------------------------------------------------------------


def test_it_refuses_autocast_and_models_on_several_devices(golden, monkeypatch):
    llama = golden.model.language_model.model
    assert StaticBackbone.serves(llama)
    with torch.autocast("cpu", torch.bfloat16):
        assert not StaticBackbone.serves(llama)
    elsewhere = [*llama.parameters(), torch.nn.Parameter(torch.empty(1, device="meta"))]
    monkeypatch.setattr(llama, "parameters", lambda: iter(elsewhere))
    assert not StaticBackbone.serves(llama)


# --- garbage is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [Decoding(), Decoding((4,)), Decoding((2, 5))], ids=str)
@pytest.mark.parametrize("window", [1, 4])
def test_nan_is_an_error_that_names_the_token_and_the_image(golden, decoding, window):
    passes = 0

    def spoil(module, arguments, states):
        nonlocal passes
        passes += 1
        if passes == 4:
            states[-2:] = torch.nan  # both branches of the last image
        return states

    hook = golden.model.language_model.model.layers[0].register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match=r"NaN at token [1-9]\d* of image 7"):
            sample(golden, decoding, window=window)
    finally:
        hook.remove()


def test_pixels_are_those_that_numpy_makes_of_the_decoders_output(golden):
    codes = torch.from_numpy(golden.tensors["gen0.tokens"].numpy())
    images = tokens_to_images(golden.model, codes)
    side = int(codes.shape[1] ** 0.5)
    with torch.inference_mode():
        decoded = golden.model.gen_vision_model.decode_code(codes.int(), shape=[len(codes), 8, side, side])
    pixels = np.clip((decoded.numpy().transpose(0, 2, 3, 1) + 1) / 2 * 255, 0, 255).astype(np.uint8)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels)
