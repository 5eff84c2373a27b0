"""Correctness and speed of decoding on a CUDA device, beside the reference loop and transformers' own Janus.

python -m benchmarks.gpu [--models 1b 7b] [--seconds 1] [--out docs/gpu]

First every way of decoding on janus-tiny, its tokens against those of the eager loop; then, at the published sizes
with random weights (nothing is downloaded), the time of a pass. Cells are kept in OUT.json as they are measured, and
the same command goes on where it was stopped; OUT.md and OUT.png are written from them.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache

import generation_inference
from benchmarks.decode_speed import SIZES, as_transformers, floor_seconds, hardware_rates, random_janus
from dola_runtime import pick_contrast_layers
from generation_inference import (
    Decoding,
    EagerBackbone,
    format_image_prompt,
    generate,
    num_image_tokens,
    sample_image_tokens,
    tokens_to_images,
)
from janus.dola import static_backbone
from janus.dola.cli import JANUS_TINY, CommandParser, positive, run_command
from janus.dola.files import read_json_file, write_whole
from janus.dola.loading import load_pretrained_model, resolve_device, resolve_dtype
from janus.dola.memory import is_out_of_memory
from janus.dola.prompt_files import read_prompts
from janus.models import VLChatProcessor
from run_batch_prompts import EXAMPLE_PROMPTS, images_per_batch

WARM = 4
"""Passes before the clock of a run starts."""

PROMPT = "a large red circle above a small blue star on a white background"

Cell = dict[str, Any]


class Enough(Exception):
    """Raised by a clock where the time for its cell is over."""


class Clock:
    """Seconds, passes and tokens of a run that calls `tick` after every pass, until there are `seconds` of them."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.limit, self.passes, self.tokens, self.started = device, seconds, -WARM, 0, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def tick(self, tokens: int = 0) -> None:
        self.passes += 1
        if self.passes <= 0:
            self.started = self.now()
            return
        self.tokens += tokens
        if time.perf_counter() - self.started > self.limit:
            raise Enough

    def time(self, run: Callable[["Clock"], object]) -> Cell:
        with suppress(Enough):
            run(self)
        passes = max(1, self.passes)
        return {"ms": 1e3 * (self.now() - self.started) / passes, "passes": passes, "tokens": self.tokens}


@contextmanager
def hooked(module: torch.nn.Module, tick: Callable[[], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: tick())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def switched(graphs: bool = True, compiled: bool = False) -> Iterator[None]:
    """Within, steps are captured and compiled or not."""
    before = static_backbone.use_graphs, static_backbone.use_compile
    static_backbone.use_graphs, static_backbone.use_compile = graphs, compiled
    try:
        yield
    finally:
        static_backbone.use_graphs, static_backbone.use_compile = before


def decodings(model, cfg_weight: float) -> dict[str, Decoding]:
    depth = len(model.language_model.model.layers)
    static = pick_contrast_layers(depth)
    early = tuple(range(max(1, depth - 4), depth))
    return {
        "off": Decoding(cfg_weight=cfg_weight),
        "static": Decoding(static, cfg_weight=cfg_weight),
        "early exit": Decoding(early, cfg_weight=cfg_weight),
        "contrast first": Decoding(static, cfg_weight=cfg_weight, cfg_order="contrast_first"),
        "APC only": Decoding(gamma=0.0, cfg_weight=cfg_weight),
    }


# --- correctness -----------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no graphs": {"graphs": False},
    "graphs, window 4": {"window": 4},
    "graphs, window 16": {"window": 16},
    "no graphs, window 16": {"graphs": False, "window": 16},
    "compiled, graphs": {"compiled": True},
}


def equal_images(model, processor, decoding: Decoding, prompts: int) -> Cell:
    """Of `prompts` x 4 images by the eager loop, how many have the same tokens in each way."""
    texts = [format_image_prompt(processor, prompt.text) for prompt in read_prompts(EXAMPLE_PROMPTS, prompts)]
    how: dict[str, Any] = {"parallel_size": 4, "seeds": list(range(len(texts)))}
    pick = generation_inference.pick_backbone
    generation_inference.pick_backbone = lambda llama: EagerBackbone
    try:
        expected = sample_image_tokens(model, processor, texts, decoding, **how)
    finally:
        generation_inference.pick_backbone = pick
    equal: Cell = {"images": len(expected.flatten(0, 1))}
    for name, way in WAYS.items():
        way = dict(way)
        window = way.pop("window", 1)
        with switched(**way):
            tokens = sample_image_tokens(model, processor, texts, decoding, window=window, **how)
        equal[name] = int((tokens == expected).all(-1).sum())
    return equal


# --- speed -----------------------------------------------------------------------------------------------------------


class Bench:
    """One model on one device, and its cells: name -> what to measure."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, seconds: float, rates: dict[str, float]):
        self.device, self.seconds, self.rates = device, seconds, rates
        if name in SIZES:
            self.processor: Any = VLChatProcessor.from_pretrained(JANUS_TINY)
            self.processor.image_processor.image_size = 384
            self.model: Any = random_janus(name, dtype, device)
        else:
            _, self.processor, self.model = load_pretrained_model(name, dtype, device)
        self.theirs = as_transformers(self.model, self.processor)
        self.prompt = format_image_prompt(self.processor, PROMPT)
        self.length = len(self.processor.tokenizer.encode(self.prompt))
        self.decodings = decodings(self.model, 5.0)

    def largest_batch(self) -> int:
        return images_per_batch(self.model, 2, self.length, num_image_tokens(self.model, self.processor), 1)

    def ours(self, images: int, decoding: str = "off", window: int = 1, **switches: bool) -> Cell:
        """The second of two runs: the first captures and compiles."""

        def run(clock: Clock) -> None:
            sample_image_tokens(
                self.model,
                self.processor,
                [self.prompt],
                self.decodings[decoding],
                parallel_size=images,
                seeds=[0],
                window=window,
                on_step=clock.tick,
            )

        with switched(**switches):
            started = time.perf_counter()
            Clock(self.device, self.seconds).time(run)
            first = time.perf_counter() - started
            return self.finished(Clock(self.device, self.seconds).time(run), images, window, first=first)

    def reference(self, images: int) -> Cell:
        def run(clock: Clock) -> None:
            with tempfile.TemporaryDirectory() as scratch, chdir(scratch), hooked(self.model.gen_head, clock.tick):
                generate(self.model, self.processor, self.prompt, parallel_size=images)

        return self.finished(Clock(self.device, self.seconds).time(run), images)

    def transformers(self, images: int) -> Cell:
        batch = self.processor.batchify([(self.prompt, [])]).to(self.device)
        llama: Any = self.theirs.config.text_config
        length = batch.input_ids.shape[1] + self.theirs.model.vision_model.config.num_image_tokens

        def run(clock: Clock) -> None:
            with hooked(self.theirs.model.generation_head, clock.tick):
                self.theirs.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    generation_mode="image",
                    do_sample=True,
                    top_k=0,
                    guidance_scale=5.0,
                    num_return_sequences=images,
                    past_key_values=StaticCache(llama, length),
                )

        return self.finished(Clock(self.device, self.seconds).time(run), images)

    def pixels(self, images: int) -> Cell:
        shape = images, num_image_tokens(self.model, self.processor)
        codes = torch.randint(len(self.model.gen_embed.weight), shape, device=self.device)
        tokens_to_images(self.model, codes)
        started = time.perf_counter()
        tokens_to_images(self.model, codes)
        return {"ms": 1e3 * (time.perf_counter() - started) / images}

    def finished(self, cell: Cell, images: int, window: int = 1, **more: Any) -> Cell:
        """A cell with its ratio to the floor at the context it had, images/s, and peak memory."""
        per_image = cell["tokens"] / images if cell["tokens"] else cell["passes"]
        least = floor_seconds(self.model, 2 * images, window, self.length + per_image / 2, self.rates)
        per_pass = per_image / cell["passes"]
        rate = images * per_pass / num_image_tokens(self.model, self.processor) * 1e3 / cell["ms"]
        if self.device.type == "cuda":
            more["GiB"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return cell | {"over floor": cell["ms"] / 1e3 / least, "per pass": per_pass, "images/s": rate} | more


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_cell(model, images: int, length: int) -> Cell:
    """Microseconds of attention by each kernel of sdpa, for one query and for 16, under a float mask and without."""
    llama, weight = model.language_model.config, model.language_model.get_input_embeddings().weight
    shape = (2 * images, llama.num_attention_heads, length, llama.hidden_size // llama.num_attention_heads)
    key, value = torch.randn((2, *shape), dtype=weight.dtype, device=weight.device)
    cell: Cell = {}
    for queries in (1, 16):
        query = key[:, :, :queries].clone()
        mask = torch.zeros((2 * images, 1, queries, length), dtype=weight.dtype, device=weight.device)
        for kernel, backend in KERNELS.items():
            for name, given in (("no mask", None), ("mask", mask)):

                def run(clock: Clock, query=query, given=given) -> None:
                    while True:
                        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=given)
                        clock.tick()

                with sdpa_kernel(backend), suppress(RuntimeError):  # of kernels that do not serve
                    cell[f"{queries} queries, {name}, {kernel}"] = 1e3 * Clock(weight.device, 0.05).time(run)["ms"]
    return cell


def speed_cells(bench: Bench, batches: list[int], windows: list[int]) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """What is measured of a model, by name, the small batches first."""
    yield "attention", lambda: attention_cell(bench.model, batches[0], bench.length + 256)
    for images in [*batches, bench.largest_batch()]:
        where = f"{images} images"
        for decoding in ("off", "static", "early exit"):
            yield f"{where}, {decoding}", lambda n=images, d=decoding: bench.ours(n, d)
        if images > 16:
            continue
        yield f"{where}, reference loop", lambda n=images: bench.reference(n)
        yield f"{where}, transformers", lambda n=images: bench.transformers(n)
        if images > 4:
            continue
        for window in windows:
            yield f"{where}, off, window {window}", lambda n=images, w=window: bench.ours(n, window=w)
        yield f"{where}, off, no graphs", lambda n=images: bench.ours(n, graphs=False)
        if images == batches[0]:
            yield f"{where}, off, compiled", lambda n=images: bench.ours(n, compiled=True)
    yield "pixels of an image", lambda: bench.pixels(batches[0])


# --- the report ------------------------------------------------------------------------------------------------------


def measure(cell: Callable[[], Cell], device: torch.device) -> Cell:
    """A cell, or why there is none."""
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return cell()
    except (RuntimeError, MemoryError, ValueError) as error:
        return {"none": "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]}


COLUMNS = {"ms": "ms per pass", "per pass": "tokens per pass", "images/s": "images/s", "over floor": "over the floor"}
COLUMNS |= {"first": "s of the first run", "GiB": "peak GiB"}


def report(results: dict[str, Any]) -> str:
    """The page of all that is measured."""
    lines = [f"# Decoding on {results['device']}", "", f"torch {results['torch']}. `python -m benchmarks.gpu`.", ""]
    for dtype, cells in results["correctness"].items():
        lines += [f"## Same tokens as the eager loop, {dtype}", ""]
        lines += ["| decoding | images | " + " | ".join(WAYS) + " |", "|---" * (2 + len(WAYS)) + "|"]
        for name, cell in cells.items():
            values = [cell.get(key, cell.get("none", "")) for key in ("images", *WAYS)]
            lines.append(f"| {name} | " + " | ".join(map(str, values)) + " |")
        lines.append("")
    for model, of_model in results["speed"].items():
        rates, cells = of_model["rates"], of_model["cells"]
        lines += [
            f"## {model}, {of_model['dtype']}",
            "",
            f"Measured: copies {rates['bytes_per_s'] / 1e9:.0f} GB/s, matmul {rates['flops'] / 1e12:.1f} TFLOP/s. The "
            "floor is what reading weights and cache, or multiplying by them, takes at these rates.",
            "",
            "| | " + " | ".join(COLUMNS.values()) + " |",
            "|---" * (1 + len(COLUMNS)) + "|",
        ]
        for name, cell in cells.items():
            if name == "attention":
                continue
            values = [f"{cell[key]:.2f}" if key in cell else "" for key in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(values) + f" |{' ' + cell['none'] if 'none' in cell else ''}")
        lines += ["", "| attention | µs |", "|---|---|"]
        for name, value in cells.get("attention", {}).items():
            lines.append(f"| {name} | {value if isinstance(value, str) else f'{value:.0f}'} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """ms per pass over images for each decoding, and over the window for each batch, over their floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, of_model in results["speed"].items():
        cells = {name: cell for name, cell in of_model["cells"].items() if "images/s" in cell}
        for way in ("off", "static", "early exit", "reference loop", "transformers"):
            points = [(int(n.split()[0]), c["ms"]) for n, c in cells.items() if n.partition(", ")[2] == way]
            if points:
                left.plot(*zip(*points, strict=True), marker="o", label=f"{model}, {way}")
        for images in sorted({int(name.split()[0]) for name in cells}):
            points = [
                (int(n.rpartition(" ")[2]), c["ms"])
                for n, c in cells.items()
                if n.startswith(f"{images} images, off, window")
            ]
            if points:
                right.plot(*zip(*points, strict=True), marker="o", label=f"{model}, {images} images")
    left.set(xscale="log", yscale="log", xlabel="images", ylabel="ms per pass")
    right.set(xscale="log", yscale="log", xlabel="window", ylabel="ms per pass")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"


def main() -> None:
    parser = CommandParser(description="Correctness and speed of decoding on a CUDA device.")
    add = parser.add_argument
    add("--models", nargs="+", default=["1b", "7b"], help="1b, 7b (random weights), or directories (default: 1b 7b)")
    add("--device", default="cuda", help="where (default: %(default)s)")
    add("--dtype", default="auto", help="of the speed part (default: bfloat16 on CUDA, else float32)")
    add("--seconds", type=float, default=1.0, help="for each run that is timed, of two per cell (default: %(default)s)")
    add("--batches", type=positive, nargs="+", default=[1, 4, 16, 64], help="images (default: 1 4 16 64)")
    add("--windows", type=positive, nargs="+", default=[2, 4, 8, 16, 32], help="windows (default: 2 4 8 16 32)")
    add("--prompts", type=positive, default=4, help="prompts of the correctness part (default: %(default)s)")
    add("--out", type=Path, default=Path("docs/gpu"), help="files without their ends (default: %(default)s)")
    args = parser.parse_args()
    device = resolve_device(args.device)
    page = args.out.with_suffix(".json")
    here = {"device": device_name(device), "torch": torch.__version__}
    results: dict[str, Any] = {**here, "correctness": {}, "speed": {}}
    if page.exists():
        results = read_json_file(page)
        if {key: results.get(key) for key in here} != here:
            raise ValueError(f"{page} was measured on {results.get('device')}: move it away, or give another --out")

    def keep(cells: dict[str, Cell], name: str, cell: Callable[[], Cell]) -> None:
        if name not in cells:
            cells[name] = measure(cell, device)
            print(f"{name}: {json.dumps(cells[name])}", flush=True)
            write_whole(page, lambda temporary: temporary.write_text(json.dumps(results, indent=1) + "\n"))

    for dtype in ("float32", "bfloat16"):
        _, processor, model = load_pretrained_model(JANUS_TINY, dtype, device)
        cells = results["correctness"].setdefault(dtype, {})
        for name, decoding in decodings(model, 1.5).items():
            keep(cells, name, lambda m=model, p=processor, d=decoding: equal_images(m, p, d, args.prompts))
    for name in args.models:
        dtype = resolve_dtype(args.dtype, device)
        of_model = results["speed"].setdefault(name, {"dtype": str(dtype).removeprefix("torch."), "cells": {}})
        of_model.setdefault("rates", hardware_rates(device))
        bench = Bench(name, device, dtype, args.seconds, of_model["rates"])
        for cell_name, cell in speed_cells(bench, args.batches, args.windows):
            keep(of_model["cells"], cell_name, cell)
        del bench
    args.out.with_suffix(".md").write_text(report(results), encoding="utf-8")
    draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    run_command(main)
