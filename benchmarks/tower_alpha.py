"""How plausible must a candidate be for the tower's contrast to do no harm, among 5 to 13,536 of them?

    python -m benchmarks.tower_alpha [--count 120]

janus-tiny's tower on drawings of two objects, as drawn and under noise. Beside the right caption stand others at
random, or those nearest to it by the text encoder. Prints, per alpha, the share of drawings whose own caption is ranked
first, in the mean over every contrast layer; a star marks a paired difference from the baseline whose 95% interval
excludes 0.
"""

import argparse

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dola_runtime import contrast_with_apc_from_logprobs
from janus.dola.cli import JANUS_TINY, positive
from janus.dola.loading import load_pretrained_model
from janus.dola.rerank import build_text_bank, find_text_encoder, pooled_features, siglip_temperature, tower_depth
from tools.eval_janus_tiny import GRAMMAR, SPLITS, markdown, sample_scenes
from tools.eval_understanding import take_picture

ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
COUNTS, MANY = (5, 50, 500), 13_536
NOISES = (0.0, 60.0)


def choose_rivals(bank: Tensor, own: int, count: int, near: bool, rng: np.random.Generator) -> Tensor:
    """The own caption's index, then count - 1 others: `[count]`."""
    order = (bank @ bank[own]).argsort(descending=True) if near else torch.from_numpy(rng.permutation(len(bank)))
    return torch.cat([torch.tensor([own]), order[order != own][: count - 1]])


def rank_first(log_q: Tensor) -> Tensor:
    """Whether candidate 0 of log q `[layers + 1, C]` is first: `[1 + alphas, layers]`, the baseline's row first."""
    log_qN, log_qj = log_q[-1], log_q[:-1]
    rows = [log_qN.expand_as(log_qj)]
    rows += [contrast_with_apc_from_logprobs(log_qN, log_qj, alpha) for alpha in ALPHAS]
    return torch.stack([row.argmax(-1) == 0 for row in rows])


def interval(difference: np.ndarray) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive, default=120, help="drawings of each split (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(JANUS_TINY, "float32", "cpu")
    siglip, tokenizer = find_text_encoder(str(JANUS_TINY), None)
    tower, tau = model.vision_model.vision_tower, siglip_temperature(siglip)
    captions = [scene.caption for scene in GRAMMAR["two objects"]]
    bank, place = (
        normalize(build_text_bank(siglip, tokenizer, captions), dim=-1),
        {c: i for i, c in enumerate(captions)},
    )
    shown = [
        scene for split in SPLITS if split.startswith("two") for scene in sample_scenes(SPLITS[split], args.count, 3)
    ]
    sets = [(count, near) for count in COUNTS for near in (False, True)] + [(MANY, False)]
    for noise in NOISES:
        rng = np.random.default_rng(3)
        images = processor.image_processor([take_picture(scene, rng, noise) for scene in shown])
        z = normalize(pooled_features(tower, images, range(1, tower_depth(tower) + 1)), dim=-1)
        first: dict[tuple[int, bool], np.ndarray] = {}
        for count, near in sets:
            of_drawing = []
            for i, scene in enumerate(shown):
                rivals = choose_rivals(bank, place[scene.caption], count, near, rng)
                of_drawing.append(rank_first(torch.log_softmax(z[:, i] @ bank[rivals].T / tau, dim=-1)))
            first[count, near] = torch.stack(of_drawing).float().mean(-1).numpy()  # [drawings, 1 + alphas]
        rows = []
        for k, name in enumerate(["baseline", *(f"alpha {alpha:g}" for alpha in ALPHAS)]):
            cells = []
            for hits in first.values():
                low, high = interval(hits[:, k] - hits[:, 0])
                cells.append(f"{100 * hits[:, k].mean():.1f}{'*' * bool(low > 0 or high < 0)}")
            rows.append([name, *cells])
        header = [
            f"{count:,}{', nearest' if near else ' at random' if count != MANY else ', all'}" for count, near in sets
        ]
        print(f"{len(shown)} drawings, noise of {noise:g} grey levels: own caption first, %, among\n")
        print(markdown(["", *header], rows), "\n")


if __name__ == "__main__":
    main()
