"""Time per decoding step with DoLa over without, alternating in one process: median, least and most over the rounds.

python -m benchmarks.dola_overhead [--model DIR] [--parallel_size 8] [--rounds 15]
"""

import statistics

from benchmarks.decode_speed import in_words, measure, ratio
from dola_runtime import pick_contrast_layers
from generation_inference import Decoding, format_image_prompt, num_image_tokens, sample_image_tokens
from janus.dola.cli import CommandParser, add_model_arguments, positive, run_command
from janus.dola.loading import load_pretrained_model


def main() -> None:
    parser = CommandParser(description="Time per decoding step with DoLa over without.")
    add_model_arguments(parser)
    parser.add_argument("--parallel_size", type=positive, default=8, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=15, help="of off, static and exit (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    prompt = format_image_prompt(processor, "a large red circle on a white background")
    depth = len(model.language_model.model.layers)

    def sample(decoding: Decoding) -> None:
        sample_image_tokens(model, processor, [prompt], decoding, parallel_size=args.parallel_size, seeds=[0], window=1)

    decodings = {
        "off": Decoding(),
        "static": Decoding(pick_contrast_layers(depth)),
        "early exit, 4 layers": Decoding(tuple(range(depth - 4, depth))),
    }
    ways = {name: lambda d=decoding: sample(d) for name, decoding in decodings.items()}
    measured = measure(ways, args.rounds, model.gen_embed.weight.device)
    off = measured.pop("off")
    print(f"off: {1e3 * statistics.median(off['seconds']) / num_image_tokens(model, processor):.2f} ms per step")
    for name, m in measured.items():
        print(f"{name} / off: {in_words(ratio(off, m))}")


if __name__ == "__main__":
    run_command(main)
