"""Questions answered together and one by one: are the answers equal, and how much faster are they together?

    python -m benchmarks.answers_batch [--count 500] [--batch_size 16]

Drawings of janus-tiny's grammar, every kind of question, float32 on the CPU; baseline, DoLa and early exit. Both ways
alternate, batch by batch, in one process.
"""

import argparse
import time
from typing import Any

import numpy as np
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


def sample_questions(count: int) -> list[tuple[Image.Image, str]]:
    rng, asked = np.random.default_rng(6), []
    for in_split in SPLITS.values():
        for scene in sample_scenes(in_split, -(-count // len(SPLITS)), seed=6):
            about = scenes.questions(scene)
            asked.append((Image.fromarray(scenes.draw(scene, rng)), about[rng.integers(len(about))][1]))
    return [asked[i] for i in rng.permutation(len(asked))[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=500, help="questions (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="answered together (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    asked = sample_questions(args.count)
    for name, dola in DECODINGS.items():
        equal, seconds = 0, {1: 0.0, args.batch_size: 0.0}
        for start in tqdm(range(0, len(asked), args.batch_size), desc=name):
            some, given = asked[start : start + args.batch_size], {}
            for size in seconds:
                started = time.perf_counter()
                given[size] = [
                    answer.tokens.tolist()
                    for first in range(0, len(some), size)
                    for answer in answer_batch(
                        model, processor, some[first : first + size], dola=dola, max_new_tokens=20
                    )
                ]
                seconds[size] += time.perf_counter() - started
            equal += sum(one == other for one, other in zip(*given.values(), strict=True))
        alone, together = seconds.values()
        print(
            f"{name}: {equal} of {len(asked)} answers equal; together {alone / together:.1f} times as fast "
            f"({1000 * alone / len(asked):.0f} ms a question alone, {1000 * together / len(asked):.0f} ms together)"
        )


if __name__ == "__main__":
    main()
