"""Time of a run's bookkeeping (names, log, locks, files' renames) by the number of prompts, with the painting left out.

python -m benchmarks.run_log [--prompts 1000,3000,10000,30000] [--shards 1,2,4,8,16] [--batch_size 64]

Codes are zeros and every image is the same bytes; the rest is the command's own. With shards, so many simulated workers
share each list, one after the other. The last figure is that of the same command again, which finds everything done.
"""

import io
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
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


def paint(prompt_file: Path, outdir: Path, batch_size: int, *options: str) -> float:
    """The seconds of one process."""
    given = ["--prompt_json", str(prompt_file), "--outdir", str(outdir), "--batch_size", str(batch_size)]
    argv = ["run_batch_prompts.py", *given, "--no_dola", "--parallel_size", "1", *options]
    started = time.perf_counter()
    with patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_batch_prompts.main()
    return time.perf_counter() - started


def main() -> None:
    parser = CommandParser(description="Time of a run's bookkeeping by the number of prompts, and of shards.")
    parser.add_argument("--prompts", type=parse_layers, default=[1000, 3000, 10_000, 30_000], help="(default: 1k..30k)")
    parser.add_argument("--shards", type=parse_layers, default=[], help="so many, one after the other (default: none)")
    parser.add_argument("--batch_size", type=positive, default=64, help="(default: %(default)s)")
    args = parser.parse_args()
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
            print(
                f"{count:6} prompts, {by}: {sum(each):6.2f} s together ({1e3 * sum(each) / units:.1f} ms a unit), the "
                f"slowest {max(each):6.2f} s, again {again:5.2f} s; manifest.jsonl {size / 1e6:.1f} MB",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
