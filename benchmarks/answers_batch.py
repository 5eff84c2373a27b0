"""Questions answered together and one by one: are the answers equal, and how much faster are they together?

    python -m benchmarks.answers_batch [--count 500] [--batch_size 16] [--per_image 1,6,16]

Drawings of janus-tiny's grammar, float32 on the CPU; baseline, DoLa and early exit. Both ways alternate, batch by
batch, in one process. janus-tiny's answers are short, so that reading the picture is nearly all of the work: many at
once are no faster on a CPU, but several questions on a picture read it once. First are questions of yes or no, as POPE
asks them, then every kind, of which a caption takes 15 steps; the last rows let every answer be 64 tokens.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from inference import answer_batch
from janus.dola.cli import JANUS_TINY, parse_layers, positive
from janus.dola.loading import load_pretrained_model
from tools import scenes
from tools.eval_janus_tiny import SPLITS, sample_scenes

DECODINGS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "DoLa, layer 6": {"layer": 6},
    "early exit 2-7": {"candidate_layers": range(2, 8)},
}

LONG = 64


def sample_questions(count: int, per_image: int, yes_or_no: bool) -> list[tuple[Image.Image, str]]:
    """So many different questions on each drawing: whether an object is there, and with all kinds the drawing's own."""
    rng, things = np.random.default_rng(6), [f"{c} {s}" for c in scenes.COLOURS for s in scenes.SHAPES]
    drawings = -(-count // per_image)
    drawn = [scene for split in SPLITS.values() for scene in sample_scenes(split, -(-drawings // len(SPLITS)), seed=6)]
    asked = []
    for k in rng.permutation(len(drawn)):
        image = Image.fromarray(scenes.draw(drawn[k], rng))
        about = [] if yes_or_no else [question for _, question, _ in scenes.questions(drawn[k])]
        about += [f"Is there a {thing} in the image?" for thing in rng.choice(things, 16 - len(about), replace=False)]
        asked += [(image, question) for question in rng.permutation(about)[:per_image].tolist()]
    return asked[:count]


def compare(
    model, processor, asked: Sequence[tuple[Image.Image, str]], size: int, dola: dict[str, Any] | None, tokens: int
) -> tuple[int, float, float]:
    """How many answers are equal, and the seconds of answering one by one and together.

    `tokens` is the length of every answer; 0 lets it end by itself.
    """
    options: dict[str, Any] = {"dola": dola, "min_new_tokens": tokens, "max_new_tokens": tokens or 20}
    equal, seconds = 0, {1: 0.0, size: 0.0}
    for start in tqdm(range(0, len(asked), size)):
        some, given = asked[start : start + size], {}
        for n in seconds:
            started = time.perf_counter()
            given[n] = [
                answer.tokens.tolist()
                for first in range(0, len(some), n)
                for answer in answer_batch(model, processor, some[first : first + n], **options)
            ]
            seconds[n] += time.perf_counter() - started
        equal += sum(one == other for one, other in zip(*given.values(), strict=True))
    alone, together = seconds.values()
    return equal, alone, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=500, help="questions (default: %(default)s)")
    parser.add_argument("--per_image", type=parse_layers, default=[1, 6, 16], help="up to 16 (default: 1,6,16)")
    parser.add_argument("--long", type=positive, default=48, help="of them for the long answers (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="answered together (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    print(f"{torch.get_num_threads()} threads, batches of {args.batch_size}")
    sets = [(0, args.count, n, yes_or_no) for yes_or_no in (True, False) for n in args.per_image]
    for tokens, count, per_image, yes_or_no in (*sets, (LONG, args.long, 1, False)):
        some = sample_questions(count, per_image, yes_or_no)
        for name, dola in DECODINGS.items():
            equal, alone, together = compare(model, processor, some, args.batch_size, dola, tokens)
            length = f"{tokens} tokens each" if tokens else "yes or no" if yes_or_no else "of every kind"
            each = [f"{1000 * seconds / len(some):.0f} ms" for seconds in (alone, together)]
            print(
                f"{name}, {len(some)} answers {length}, {per_image} a drawing: {equal} equal; together "
                f"{alone / together:.1f} times as fast (a question alone {each[0]}, together {each[1]})",
                flush=True,
            )


if __name__ == "__main__":
    main()
