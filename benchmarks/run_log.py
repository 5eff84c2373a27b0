"""Time of a run's bookkeeping (names, log, locks, files' renames) by the number of prompts, with the painting left out.

python -m benchmarks.run_log [--prompts 1000,3000,10000,30000] [--shards 1,2,4,8,16] [--batch_size 64] [--figure FILE]

Codes are zeros and every image is the same bytes; the rest is the command's own. With shards, so many simulated workers
share each list, one after the other. The last figure is that of the same command again, which finds everything done.
Seconds are the clock's, and the CPU's own, which other work on the machine hardly changes.
"""

import io
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from PIL import Image

import run_batch_prompts
from janus.dola import painting
from janus.dola.cli import JANUS_TINY, CommandParser, parse_layers, positive, run_command
from janus.dola.files import write_whole
from janus.dola.loading import load_pretrained_model


def stub_painting(content: bytes, image: Image.Image) -> ExitStack:
    """Painting left out: codes are zeros, every image the same bytes."""

    def sample_nothing(model, processor, prompts, decoding, *, on_step, **_) -> torch.Tensor:
        on_step(len(prompts) * 576)
        return torch.zeros(len(prompts), 1, 576).long()

    def save_nothing(image: Image.Image, path: Path, settings: object) -> None:
        write_whole(path, lambda part: part.write_bytes(content))

    stack = ExitStack()
    stack.enter_context(
        patch.multiple(
            run_batch_prompts,
            sample_image_tokens=sample_nothing,
            tokens_to_images=lambda model, tokens: [image] * len(tokens),
            load_pretrained_model=lambda *_: loaded(),
        )
    )
    stack.enter_context(patch.object(painting, "save_image", save_nothing))
    return stack


@cache
def loaded() -> tuple:
    return load_pretrained_model(JANUS_TINY, "float32", "cpu")


class Seconds(NamedTuple):
    clock: float
    cpu: float


def paint(prompt_file: Path, outdir: Path, batch_size: int, *options: str) -> Seconds:
    """The seconds of one process."""
    given = ["--prompt_json", str(prompt_file), "--outdir", str(outdir), "--batch_size", str(batch_size)]
    argv = ["run_batch_prompts.py", *given, "--no_dola", "--parallel_size", "1", *options]
    clock, cpu = time.perf_counter(), time.process_time()
    with patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_batch_prompts.main()
    return Seconds(time.perf_counter() - clock, time.process_time() - cpu)


def plot(found: dict[int, dict[int, Seconds]], path: Path) -> None:
    """The CPU seconds of all workers together and of each, by how many share each list."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    together, each = figure.subplots(1, 2)
    shards: list[int] = []
    for count, by_shards in found.items():
        shards = list(by_shards)
        seconds = [by_shards[n].cpu for n in shards]
        together.plot(shards, seconds, marker="o", label=f"{count:,} prompts")
        each.plot(shards, [s / n for s, n in zip(seconds, shards, strict=True)], marker="o")
    together.set(title="all workers together", ylabel="CPU seconds", ylim=(0, None))
    each.set(title="a worker", ylabel="CPU seconds", xscale="log", yscale="log")
    for axes in (together, each):
        axes.set(xlabel="workers", xticks=shards, xticklabels=shards)
        axes.grid(alpha=0.3)
    together.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = CommandParser(description="Time of a run's bookkeeping by the number of prompts, and of shards.")
    parser.add_argument("--prompts", type=parse_layers, default=[1000, 3000, 10_000, 30_000], help="(default: 1k..30k)")
    parser.add_argument("--shards", type=parse_layers, default=[], help="so many, one after the other (default: none)")
    parser.add_argument("--batch_size", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="PNG of the seconds by the number of shards (default: none)")
    args = parser.parse_args()
    found: dict[int, dict[int, Seconds]] = {}
    image, content = Image.new("RGB", (8, 8)), io.BytesIO()
    image.save(content, "JPEG")
    loaded()
    for count in args.prompts:
        units = -(-count // args.batch_size)
        for shards in args.shards or [None]:
            with tempfile.TemporaryDirectory() as directory, stub_painting(content.getvalue(), image):
                file, outdir = Path(directory) / "prompts.txt", Path(directory) / "out"
                file.write_text(
                    "".join(f"a photo of {i} red circles above a small blue square\n" for i in range(count))
                )
                options = [()] if shards is None else [("--shard", f"{i}/{shards}") for i in range(shards)]
                each = [paint(file, outdir, args.batch_size, *of) for of in options]
                again = paint(file, outdir, args.batch_size, *options[0])
                size = (outdir / "manifest.jsonl").stat().st_size
            by = "one process" if shards is None else f"{shards} shards"
            clock, cpu = (sum(seconds) for seconds in zip(*each, strict=True))
            found.setdefault(count, {})[shards or 1] = Seconds(clock, cpu)
            print(
                f"{count:6} prompts, {by}: {clock:6.2f} s together, {cpu:6.2f} s of CPU ({1e3 * cpu / units:.1f} ms a "
                f"unit), the slowest {max(each).clock:6.2f} s, again {again.clock:5.2f} s; manifest.jsonl "
                f"{size / 1e6:.1f} MB",
                flush=True,
            )
    if args.figure:
        plot(found, args.figure)


if __name__ == "__main__":
    run_command(main)
