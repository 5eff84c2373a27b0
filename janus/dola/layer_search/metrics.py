"""What a layer search computes: known tokens (codes, words, captions), read at every layer after one forward pass.

Scoring the places of a `Reading` under every layer and alpha is `score_states`, the same for all tasks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dola_runtime import (
    compute_logprobs_from_hidden,
    contrast_with_apc_from_logprobs,
    probs_from_scores,
    top_pairs,
    trace_step,
)
from janus.dola.files import RunLog
from janus.dola.intervals import bootstrap, hold_out, paired
from janus.dola.layer_search.examples import Example, rivals
from janus.dola.layer_search.tasks import Reading, Task
from janus.dola.scoring import ContinuationScores, TokenScores, fill_dropped, score_states

ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.5)

# --- measures --------------------------------------------------------------------------------------------------------


def metric_names(examples: Sequence[Example]) -> list[str]:
    """What `measure` gives of each example: means over its true tokens, and whether all of it is right.

    prob, log_prob: of the true token. rank: 1 + the number of more probable tokens. top1: share of rank 1. kept: share
    that APC keeps; a dropped token has probability 0, and the log_prob and rank that q_N gives it. exact: every true
    token is top-1, as greedy decoding needs it. accuracy: the true choice has the highest sum of log-probabilities,
    where a dropped token counts -1000, as in the DoLa paper's evaluation; a tie is wrong.
    """
    return ["prob", "log_prob", "rank", "top1", "kept", "exact"] + (["accuracy"] if "choices" in examples[0] else [])


def headline(metrics: Sequence[str]) -> str:
    """The metric that layers are chosen by."""
    return "accuracy" if "accuracy" in metrics else "prob"


def score_reading(reading: Reading, layers: Sequence[int], alphas: Sequence[float]) -> list[ContinuationScores]:
    forced, ln_out, phi, logits_per_place = reading
    return score_states(forced, ln_out, phi, logits_per_place=logits_per_place, layers=layers, alphas=alphas)


@torch.inference_mode()
def measure(task: Task, examples: Sequence[Example], layers: Sequence[int], alphas: Sequence[float]) -> np.ndarray:
    """Metrics of a batch of examples: float32 `[examples, metrics, alphas, 2 + layers]`.

    The last axis holds the baseline, APC only, then DoLa-static at each layer. Raises ValueError for a layer or alpha
    out of range.
    """
    scores: list[ContinuationScores] = []
    for reading in task.read(examples):
        scores += score_reading(reading, layers, alphas)
        del reading  # its states go before the next pass makes its own
    rows, start = [], 0
    for example in examples:
        count = 1 + len(rivals(example))
        rows.append(_metrics(scores[start : start + count]))
        start += count
    return torch.stack(rows).cpu().numpy()


def _metrics(continuations: Sequence[ContinuationScores]) -> Tensor:
    """The true continuation, then its rivals, to `[metrics, alphas, 2 + layers]`."""
    every = [_every_decoding(scores) for scores in continuations]
    (log_p, rank), baseline = every[0], continuations[0].baseline
    kept = log_p > -torch.inf
    rank = torch.where(kept, rank, baseline.rank)
    tokens = (log_p.exp(), fill_dropped(log_p, baseline.log_p), rank.float(), (rank == 1).float(), kept.float())
    metrics = [*(token.mean(-1) for token in tokens), (rank == 1).all(-1).float()]
    if len(every) > 1:
        sums = torch.stack([fill_dropped(log_p).sum(-1) for log_p, _ in every])
        metrics.append((sums[0] > sums[1:].amax(0)).float())
    return torch.stack(metrics)


def _every_decoding(scores: ContinuationScores) -> TokenScores:
    """Baseline, APC only and every layer side by side, `[alphas, 2 + layers, T]`."""
    both = ((scores.baseline.log_p, scores.apc_only.log_p, scores.static.log_p),
            (scores.baseline.rank, scores.apc_only.rank, scores.static.rank))  # fmt: skip
    return TokenScores(*(torch.cat([q.expand_as(apc)[:, None], apc[:, None], p], dim=1) for q, apc, p in both))


# --- the search ------------------------------------------------------------------------------------------------------


def search(
    task: Task,
    examples: Sequence[Example],
    layers: Sequence[int] | None = None,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 16,
    log: RunLog | None = None,
) -> np.ndarray:
    """`measure` of all examples, float64 `[examples, metrics, alphas, 2 + layers]`; layers default to 1..N-1.

    With a log, the batches that it holds are not measured again. Raises ValueError for a layer or alpha out of range,
    and for a log of something else.
    """
    layers = range(1, task.num_layers) if layers is None else layers
    values: list[list] = []
    shape = len(metric_names(examples)), len(alphas), 2 + len(layers)
    if log is not None and (wrong := [i for i, entry in enumerate(log.entries) if not is_measured(entry, i, shape)]):
        raise ValueError(f"{log.path}: line {wrong[0] + 1} is not what this search measures")
    with tqdm(total=len(examples), unit="example") as bar:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            done = [] if log is None else log.entries[start : start + batch_size]
            if len(done) == len(batch):
                values += [entry["values"] for entry in done]
                bar.initial += len(batch)
            else:
                # the shortest decimals that read back as the same float32
                measured = np.vectorize(lambda x: float(str(x)))(measure(task, batch, layers, alphas)).tolist()
                values += measured
                if log is not None:
                    log.add(start, [{"index": start + i, "values": value} for i, value in enumerate(measured)])
            bar.update(len(batch))
    return np.array(values)


def is_measured(entry: dict[str, Any], index: int, shape: tuple[int, ...]) -> bool:
    """Whether a line of the log is that of example `index`."""
    try:
        return entry["index"] == index and np.array(entry["values"], dtype=float).shape == shape
    except (KeyError, TypeError, ValueError):
        return False


def buckets(num_layers: int) -> list[tuple[int, int]]:
    """The contrast layers 1..N-1 in thirds of N: (1, 10), (11, 20), (21, 29) for 30 layers."""
    ends = [0, round(num_layers / 3), round(2 * num_layers / 3), num_layers - 1]
    return [(start + 1, end) for start, end in pairwise(ends) if start < end]


# --- the summary -----------------------------------------------------------------------------------------------------


def summarise(
    values: np.ndarray,
    metrics: Sequence[str],
    num_layers: int,
    layers: Sequence[int],
    alphas: Sequence[float],
    domains: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The means of every metric, differences from the baseline, buckets, the best layer, and that of each domain.

    A difference is `[mean, low, high]`, paired over the examples. `domains` names the domain of each example.
    """
    chosen_by = headline(metrics)
    own = values[:, metrics.index(chosen_by)]
    count, means = len(values), values.mean(0)
    differences = own - own[..., :1]
    over_baseline = np.concatenate(
        [differences.mean(0)[..., None], bootstrap(differences.reshape(count, -1)).reshape(*own.shape[1:], 2)], axis=-1
    )
    curve = means[metrics.index(chosen_by)]
    in_bucket = {
        bounds: [2 + i for i, layer in enumerate(layers) if bounds[0] <= layer <= bounds[1]]
        for bounds in buckets(num_layers)
    }
    a, column = best_cell(values, metrics)
    summary: dict[str, Any] = {
        "examples": count,
        "metric": chosen_by,
        "num_layers": num_layers,
        "layers": list(layers),
        "alphas": list(alphas),
        "means": {
            metric: {"baseline": mean[0, 0], "apc_only": mean[:, 1].tolist(), "dola": mean[:, 2:].tolist()}
            for metric, mean in zip(metrics, means, strict=True)
        },
        "over_baseline": {"apc_only": over_baseline[:, 1].tolist(), "dola": over_baseline[:, 2:].tolist()},
        "buckets": [
            {"layers": list(bounds), "dola": curve[:, columns].mean(-1).tolist()}
            for bounds, columns in in_bucket.items()
            if columns
        ],
        "best": describe_best(own, layers, alphas, a, column),
        "held_out": describe_held_out(own, layers, alphas),
    }
    if domains is not None:
        summary["domains"] = {}
        for name in sorted(set(domains)):
            among = np.array([domain == name for domain in domains])
            in_domain = own[among]
            own_a, own_column = best_cell(values[among], metrics, unless=(a, column))
            summary["domains"][name] = {
                "examples": len(in_domain),
                "best": describe_best(in_domain, layers, alphas, own_a, own_column),
                "held_out": describe_held_out(in_domain, layers, alphas),
                "over_overall": paired(in_domain[:, own_a, own_column] - in_domain[:, a, column]),
            }
    return summary


def best_cell(values: np.ndarray, metrics: Sequence[str], unless: tuple[int, int] | None = None) -> tuple[int, int]:
    """Alpha and column of the best layer; a tie (6 digits) goes to `unless`, to more probability, to later layers."""
    by, tie = (values[:, metrics.index(name), :, 2:].mean(0).round(6) for name in (headline(metrics), "prob"))
    best = max(np.ndindex(by.shape), key=lambda cell: (by[cell], (cell[0], cell[1] + 2) == unless, tie[cell], cell[1]))
    return best[0], best[1] + 2


def describe_best(
    own: np.ndarray, layers: Sequence[int], alphas: Sequence[float], a: int, column: int
) -> dict[str, Any]:
    """A cell of `[examples, alphas, 2 + layers]` beside the baseline, and beside the best that the mask does alone."""
    apc = int(own[..., 1].mean(0).argmax())
    return {
        "layer": layers[column - 2],
        "alpha": alphas[a],
        "value": own[:, a, column].mean(),
        "over_baseline": paired(own[:, a, column] - own[:, a, 0]),
        "apc_only_alpha": alphas[apc],
        "over_apc_only": paired(own[:, a, column] - own[:, apc, 1]),
    }


def describe_held_out(own: np.ndarray, layers: Sequence[int], alphas: Sequence[float]) -> dict[str, Any] | None:
    """The best cell of one half of `[examples, alphas, 2 + layers]` on the other half; None for too few examples."""
    cells = own[..., 2:].reshape(len(own), -1)
    found = hold_out(own[:, 0, 0], own[..., 1], cells)
    if found is None:
        return None
    chosen = [divmod(cell, len(layers)) for cell in found.chosen]
    return found._asdict() | {
        "chosen": [f"layer {layers[layer]}, alpha {alphas[a]:g}" for a, layer in chosen],
        "better": found.better,
    }


# --- one step, looked at ---------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """The step that decided how an example came out: which token of which text, and the top-5 there.

    `continuation` is 0 for the truth, else the number of the rival; `top` has the pairs (token, probability) of
    q_N, q_j and p_hat, best first.
    """

    continuation: int
    step: int
    steps: int
    token: int
    top: dict[str, Any]


@torch.inference_mode()
def find_decision(task: Task, example: Example, layer: int, alpha: float, better: bool) -> Decision:
    """The step at which DoLa did most to make an example right (`better`) or wrong.

    Without choices it is a true token that came to be, or ceased to be, top-1. With choices it is the token, of the
    truth or of its strongest rival, whose log-probability moved most that way.
    """
    reading = next(iter(task.read([example])))
    forced = reading.forced
    scores = score_reading(reading, [layer], [alpha])
    sign = 1 if better else -1
    truth = scores[0]
    if len(scores) == 1:
        gain = sign * (truth.static.log_p[0, 0].exp() - truth.baseline.log_p.exp())
        flip = sign * ((truth.static.rank[0, 0] == 1).int() - (truth.baseline.rank == 1).int())
        continuation, step = 0, int((flip * 2 + gain).argmax())
    else:
        before = [s.baseline.log_p for s in scores]
        after = [fill_dropped(s.static.log_p[0, 0]) for s in scores]
        losing = torch.stack([log_p.sum() for log_p in (before if better else after)])
        rival = 1 + int(losing[1:].argmax())
        shared = set(forced.places[0].tolist()) & set(forced.places[rival].tolist())
        moves = [
            (float(way * sign * (after[k] - before[k])[t]), k, t)
            for k, way in ((0, 1), (rival, -1))
            for t, place in enumerate(forced.places[k].tolist())
            if place not in shared
        ]
        _, continuation, step = max(moves)
    place = forced.places[continuation][step : step + 1]
    log_qN = compute_logprobs_from_hidden(forced.hidden[-1, place], None, reading.phi)
    log_qj = compute_logprobs_from_hidden(forced.hidden[layer, place], reading.ln_out, reading.phi)
    p_hat = probs_from_scores(contrast_with_apc_from_logprobs(log_qN, log_qj, alpha))
    traced = trace_step(log_qN, log_qj, p_hat)
    top = {name: top_pairs(traced, name, 0) for name in ("q_N", "q_j", "p_hat")}
    return Decision(continuation, step, len(forced.places[continuation]), int(forced.targets[place]), top)
