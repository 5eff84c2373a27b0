"""The LLaMA backbone over a preallocated cache, several positions per pass; on CUDA one captured graph per step.

It leans on what transformers does inside, and nothing else here does; `StaticBackbone.serves` tells where it holds
(4.56 and newer; before, the eager backbone decodes), tests/test_transformers_internals.py tries it on a release:

- `LlamaDecoderLayer(h, attention_mask=, position_embeddings=, use_cache=, and the cache as past_key_values= or, from
  5.24, as cache=)` returns the states alone.
- Each attention layer calls `cache.update(key, value, layer_idx, ...)` once, and attends to what comes back.
- Attention looks up `config._attn_implementation` at every call. "sdpa" takes a mask of bools (true: attend) or one
  that is added, and without a mask is causal unless there is one query; "eager" adds the mask it is given.
- `LlamaModel` has `layers`, `norm`, `embed_tokens`, and `rotary_emb(h, positions)` that gives `position_embeddings`.
  Attention layers have `head_dim`, the config `num_key_value_heads`.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LlamaModel

from janus.dola.memory import is_out_of_memory

BUCKET, GRAPH_BUCKET = 16, 128
"""Attention reads so many cache positions or a multiple. The cache grows by the first, so that what is read lies in one
piece (the CPU's products copy what does not); where steps are captured, it is whole, and there is a graph for each."""

use_graphs = True
"""Whether steps are captured on CUDA; after a capture that fails they are not."""

use_compile = False
"""Whether passes over a window are compiled; after a compilation that fails they are not."""

capture_lock = threading.Lock()
"""Held during a capture, and by other threads' work on the same device."""


def uses_graphs(device: torch.device) -> bool:
    return use_graphs and device.type == "cuda"


@contextmanager
def beside_decoding(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Within, another thread's CUDA work has a stream of its own, begins after `ready`, and meets no capture."""
    if device.type != "cuda" or ready is None:
        yield
        return
    with capture_lock:
        own = torch.cuda.Stream(device)
        own.wait_event(ready)
        with torch.cuda.stream(own):
            yield


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function)


class Workspace:
    """The cache of a batch, and what captured steps are bound to beside it: they serve the next batch of its shape.

    cache: by layer, keys and values `[2, rows, heads, capacity, dim]`; start, first: where in it each row's prompt
    begins, and where the first token of a step goes, `[rows]`; inputs: buffers of the step's inputs.
    """

    def __init__(self, llama: LlamaModel, rows: int, capacity: int):
        attention: Any = llama.layers[0].self_attn
        heads: Any = llama.config.num_key_value_heads
        weight = llama.embed_tokens.weight
        shape = (2, rows, heads, capacity, attention.head_dim)
        self.cache = [weight.new_zeros(shape) for _ in llama.layers]  # masked, but 0 x NaN is NaN
        self.start, self.first = torch.zeros((2, rows), dtype=torch.long, device=weight.device)
        self.inputs: list[Tensor] = []
        self.replays: dict[Any, Callable[[], Any]] = {}
        self.pool: Any = None  # one memory pool and one side stream for all captures
        self.side: Any = None


kept_workspaces: WeakKeyDictionary[LlamaModel, tuple[Any, Workspace]] = WeakKeyDictionary()
"""By model, shape and workspace of the last batch whose steps were captured; a batch takes it out and puts it back."""


def capture(step: Callable[[], Any], space: Workspace) -> Callable[[], Any]:
    """The CUDA graph of a step that has run before, as a function that replays it and returns what it returned."""
    device = space.first.device
    if space.pool is None:
        space.pool, space.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with capture_lock, torch.cuda.graph(graph, space.pool, space.side, capture_error_mode="thread_local"):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@contextmanager
def attending_by(implementation: str, llama: LlamaModel) -> Iterator[None]:
    """Within, transformers' attention layers attend by another of its implementations."""
    own = llama.config._attn_implementation
    llama.config._attn_implementation = implementation
    try:
        yield
    finally:
        llama.config._attn_implementation = own


def cache_name(llama: LlamaModel) -> str | None:
    """The name under which a decoder layer takes its cache; None before transformers 4.56, where this cannot serve."""
    parameters = signature(type(llama.layers[0]).forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


class StaticBackbone:
    """Reads the wanted layers of transformers' LlamaModel; itself the cache that its attention layers update.

    decoding: tells which contrast layers are read and how, and captured steps apart; rows: sequences decoded together;
    length: positions of the longest prompt plus the tokens to come; window: positions read per pass.
    """

    def __init__(self, llama: LlamaModel, decoding, rows: int, length: int, window: int):
        self.llama, self.decoding, self.rows, self.window = llama, decoding, rows, window
        self.cache_name: Any = cache_name(llama)
        self.graphed = uses_graphs(llama.embed_tokens.weight.device)
        self.shape = (rows, self.in_buckets(length + window) if self.graphed else 0, window)
        kept = kept_workspaces.pop(llama, None)
        if kept is not None and kept[0] != self.shape:
            kept = None  # before its successor is made: not both in memory
        self.space = Workspace(llama, *self.shape[:2]) if kept is None else kept[1]

    @staticmethod
    def serves(llama) -> bool:
        """Whether this is a LLaMA of transformers that attends by sdpa and takes its cache as this class gives it.

        Whole on one device and outside autocast.
        """
        if not isinstance(llama, LlamaModel) or llama.config._attn_implementation != "sdpa" or not cache_name(llama):
            return False
        devices = {parameter.device for parameter in llama.parameters()}
        return len(devices) == 1 and not torch.is_autocast_enabled(devices.pop().type)

    def in_buckets(self, positions: int) -> int:
        bucket = GRAPH_BUCKET if self.graphed else BUCKET
        return -(-positions // bucket) * bucket

    def prefill(self, embeds: Tensor, valid: Tensor | None, repeat: Tensor) -> Tensor:
        """Read each of `[prompts, T, width]` once (`valid` marks tokens), then repeat its cache as `repeat` says."""
        length = self.length = embeds.shape[1]
        slots = torch.arange(length, device=embeds.device)
        if valid is None:
            mask, positions = None, slots[None]
            self.space.start.zero_()
        else:
            starts = (~valid).sum(-1)
            causal = torch.ones((length, length), dtype=torch.bool, device=embeds.device).tril()
            itself = torch.eye(length, dtype=torch.bool, device=embeds.device)  # else a padding row would be empty
            mask = (causal & valid[:, None, None, :]) | itself
            positions = (slots[None] - starts[:, None]).clamp(min=0)
            self.space.start.copy_(starts[repeat])
        self.slots, self.read = None, []
        states = self._forward(embeds, mask, positions)[:, :, -1:]
        self._make_visible(length + self.window)
        for cache, read in zip(self.space.cache, self.read, strict=True):
            for own, new in zip(cache, read, strict=True):
                own[:, :, :length] = new[repeat]
                own[:, :, length:] = 0
        del self.read
        return states[:, repeat]

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: store what is new, return all to attend to, `[rows, heads, length, dim]`."""
        if self.slots is None:
            self.read.append((key, value))
            return key, value
        keys, values = self.space.cache[layer]
        for stored, new in ((keys, key), (values, value)):
            if isinstance(self.slots, slice):
                stored[: self.rows, :, self.slots] = new
            else:
                stored.flatten(0, 2).index_copy_(0, self.slots, new.transpose(1, 2).flatten(0, 2))
        return keys[: self.rows, :, : self.visible], values[: self.rows, :, : self.visible]

    def run(self, step: Callable[..., Any], done: Sequence[int], *inputs: Tensor) -> Any:
        """Run one step, which calls this backbone once, on inputs that begin with an axis of images.

        `done`: of how many of its tokens an image's step knows. On CUDA a graph, captured once for each bucket.
        """
        first = [self.length - 1 + n for n in done]
        self._make_visible(max(first) + self.window)
        self.space.first[: self.rows].copy_(torch.tensor(first).repeat_interleave(2))
        # where all rows write to the same positions, one slice: on the CPU a fifth of the time
        self.block = (
            None if self.graphed or use_compile or len(set(first)) > 1 else slice(first[0], first[0] + self.window)
        )
        return self._replay(step, inputs) if self.graphed else step(*inputs)

    def __call__(self, embeds: Tensor) -> Tensor:
        """A window of each row, `[rows, n, width]`, to `[1 + layers, rows, n, width]`, last layer first, all normed."""
        device = embeds.device
        slots = self.space.first[: self.rows, None] + torch.arange(embeds.shape[1], device=device)
        self.slots = self._lines(slots) if self.block is None else self.block
        start, keys = self.space.start[: self.rows, None], torch.arange(self.visible, device=device)
        seen = (keys >= start[:, :, None]) & (keys <= slots[:, :, None])
        mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None]
        # for few queries the CPU's fused kernel is slower than the two products that it fuses
        with attending_by("eager" if device.type == "cpu" else "sdpa", self.llama):
            if use_compile:
                return self._compiled_forward(embeds, mask, slots - start)
            return self._forward(embeds, mask, slots - start)

    def keep(self, images: Sequence[int]) -> list[int]:
        """Go on with these images (pairs of rows) out of those in work; the places that they now have among them.

        Where steps are captured there are graphs for powers of two only, and some that are not wanted may stay.
        """
        size = len(images)
        if size == self.rows // 2:
            return list(images)
        if self.graphed and size:
            size = min(self.rows // 2, 1 << (size - 1).bit_length())
        kept = list(range(size))
        for place, image in zip(sorted(set(kept) - set(images)), [i for i in images if i >= size], strict=False):
            kept[place] = image
            to, of = slice(2 * place, 2 * place + 2), slice(2 * image, 2 * image + 2)
            self.space.start[to] = self.space.start[of]
            for layer in self.space.cache:
                layer[:, to] = layer[:, of]
        self.rows = 2 * size
        if self.graphed and not size:
            kept_workspaces[self.llama] = (self.shape, self.space)
        return kept

    def _lines(self, slots: Tensor) -> Tensor:
        """Positions `[rows, n]` as lines of a layer's keys or values, taken as `[rows * heads * capacity, dim]`."""
        heads, capacity = self.space.cache[0].shape[2:4]
        first = torch.arange(self.rows * heads, device=slots.device).view(self.rows, 1, heads) * capacity
        return (first + slots[:, :, None]).flatten()

    def _make_visible(self, positions: int) -> None:
        self.visible = self.in_buckets(positions)
        for layer, old in enumerate(self.space.cache):
            if self.visible > old.shape[3]:  # layer by layer: no second cache in memory
                new = old.new_empty((2, self.rows, old.shape[2], self.visible, old.shape[4]))
                new[..., : old.shape[3], :] = old[:, : self.rows]
                new[..., old.shape[3] :, :] = 0  # masked, but 0 x NaN is NaN
                self.space.cache[layer] = new

    def _replay(self, step: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        global use_graphs
        space, key = self.space, (self.decoding, self.rows, self.visible)
        space.inputs = space.inputs or [torch.empty_like(given) for given in inputs]
        fixed = [buffer[: len(given)].copy_(given) for buffer, given in zip(space.inputs, inputs, strict=True)]
        if key not in space.replays:
            step(*fixed)  # the run before that capture asks for
            try:
                space.replays[key] = capture(functools.partial(step, *fixed), space)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                use_graphs = self.graphed = False
                warnings.warn(f"no CUDA graphs: {str(error).splitlines()[0]}", stacklevel=2)
                return step(*inputs)
        return space.replays[key]()

    def _compiled_forward(self, *arguments) -> Tensor:
        global use_compile
        try:
            return compiled(StaticBackbone._forward)(self, *arguments)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            use_compile = False
            warnings.warn(f"not compiled: {str(error).splitlines()[0]}", stacklevel=2)
            return self._forward(*arguments)

    def _forward(self, h: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        rotary = self.llama.rotary_emb(h, positions)
        states = []
        for depth, layer in enumerate(self.llama.layers, start=1):
            h = layer(h, attention_mask=mask, position_embeddings=rotary, use_cache=True, **{self.cache_name: self})
            if depth in self.decoding.layers:
                states.append(h)
        if self.decoding.norm:
            return self.llama.norm(torch.stack([h, *states]))
        return torch.stack([self.llama.norm(h), *states])
