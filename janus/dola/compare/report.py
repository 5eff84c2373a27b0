"""What a comparison shows and writes: tables, a plot of the differences, the prompts that gained and lost most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from janus.dola.compare.summary import kind, sampled_alike
from janus.dola.files import write_whole
from janus.dola.painting import PaintingRun
from janus.dola.pictures import contact_sheet, save_image, stack

SHOWN = 4
"""Prompts on the sheet that gained most, and as many that lost most."""


def points(difference: Sequence[float] | None) -> str:
    return "" if difference is None else "{:+.4g} [{:+.4g}, {:+.4g}]".format(*difference)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def tables(comparison: dict[str, Any], labels: Mapping[str, str]) -> str:
    """All that was found, as Markdown: for each scorer and sampling the variants, splits and held-out choice."""
    lines = []
    for scorer, groups in comparison["scorers"].items():
        for group in groups:
            lines += ["", f"### {scorer}, {group['sampling']}, {group['prompts']} prompts", ""]
            rows = [
                [
                    labels[row["variant"]],
                    f"{row['mean']:.4g}",
                    points(row["over_baseline"]),
                    "" if row["over_baseline"] is None else f"{row['wins']} : {row['losses']}",
                    points(row["over_apc_only"]),
                ]
                for row in group["rows"]
            ]
            if all(row["kind"] != "apc" for row in group["rows"]):
                rows.append(["APC only", "not painted: add apc to --compare", "", "", ""])
            lines += markdown(["", "mean", "over the baseline", "prompts better : worse", "over its APC only"], rows)
            lines += ["", claim(group, labels)]
            for value, part in group["by"].items():
                lines += ["", f"{comparison['by']} {value} ({part['prompts']} prompts)", ""]
                rows = [[labels[r["variant"]], f"{r['mean']:.4g}", points(r["over_baseline"])] for r in part["rows"]]
                lines += markdown(["", "mean", "over the baseline"], rows)
    for name, choices in comparison.get("choices", {}).items():
        lines += [
            "",
            f"### Choosing the best of {comparison['images']}, {labels[name]}, by {comparison['referee']}",
            "",
        ]
        rows = [[c["chooser"], f"{c['mean']:.4g}", points(c["over_first"]), share(c["agreement"])] for c in choices]
        lines += markdown(["chosen by", "mean", "over the first", "pairs ranked alike, %"], rows)
    return "\n".join(lines).strip() + "\n"


def share(agreement: Sequence[float] | None) -> str:
    return "" if agreement is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in agreement))


def claim(group: dict[str, Any], labels: Mapping[str, str]) -> str:
    """What may be said of the best contrast of a group, chosen and judged on different prompts."""
    held_out = group["held_out"]
    if held_out is None:
        return "No contrast can be judged here: that takes ten prompts, the baseline, APC only and a contrast."
    chosen = " and ".join(dict.fromkeys(labels[name] for name in held_out["chosen"]))
    verdict = "is better than both" if held_out["better"] else "is not better than both"
    return (
        f"The best contrast, chosen on one half of the prompts and judged on the other ({chosen}), {verdict}: "
        f"{points(held_out['over_baseline'])} over the baseline, {points(held_out['over_apc_only'])} over APC only."
    )


def plot(comparison: dict[str, Any], labels: Mapping[str, str], path: Path) -> None:
    """The differences from the baseline with their intervals, a column of panels for each scorer."""
    from matplotlib.figure import Figure  # here, so that its absence is the command's to tell

    scorers = comparison["scorers"]
    groups = {
        scorer: [g for g in of if any(row["over_baseline"] for row in g["rows"])] for scorer, of in scorers.items()
    }
    heights = [sum(row["over_baseline"] is not None for row in g["rows"]) for g in next(iter(groups.values()))]
    if not heights:
        return
    figure = Figure(
        figsize=(2.6 + 3.2 * len(groups), 1.2 + 0.32 * sum(heights) + 0.5 * len(heights)), layout="constrained"
    )
    grid = figure.subplots(
        len(heights), len(groups), squeeze=False, sharex="col", gridspec_kw={"height_ratios": heights}
    )
    colours = {"apc": "tab:orange", "dola": "tab:blue", "baseline": "gray"}
    for column, (scorer, of) in enumerate(groups.items()):
        for axes, group in zip(grid[:, column], of, strict=True):
            rows = [row for row in group["rows"] if row["over_baseline"] is not None]
            for y, row in enumerate(rows):
                mean, low, high = row["over_baseline"]
                axes.plot([low, high], [y, y], color=colours[row["kind"]], lw=2)
                axes.plot(mean, y, "o", color=colours[row["kind"]])
            axes.axvline(0, color="black", lw=1, ls="--")
            axes.set_yticks(range(len(rows)), [labels[row["variant"]] for row in rows] if column == 0 else [])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(axis="x", alpha=0.25)
            if column == 0 and len(of) > 1:
                axes.set_title(group["sampling"], loc="left", fontsize=9)
        grid[-1, column].set_xlabel(f"{scorer}: over the baseline")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def extremes(run: PaintingRun, scores: np.ndarray, path: Path) -> list[str] | None:
    """A sheet of the prompts that the contrast with the best mean gained and lost most on, beside its baseline.

    `scores` is `[prompts, variants]`. Returns the names of the two variants; None, and no sheet, without both.
    """
    names = list(run.variants)
    pairs = []
    for members in sampled_alike(run.variants).values():
        baselines = [name for name in members if kind(run.variants[name]) == "baseline"]
        contrasts = [name for name in members if kind(run.variants[name]) == "dola"]
        pairs += [(baselines[0], name) for name in contrasts if baselines]
    if not pairs:
        return None
    gains = {pair: scores[:, names.index(pair[1])] - scores[:, names.index(pair[0])] for pair in pairs}
    pair = max(gains, key=lambda pair: np.nanmean(gains[pair]))
    gain = np.nan_to_num(gains[pair])
    order = [int(i) for i in gain.argsort(kind="stable")]
    chosen = [i for i in order[::-1][:SHOWN] if gain[i] > 0] + [i for i in order[:SHOWN][::-1] if gain[i] < 0]
    sheets = []
    for index in chosen:
        of = dict(zip(run.variants, run.by_variant(index).values(), strict=True))
        rows = {run.labels[name]: [run.load(position) for position in of[name]] for name in pair}
        told = " to ".join(f"{scores[index, names.index(name)]:.4g}" for name in pair)
        sheets.append(
            contact_sheet(run.prompts[index].text, f"{'gained' if gain[index] > 0 else 'lost'}: {told}", rows)
        )
    if not sheets:
        return None
    save_image(stack(sheets), path)
    return list(pair)
