"""Time of a run's bookkeeping (names, log, lock, files' renames) by the number of prompts, with the painting left out.

python -m benchmarks.run_log [--prompts 1000,3000,10000,30000] [--batch_size 64]

Codes are zeros and every image is the same bytes; the rest is the command's own. The second figure is that of the same
command again, which finds everything done.
"""

import io
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image

import run_batch_prompts
from generation_inference import Decoding
from janus.dola import painting
from janus.dola.cli import JANUS_TINY, CommandParser, parse_layers, positive, run_command
from janus.dola.files import RunLog, write_whole
from janus.dola.loading import load_pretrained_model
from janus.dola.prompt_files import Prompt


def seconds(outdir: Path, num_prompts: int, batch_size: int, model, processor) -> float:
    image, content = Image.new("RGB", (8, 8)), io.BytesIO()
    image.save(content, "JPEG")
    variants = {"baseline": asdict(Decoding())}
    settings = {"model": "none", "dtype": "float32", "device": "cpu", "parallel_size": 1, "seed": 0, "format": "jpg"}
    settings |= {"trace": False, "scorer": None, "keep_all": True, "window": None, "variants": variants}
    prompts = [Prompt(f"a photo of {i} red circles above a small blue square") for i in range(num_prompts)]

    def sample_nothing(model, processor, prompts, decoding, *, on_step, **_) -> torch.Tensor:
        on_step(len(prompts) * 576)
        return torch.zeros(len(prompts), 1, 576).long()

    started = time.perf_counter()
    with (
        patch.multiple(
            run_batch_prompts,
            sample_image_tokens=sample_nothing,
            tokens_to_images=lambda model, tokens: [image] * len(tokens),
        ),
        patch.object(
            painting,
            "save_image",
            lambda image, path, settings: write_whole(path, lambda part: part.write_bytes(content.getvalue())),
        ),
        RunLog(outdir / "manifest.jsonl", settings, [p.text for p in prompts], is_own=painting.is_run_file) as log,
    ):
        run = painting.PaintingRun(log, prompts)
        run.choose_batch_size(batch_size)
        run_batch_prompts.paint(run, model, processor, {"baseline": Decoding()})
    return time.perf_counter() - started


def main() -> None:
    parser = CommandParser(description="Time of a run's bookkeeping by the number of prompts.")
    parser.add_argument("--prompts", type=parse_layers, default=[1000, 3000, 10_000, 30_000], help="(default: 1k..30k)")
    parser.add_argument("--batch_size", type=positive, default=64, help="(default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    for num_prompts in args.prompts:
        with tempfile.TemporaryDirectory() as directory:
            first, again = (seconds(Path(directory), num_prompts, args.batch_size, model, processor) for _ in range(2))
            size = (Path(directory) / "manifest.jsonl").stat().st_size
        print(
            f"{num_prompts:6} prompts: {first:6.2f} s ({1e3 * first / num_prompts:.2f} ms each), "
            f"again {again:5.2f} s; manifest.jsonl {size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    run_command(main)
