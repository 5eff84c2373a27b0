"""What a layer search shows and writes: the table, the curve, the switches, the examples that DoLa changed most."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from janus.dola.files import load_image, read_json_file, write_whole
from janus.dola.intervals import FEWEST
from janus.dola.layer_search.examples import Example, rivals
from janus.dola.layer_search.metrics import find_decision
from janus.dola.layer_search.tasks import Task
from janus.dola.switches import DoLaSwitches

SWITCHES = {
    "image": ("use_dola_gen_static", "fixed_layer_gen", "alpha_gen"),
    "answers": ("use_dola_lm_static", "fixed_layer_llm", "alpha_L"),
    "tower": ("use_dola_siglip_static", "fixed_layer_vit", "alpha_V"),
}
MEANS = {
    "prob": "mean probability of the true token",
    "accuracy": "share of questions whose true choice wins",
}


def table(summary: dict[str, Any]) -> str:
    """Headline metric by layer and alpha in percent, then all metrics of the best, then what may be claimed."""
    metric, alphas, best = summary["metric"], summary["alphas"], summary["best"]
    means = summary["means"][metric]
    lines = [f"{summary['examples']} examples; {MEANS[metric]}, %", ""]

    def row(name: str, cells: Sequence[float], marked: int | None = None) -> str:
        return f"{name:>14}" + "".join(f"{100 * x:8.2f}{'*' if i == marked else ' '}" for i, x in enumerate(cells))

    lines.append(f"{'alpha':>14}" + "".join(f"{alpha:8g} " for alpha in alphas))
    lines.append(row("baseline", [means["baseline"]] * len(alphas)))
    lines.append(row("APC only", means["apc_only"]))
    for bucket in summary["buckets"]:
        lines.append(row("mean of {}-{}".format(*bucket["layers"]), bucket["dola"]))
    for i, layer in enumerate(summary["layers"]):
        marked = alphas.index(best["alpha"]) if layer == best["layer"] else None
        lines.append(row(f"layer {layer}", [by_layer[i] for by_layer in means["dola"]], marked))

    at, apc = alphas.index(best["alpha"]), alphas.index(best["apc_only_alpha"])
    layer = summary["layers"].index(best["layer"])
    lines += ["", f"{'':>24}" + "".join(f"{name:>10}" for name in summary["means"])]
    for name, of in (
        ("baseline", lambda m: m["baseline"]),
        (f"APC only, alpha {alphas[apc]:g}", lambda m: m["apc_only"][apc]),
        (f"layer {best['layer']}, alpha {best['alpha']:g}", lambda m: m["dola"][at][layer]),
    ):
        lines.append(f"{name:>24}" + "".join(f"{of(m):10.4f}" for m in summary["means"].values()))
    lines += [
        "",
        *claims(summary),
        *(f"{name or 'Switches'}: {d.why}." for name, d in decide_all(summary, MEANS[metric]).items()),
    ]
    return "\n".join(lines)


def points(difference: Sequence[float]) -> str:
    return "{:+.2f} points [{:+.2f}, {:+.2f}]".format(*(100 * x for x in difference))


def claims(summary: dict[str, Any]) -> list[str]:
    """What the numbers allow to say of the best layer, and of each domain's."""
    best = summary["best"]
    named = "layer {layer} at alpha {alpha:g}".format(**best)
    over, beyond_mask = best["over_baseline"], best["over_apc_only"]
    if over[1] > 0:
        lines = [f"Best: {named}, {points(over)} over the baseline."]
    else:
        lines = [f"No layer is better than the baseline beyond its interval; the best, {named}: {points(over)}."]
    verdict = "The contrast adds to the mask" if beyond_mask[1] > 0 else "The contrast adds nothing certain to the mask"
    lines.append(f"{verdict}: {points(beyond_mask)} over APC only at alpha {best['apc_only_alpha']:g}.")
    for name, domain in summary.get("domains", {}).items():
        found = "layer {layer} at alpha {alpha:g}".format(**domain["best"])
        told_apart = domain["examples"] >= FEWEST and domain["over_overall"][1] > 0
        verdict = "better than" if told_apart else "not better, beyond its interval, than"
        compared = (
            "is best, as overall" if found == named else f"is {verdict} {named}: {points(domain['over_overall'])}"
        )
        lines.append(f"Domain {name} ({domain['examples']} examples): {found} {compared}.")
    return lines


def plot(summary: dict[str, Any], title: str, path: Path) -> None:
    """Layer to metric, a line for each alpha, the mask alone to the right, the baseline dashed, buckets marked off."""
    from matplotlib.figure import Figure  # here, so that its absence is the command's to tell

    layers, best, metric = summary["layers"], summary["best"], summary["metric"]
    means, num_layers = summary["means"][metric], summary["num_layers"]
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for a, alpha in enumerate(summary["alphas"]):
        (line,) = axes.plot(layers, [100 * x for x in means["dola"][a]], marker="o", ms=4, label=f"alpha {alpha:g}")
        axes.plot(num_layers, 100 * means["apc_only"][a], marker="D", ms=6, ls="", color=line.get_color())
    axes.axhline(100 * means["baseline"], ls="--", color="black", label="baseline")
    low, high = (100 * (means["baseline"] + bound) for bound in best["over_baseline"][1:])
    axes.vlines(best["layer"], low, high, color="black", lw=1.5)
    axes.plot([best["layer"]] * 2, [low, high], marker="_", ms=12, ls="", color="black")
    axes.plot(
        best["layer"],
        100 * best["value"],
        marker="*",
        ms=15,
        ls="",
        color="gold",
        mec="black",
        label=f"best: layer {best['layer']}, alpha {best['alpha']:g}\n(95% interval of the gain)",
    )
    for bucket in summary["buckets"]:
        first, last = bucket["layers"]
        axes.axvline(last + 0.5, ls=":", color="gray", lw=1)
        name = f"{first}-{last}" if first < last else f"{first}"
        axes.text((first + last) / 2, 1.01, name, ha="center", color="gray", transform=axes.get_xaxis_transform())
    step = 1 if num_layers <= 16 else 2
    ticks = range(step, num_layers - step + 1, step)
    axes.set_xticks([*ticks, num_layers], [*map(str, ticks), "APC\nonly"])
    axes.set_xlim(0.5, num_layers + 0.5)
    axes.set_xlabel("contrast layer")
    axes.set_ylabel(f"{MEANS[metric]}, %")
    axes.set_title(f"{title}, {summary['examples']} examples", pad=20, parse_math=False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


class Decision(NamedTuple):
    """What a switches file says of one contrast: whether it is on, its layer and alpha, and why."""

    on: bool
    layer: int
    alpha: float
    why: str


def decide(found: dict[str, Any], measured: str, points: Callable[[Sequence[float]], str] = points) -> Decision:
    """On only where the best contrast, judged on what did not choose it, beats the baseline and APC only for certain.

    `found` holds `best` and `held_out`, as a summary and each of its domains do; `measured` says by what.
    """
    held_out, best = found["held_out"], found["best"]
    if held_out is None:
        return Decision(False, best["layer"], best["alpha"], f"off: fewer than {FEWEST} examples ({measured})")
    return Decision(
        held_out["better"],
        best["layer"],
        best["alpha"],
        f"{'on' if held_out['better'] else 'off'}: the best contrast, chosen on one half and judged on the other "
        f"({' and '.join(dict.fromkeys(held_out['chosen']))}), has {points(held_out['over_baseline'])} over the "
        f"baseline and {points(held_out['over_apc_only'])} over APC only ({measured})",
    )


def decide_all(summary: dict[str, Any], measured: str) -> dict[str | None, Decision]:
    """The decision overall, under None, and that of each domain."""
    return {name: decide(found, measured) for name, found in ({None: summary} | summary.get("domains", {})).items()}


def update_switches(path: Path, task: str, decisions: dict[str | None, Decision]) -> None:
    """Put decisions, overall and of each domain, into a switches file; what else is there stays.

    A new file has everything off that was not searched. Raises ValueError for a file that holds no switches.
    """
    if not path.exists():
        DoLaSwitches(**{use: False for use, _, _ in SWITCHES.values()}).to_json(path)
    DoLaSwitches.from_json(path)  # the check of all of it
    content = read_json_file(path)
    domains = content.pop("domains", {})
    for name, (on, layer, alpha, why) in decisions.items():
        part = content if name is None else domains.setdefault(name, {})
        part |= dict(zip(SWITCHES[task], (on, layer, alpha), strict=True))
        part["why"] = part.get("why", {}) | {task: why}
    write_json(path, content | ({"domains": domains} if domains else {}))


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# --- the examples that DoLa changed most -----------------------------------------------------------------------------


def explain(
    task: Task, examples: Sequence[Example], values: np.ndarray, summary: dict[str, Any], count: int, outdir: Path
) -> None:
    """Write `explain.md`, and its pictures: the `count` examples that the best layer made right, and made wrong."""
    metrics, best = list(summary["means"]), summary["best"]
    cell = summary["alphas"].index(best["alpha"]), 2 + summary["layers"].index(best["layer"])
    right, prob = (
        values[:, metrics.index(name), cell[0], cell[1]] - values[:, metrics.index(name), 0, 0]
        for name in ("accuracy" if "accuracy" in metrics else "top1", "prob")
    )
    order = sorted(range(len(examples)), key=lambda i: (right[i], prob[i]))
    lines = [
        f"# What DoLa changed: layer {best['layer']}, alpha {best['alpha']:g}, against the baseline",
        "",
        "Each table is the top-5 at the step that decided, with the text's own token in bold.",
    ]
    (outdir / "explain").mkdir(exist_ok=True)
    for heading, better, indices in (
        ("Wrong to right", True, [i for i in reversed(order) if right[i] > 0][:count]),
        ("Right to wrong", False, [i for i in order if right[i] < 0][:count]),
    ):
        lines += ["", f"## {heading}"] + ([] if indices else ["", "None."])
        for i in indices:
            lines += ["", *explain_one(task, examples[i], i, best["layer"], best["alpha"], better, outdir)]
    text = "\n".join(lines) + "\n"
    write_whole(outdir / "explain.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def explain_one(
    task: Task, example: Example, index: int, layer: int, alpha: float, better: bool, outdir: Path
) -> list[str]:
    decision = find_decision(task, example, layer, alpha, better)
    lines = [f"### Example {index + 1}", ""]
    if "image" in example:
        picture = load_image(example["image"])
        picture.thumbnail((192, 192))
        write_whole(outdir / "explain" / f"{index:05d}.png", lambda temporary: picture.save(temporary, format="PNG"))
        lines += [f"![example {index + 1}](explain/{index:05d}.png)", ""]
    for field in ("prompt", "question", "answer", "caption"):
        if field in example:
            lines.append(f"- {field}: {as_code(example[field])}")
    if decision.continuation:
        lines.append(f"- step {decision.step + 1} of {decision.steps} of the false choice "
                     f"{as_code(rivals(example)[decision.continuation - 1])}")  # fmt: skip
    else:
        lines.append(f"- step {decision.step + 1} of {decision.steps}")
    lines += ["", "| | q_N | q_j | p_hat |", "|---|---|---|---|"]
    columns = [decision.top[name] for name in ("q_N", "q_j", "p_hat")]
    for rank in range(len(columns[0])):
        cells = []
        for token, p in (column[rank] for column in columns):
            name = as_code(task.name_token(example, token))
            cells.append(f"{f'**{name}**' if token == decision.token else name} {100 * p:.1f}%" if p > 0 else "")
        lines.append(f"| {rank + 1} | " + " | ".join(cells) + " |")
    return lines


def as_code(text: str) -> str:
    """Text on one line of Markdown, in a table's cell too."""
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1].replace('`', chr(39)).replace('|', '¦')}`"
