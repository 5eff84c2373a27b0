"""Time per decoding step with DoLa over without, alternating in one process: the median ratio of pairs of runs.

python -m benchmarks.dola_overhead [--model DIR] [--parallel_size 8] [--pairs 15]
"""

import statistics
import time

import torch

from dola_runtime import pick_contrast_layers
from generation_inference import Decoding, format_image_prompt, num_image_tokens, sample_image_tokens
from janus.dola.cli import CommandParser, add_model_arguments, positive, run_command
from janus.dola.loading import load_pretrained_model


def seconds_per_step(model, processor, decoding: Decoding, parallel_size: int) -> float:
    prompt = format_image_prompt(processor, "a large red circle on a white background")
    steps = num_image_tokens(model, processor)
    started = time.perf_counter()
    sample_image_tokens(model, processor, [prompt], decoding, parallel_size=parallel_size, seeds=[0])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = CommandParser(description="Time per decoding step with DoLa over without.")
    add_model_arguments(parser)
    parser.add_argument("--parallel_size", type=positive, default=8, help="images (default: %(default)s)")
    parser.add_argument("--pairs", type=positive, default=15, help="pairs of runs, off and on (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device)
    depth = len(model.language_model.model.layers)
    variants = {
        "off": Decoding(),
        "static": Decoding(pick_contrast_layers(len(model.language_model.model.layers))),
        "early exit, 4 layers": Decoding(tuple(range(depth - 4, depth))),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for pair in range(-1, args.pairs):  # the first round warms up
        for name, decoding in variants.items():
            seconds = seconds_per_step(model, processor, decoding, args.parallel_size)
            if pair >= 0:
                times[name].append(seconds)
    print(f"off: {1e3 * statistics.median(times['off']):.2f} ms per step")
    for name in list(variants)[1:]:
        ratios = [on / off for on, off in zip(times[name], times["off"], strict=True)]
        print(f"{name} / off: {statistics.median(ratios):.3f} (median of {args.pairs} pairs)")


if __name__ == "__main__":
    run_command(main)
