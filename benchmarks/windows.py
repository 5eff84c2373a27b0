"""Time and passes of decoding several tokens per pass, by window and images, over one token per pass, in one process.

python -m benchmarks.windows [--rounds 5]
"""

import statistics
import time

import torch

from generation_inference import Decoding, format_image_prompt, sample_image_tokens
from janus.dola.cli import CommandParser, add_model_arguments, positive, run_command
from janus.dola.loading import load_pretrained_model

IMAGES, WINDOWS = (1, 4, 8, 16), (1, 4, 8, 16)


def main() -> None:
    parser = CommandParser(description="Time and passes of decoding by window and images, over window 1.")
    add_model_arguments(parser)
    parser.add_argument("--rounds", type=positive, default=5, help="alternating runs of each (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device)
    prompt = format_image_prompt(processor, "a red circle above a blue star on a white background")
    print("| images | decoding | " + " | ".join(f"window {w}: time, tokens per pass" for w in WINDOWS) + " |")
    print("|---|---|" + "---|" * len(WINDOWS))
    for images in IMAGES:
        for name, decoding in (("baseline", Decoding(cfg_weight=1.5)), ("layer 6", Decoding((6,), cfg_weight=1.5))):
            seconds: dict[int, list[float]] = {window: [] for window in WINDOWS}
            passes, tokens = {}, {}
            for _ in range(1 + args.rounds):
                for window in WINDOWS:
                    told: list[int] = []
                    started = time.perf_counter()
                    tokens[window] = sample_image_tokens(
                        model, processor, [prompt], decoding, parallel_size=images, seeds=[0], window=window,
                        on_step=told.append,
                    )  # fmt: skip
                    seconds[window].append(time.perf_counter() - started)
                    passes[window] = len(told)
            if not all(torch.equal(tokens[window], tokens[1]) for window in WINDOWS):
                print(f"{images} images, {name}: other tokens than one by one")
            base = statistics.median(seconds[1][1:])  # the first round warms up
            length = tokens[1].shape[-1]
            cells = [f"{statistics.median(seconds[w][1:]) / base:.2f}, {length / passes[w]:.1f}" for w in WINDOWS]
            print(f"| {images} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_command(main)
