"""The LLaMA backbone over a preallocated cache: no growing tensors, and on CUDA one captured graph per step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel

BUCKET = 128
"""On CUDA a step is captured once per this many cache positions, so that attention reads little but what is filled."""


def uses_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(step: Callable[[], Any]) -> Callable[[], Any]:
    """The CUDA graph of a step, as a function that replays it and returns what it returned, at its first place.

    The step may run more than once before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the warm-up that capture asks for
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


class StaticBackbone:
    """Reads the wanted layers of transformers' LlamaModel; itself the cache that its attention layers update.

    layers: contrast layers to read, through LN_out unless `norm=False`; rows: sequences decoded together; length:
    positions of the longest prompt plus the tokens to come.
    """

    def __init__(self, llama: LlamaModel, layers: Sequence[int], norm: bool, rows: int, length: int):
        config, weight = llama.config, llama.embed_tokens.weight
        self.llama, self.layers, self.norm = llama, layers, norm
        self.graphed = uses_graphs(weight.device)
        capacity = -(-length // BUCKET) * BUCKET if self.graphed else length
        attention: Any = llama.layers[0].self_attn
        heads: Any = config.num_key_value_heads
        shape = (len(llama.layers), 2, rows, heads, capacity, attention.head_dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # masked, but 0 x NaN is NaN
        self.mask = torch.full((rows, 1, 1, capacity), -torch.inf, dtype=weight.dtype, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.masked = self.graphed
        self.capturing = False
        self.replays: dict[int, Callable[[], Any]] = {}

    @staticmethod
    def serves(llama) -> bool:
        return isinstance(llama, LlamaModel) and llama.config._attn_implementation == "sdpa"

    def update(self, key: Tensor, value: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: write one position, return what is filled, `[rows, heads, length, dim]`."""
        cache = self.target[layer]
        for stored, new in zip(cache, (key, value), strict=True):
            stored.index_copy_(2, self.slots, new)
        return cache[0, :, :, : self.visible], cache[1, :, :, : self.visible]

    def prefill(self, embeds: Tensor, valid: Tensor | None, repeat: Tensor) -> Tensor:
        """Read each of `[prompts, T, width]` once (`valid` marks tokens), then repeat its cache as `repeat` says."""
        prompts, length = embeds.shape[:2]
        self.target = self.cache.new_empty(
            (*self.cache.shape[:2], prompts, self.cache.shape[3], length, self.cache.shape[5])
        )
        self.slots, self.visible = torch.arange(length, device=embeds.device), length
        if valid is None:
            self.start = torch.zeros(1, dtype=torch.long, device=embeds.device)
            mask, positions = None, self.slots[None]
            self.mask[..., :length] = 0
        else:
            starts = (~valid).sum(-1)
            causal = torch.ones((length, length), dtype=torch.bool, device=embeds.device).tril()
            itself = torch.eye(length, dtype=torch.bool, device=embeds.device)  # else a padding row would be empty
            mask = (causal & valid[:, None, None, :]) | itself
            positions = (self.slots[None] - starts[:, None]).clamp(min=0)
            self.start = starts[repeat]
            self.mask[..., :length].masked_fill_(valid[repeat, None, None], 0)
            self.masked = True
        states = self._forward(embeds, mask, positions)[:, repeat]
        for own, read in zip(self.cache, self.target, strict=True):  # by layer: no second cache in memory
            own[..., :length, :] = read[:, repeat]
        self.target, self.slots, self.filled = self.cache, self.position, length
        return states

    def __call__(self, embeds: Tensor) -> Tensor:
        """One token for every row, `[rows, 1, width]`, to `[1 + layers, rows, width]`, last layer first, all normed."""
        if not self.capturing:
            self._advance()
        self.mask.index_fill_(3, self.position, 0)
        mask = self.mask[..., : self.visible] if self.masked else None
        # for a single query the CPU's fused kernel is slower than the two products that it fuses
        with attending_by("eager" if embeds.device.type == "cpu" else "sdpa", self.llama):
            return self._forward(embeds, mask, (self.position - self.start)[:, None])

    def _advance(self) -> None:
        self.position.fill_(self.filled)
        self.filled += 1
        self.visible = self.filled if not self.graphed else -(-self.filled // BUCKET) * BUCKET

    def _forward(self, h: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        rotary = self.llama.rotary_emb(h, positions)
        states = []
        for depth, layer in enumerate(self.llama.layers, start=1):
            h = layer(h, attention_mask=mask, position_embeddings=rotary, past_key_values=self, use_cache=True)
            if depth in self.layers:
                states.append(h[:, -1])
        if self.norm:
            return self.llama.norm(torch.stack([h[:, -1], *states]))
        return torch.stack([self.llama.norm(h[:, -1]), *states])

    def run(self, step: Callable[[], Any]) -> Any:
        """Run one step, which calls this backbone once; on CUDA as a graph, captured once for each bucket."""
        if not self.graphed:
            return step()
        self._advance()
        if self.visible not in self.replays:
            self.capturing = True
            self.replays[self.visible] = capture(step)
            self.capturing = False
        return self.replays[self.visible]()
