"""Scores of painted images to what may be said of the decodings that painted them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from janus.dola.intervals import hold_out, paired

Decodings = Mapping[str, Mapping[str, Any]]
"""Name of a variant -> the fields of its decoding."""


def kind(decoding: Mapping[str, Any]) -> str:
    """`baseline`, `apc` (the mask alone) or `dola`."""
    if decoding["gamma"] == 0:
        return "apc"
    return "dola" if decoding["layers"] else "baseline"


def sampled_alike(variants: Decodings) -> dict[str, list[str]]:
    """The variants' names by their guidance and temperature; what differs in these is no contrast's doing."""
    groups: dict[str, list[str]] = {}
    for name, decoding in variants.items():
        groups.setdefault("cfg {cfg_weight:g}, temperature {temperature:g}".format(**decoding), []).append(name)
    return groups


def compare(variants: Decodings, scores: np.ndarray, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """What each group of variants that sample alike scored: means, and paired differences over the prompts.

    `scores` is `[prompts, variants]`, one number for a prompt's images; a prompt without one under some variant counts
    nowhere. `columns` splits the prompts. Differences are `[mean, low, high]`, 95% intervals; None where there is no
    such variant. An APC-only row stands beside a contrast of the same alpha and order. `held_out` is the best contrast
    as chosen on one half of the prompts and judged on the other.
    """
    names = list(variants)
    whole = ~np.isnan(scores).any(1)
    scores = scores[whole]
    if not len(scores):
        raise ValueError("no prompt is scored under every variant")
    groups = []
    for sampling, members in sampled_alike(variants).items():
        of = {name: scores[:, names.index(name)] for name in members}
        by_kind = {k: [name for name in members if kind(variants[name]) == k] for k in ("baseline", "apc", "dola")}
        baseline = of[by_kind["baseline"][0]] if by_kind["baseline"] else None
        rows = []
        for name in members:
            mask = find_mask(variants, by_kind["apc"], name)
            rows.append(
                {
                    "variant": name,
                    "kind": kind(variants[name]),
                    "mean": float(of[name].mean()),
                    "over_baseline": None if baseline is None or of[name] is baseline else paired(of[name] - baseline),
                    "wins": None if baseline is None else int((of[name] > baseline).sum()),
                    "losses": None if baseline is None else int((of[name] < baseline).sum()),
                    "over_apc_only": None if mask is None else paired(of[name] - of[mask]),
                }
            )
        held_out = None
        if baseline is not None and by_kind["apc"] and by_kind["dola"]:
            masks, contrasts = (np.stack([of[name] for name in by_kind[k]], axis=1) for k in ("apc", "dola"))
            held_out = hold_out(baseline, masks, contrasts)
        groups.append(
            {
                "sampling": sampling,
                "prompts": len(scores),
                "rows": rows,
                "held_out": held_out
                and {
                    "chosen": [by_kind["dola"][i] for i in held_out.chosen],
                    "over_baseline": held_out.over_baseline,
                    "over_apc_only": held_out.over_apc_only,
                    "better": held_out.better,
                },
                "by": {} if columns is None else split(of, baseline, np.array(columns, dtype=object)[whole]),
            }
        )
    return groups


def find_mask(variants: Decodings, masks: Sequence[str], name: str) -> str | None:
    """The variant that is this contrast's mask alone."""
    if kind(variants[name]) != "dola":
        return None
    alike = (mask for mask in masks if all(variants[mask][k] == variants[name][k] for k in ("alpha", "cfg_order")))
    return next(alike, None)


def split(of: Mapping[str, np.ndarray], baseline: np.ndarray | None, column: np.ndarray) -> dict[str, Any]:
    """Value of the column -> its number of prompts, and each variant's mean and difference from the baseline."""
    parts = {}
    for value in sorted(set(column)):
        among = column == value
        parts[value] = {
            "prompts": int(among.sum()),
            "rows": [
                {
                    "variant": name,
                    "mean": float(own[among].mean()),
                    "over_baseline": None if baseline is None or own is baseline else paired((own - baseline)[among]),
                }
                for name, own in of.items()
            ],
        }
    return parts


# --- choosing among the images of a prompt ---------------------------------------------------------------------------


def judge_choices(
    variants: Decodings, scores: Mapping[str, np.ndarray], referee: str
) -> dict[str, list[dict[str, Any]]]:
    """Variant -> what choosing the best of a prompt's images by each other scorer gains, as the referee scores it.

    `scores` are `[prompts, variants, images]` by scorer. Of each chooser: the referee's mean for the images that it
    chose and the paired difference to the first image; `agreement` is the share of pairs of a prompt's images that it
    ranks as the referee does, a tie counts half. The referee's own row is the best that can be chosen.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for v, name in enumerate(variants):
        truth = scores[referee][:, v]
        first = truth[:, 0]
        found[name] = [{"chooser": "the first", "mean": float(first.mean()), "over_first": None, "agreement": None}]
        for chooser, of in scores.items():
            chosen = np.take_along_axis(truth, of[:, v].argmax(1)[:, None], axis=1)[:, 0]
            found[name].append(
                {
                    "chooser": chooser,
                    "mean": float(chosen.mean()),
                    "over_first": paired(chosen - first),
                    "agreement": agreement(of[:, v], truth),
                }
            )
    return found


def agreement(scores: np.ndarray, truth: np.ndarray) -> list[float] | None:
    """`[share, low, high]` of the pairs of a prompt's images that `truth` tells apart which `scores` rank alike.

    Both are `[prompts, images]`. The interval is over prompts, each of which weighs as much as it has such pairs. None
    where there are none.
    """
    wanted = np.sign(truth[:, :, None] - truth[:, None, :])
    given = np.sign(scores[:, :, None] - scores[:, None, :])
    pairs = (wanted > 0).sum((1, 2))
    alike = ((wanted > 0) * (given + 1) / 2).sum((1, 2))
    if not pairs.any():
        return None
    share = alike.sum() / pairs.sum()
    deviations = (alike - share * pairs) / pairs.mean()  # the linear part of a ratio of means
    return [float(share), *(float(min(max(share + x, 0.0), 1.0)) for x in paired(deviations)[1:])]
