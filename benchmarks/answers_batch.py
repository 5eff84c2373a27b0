"""Questions answered together and one by one: are the answers equal, and how much faster are they together?

    python -m benchmarks.answers_batch [--count 500] [--batch_size 16]

Drawings of janus-tiny's grammar, every kind of question, float32 on the CPU; baseline, DoLa and early exit. Both ways
alternate, batch by batch, in one process. janus-tiny's own answers are mostly one word, so that reading the question,
which a CPU does no faster for many at once, is nearly all of the work; the second half lets every answer be 64 tokens.
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
from janus.dola.cli import JANUS_TINY, positive
from janus.dola.loading import load_pretrained_model
from tools import scenes
from tools.eval_janus_tiny import SPLITS, sample_scenes

DECODINGS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "DoLa, layer 6": {"layer": 6},
    "early exit 2-7": {"candidate_layers": range(2, 8)},
}

LONG = 64


def sample_questions(count: int) -> list[tuple[Image.Image, str]]:
    rng, asked = np.random.default_rng(6), []
    for in_split in SPLITS.values():
        for scene in sample_scenes(in_split, -(-count // len(SPLITS)), seed=6):
            about = scenes.questions(scene)
            asked.append((Image.fromarray(scenes.draw(scene, rng)), about[rng.integers(len(about))][1]))
    return [asked[i] for i in rng.permutation(len(asked))[:count]]


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
    parser.add_argument("--long", type=positive, default=48, help="of them for the long answers (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="answered together (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    asked = sample_questions(args.count)
    print(f"{torch.get_num_threads()} threads, batches of {args.batch_size}")
    for tokens, some in ((0, asked), (LONG, asked[: args.long])):
        for name, dola in DECODINGS.items():
            equal, alone, together = compare(model, processor, some, args.batch_size, dola, tokens)
            length = f"{tokens} tokens each" if tokens else "of their own length"
            print(
                f"{name}, {len(some)} answers {length}: {equal} equal; together {alone / together:.1f} times as fast "
                f"({1000 * alone / len(some):.0f} ms a question alone, {1000 * together / len(some):.0f} ms together)"
            )


if __name__ == "__main__":
    main()
