"""Choosing the contrast layer: every layer and alpha of a validation set from one forward pass per example.

`python -m janus.dola.layer_search image --data pairs.jsonl --outdir found` searches the layer for painting; `answers`
and `tower` do it for lm_head and for SigLIP. Found are a table, a curve, and the switches that every command reads with
`--config`.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from generation_inference import Decoding, default_guidance
from janus.dola.cli import JANUS_TINY, add_model_arguments, parse_layers, positive, run_command
from janus.dola.files import RunLog, load_image, read_json_file, write_whole
from janus.dola.layer_search.metrics import (
    FIELDS,
    Example,
    Task,
    answers_task,
    find_decision,
    headline,
    image_task,
    measure,
    metric_names,
    read_examples,
    rivals,
    tower_task,
)
from janus.dola.loading import load_pretrained_model, resolve_device, resolve_dtype
from janus.dola.rerank import find_text_encoder
from janus.dola.switches import DoLaSwitches

ALPHAS = (0.02, 0.05, 0.1, 0.2, 0.5)
SWITCHES = {
    "image": ("fixed_layer_gen", "alpha_gen"),
    "answers": ("fixed_layer_llm", "alpha_L"),
    "tower": ("fixed_layer_vit", "alpha_V"),
}
FEWEST = 10
"""Examples that a domain needs before its own layer may be called better: fewer make no honest interval."""
MEANS = {
    "prob": "mean probability of the true token",
    "accuracy": "share of questions whose true choice wins",
}

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

    With a log, the batches that it holds are not measured again. Raises ValueError for a layer or alpha out of range.
    """
    layers = range(1, task.num_layers) if layers is None else layers
    done = {} if log is None else log.entries
    values: list[list] = []
    with tqdm(total=len(examples), unit="example") as bar:
        for index, start in enumerate(range(0, len(examples), batch_size)):
            batch = examples[start : start + batch_size]
            if index in done:
                values += [entry["values"] for entry in done[index]]
                bar.initial += len(batch)
            else:
                # the shortest decimals that read back as the same float32
                measured = np.vectorize(lambda x: float(str(x)))(measure(task, batch, layers, alphas)).tolist()
                values += measured
                if log is not None:
                    log.add(index, [{"values": value} for value in measured])
            bar.update(len(batch))
    return np.array(values)


def bootstrap(differences: np.ndarray, draws: int = 2000, at_a_time: int = 100) -> np.ndarray:
    """95% intervals of means over examples, `[examples, k]` to `[k, 2]`, from resampled examples of a fixed seed."""
    count, rng = len(differences), np.random.default_rng(0)
    even = np.full(count, 1 / count)
    means = [rng.multinomial(count, even, at_a_time) @ differences / count for _ in range(draws // at_a_time)]
    return np.quantile(np.concatenate(means), [0.025, 0.975], axis=0).T


def buckets(num_layers: int) -> list[tuple[int, int]]:
    """The contrast layers 1..N-1 in thirds of N: (1, 10), (11, 20), (21, 29) for 30 layers."""
    ends = [0, round(num_layers / 3), round(2 * num_layers / 3), num_layers - 1]
    return [(start + 1, end) for start, end in pairwise(ends) if start < end]


# --- what comes out --------------------------------------------------------------------------------------------------


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


def paired(differences: np.ndarray) -> list[float]:
    return [differences.mean(), *bootstrap(differences[:, None])[0].tolist()]


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
    lines += ["", *claims(summary)]
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
    axes.set_title(f"{title}, {summary['examples']} examples", pad=20)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", frameon=False)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def update_switches(path: Path, task: str, summary: dict[str, Any]) -> None:
    """Put the best layer and alpha, overall and of each domain, into a switches file; what else is there stays.

    Raises ValueError for a file that is there and holds no switches.
    """
    if path.exists():
        DoLaSwitches.from_json(path)
        content = read_json_file(path)
    else:
        content = asdict(DoLaSwitches())

    def keys(found: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(SWITCHES[task], (found["best"]["layer"], found["best"]["alpha"]), strict=True))

    domains = content.pop("domains", {})
    for name, domain in summary.get("domains", {}).items():
        domains[name] = domains.get(name, {}) | keys(domain)
    write_json(path, content | keys(summary) | ({"domains": domains} if domains else {}))


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
    columns = [decision.top[name][0] for name in ("q_N", "q_j", "p_hat")]
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


# --- the command -----------------------------------------------------------------------------------------------------


def parse_alphas(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected alphas like 0.05,0.1,0.2, got {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Find the contrast layer on a validation set: all layers from one forward pass per example."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{image,answers,tower}")
    for task, fields in FIELDS.items():
        names = ", ".join(
            f'"{field}"' + (" (optional)" if kind.endswith("?") else "") for field, kind in fields.items()
        )
        one = tasks.add_parser(task, help=f"lines with {names}", description=f"JSONL lines with {names}.")
        add = one.add_argument_group("files").add_argument
        add("--data", type=Path, required=True, help="JSONL file; image paths are relative to it")
        if task == "tower":
            add("--text_encoder", help="paired SiglipModel: directory or hub id (default: siglip/ in --model)")
        add("--outdir", type=Path, default=f"outputs/layer_search_{task}", help="(default: %(default)s)")
        add("--switches", type=Path, help="switches file to write or update (default: switches.json in --outdir)")
        add("--overwrite", action="store_true", help="start anew where --outdir holds another run (default: refuse)")
        add = one.add_argument_group("search").add_argument
        add("--layers", type=parse_layers, help="contrast layers, as 2,4,6 (default: all, 1..N-1)")
        add("--alphas", type=parse_alphas, default=list(ALPHAS), help="APC thresholds (default: 0.02,0.05,0.1,0.2,0.5)")
        if task == "image":
            add("--cfg_weight", type=float, help="guidance, at least 0 (default: the checkpoint's own, else 5)")
        add("--domain-field", metavar="NAME", help="a field that names each line's domain: a layer for each")
        add("--explain", type=positive, metavar="N", help="write explain.md: N examples made right, N made wrong")
        add("--batch_size", type=positive, default=16, help="examples in one forward pass (default: %(default)s)")
        add_model_arguments(one)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    for alpha in args.alphas:
        Decoding(alpha=alpha)
    if args.switches and args.switches.exists():
        DoLaSwitches.from_json(args.switches)
    examples = read_examples(args.data, args.task, args.domain_field)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    settings: dict[str, Any] = {
        "task": args.task,
        "model": args.model if args.model != str(JANUS_TINY) else JANUS_TINY.name,
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "alphas": args.alphas,
        "batch_size": args.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    _, processor, model = load_pretrained_model(args.model, dtype, device)
    if args.task == "image":
        settings["cfg_weight"] = default_guidance(model) if args.cfg_weight is None else args.cfg_weight
        Decoding(cfg_weight=settings["cfg_weight"])
        task = image_task(model, processor, settings["cfg_weight"])
    elif args.task == "answers":
        task = answers_task(model, processor)
    else:
        encoder = find_text_encoder(args.model, args.text_encoder)
        task = tower_task(model.vision_model.vision_tower, processor.image_processor, *encoder, examples)
    settings["layers"] = sorted(set(args.layers or range(1, task.num_layers)))
    if outside := [layer for layer in settings["layers"] if not 1 <= layer < task.num_layers]:
        raise ValueError(f"--layers: a contrast layer is in 1..{task.num_layers - 1}, got {outside[0]}")

    log = RunLog(args.outdir / "layer_search.jsonl", settings, args.overwrite)
    values = search(task, examples, settings["layers"], args.alphas, args.batch_size, log)
    domains = [example["domain"] for example in examples] if args.domain_field else None
    summary = summarise(values, metric_names(examples), task.num_layers, settings["layers"], args.alphas, domains)
    print(table(summary))
    write_json(args.outdir / "layer_search.json", settings | summary)
    plot(summary, f"{args.task}: {Path(settings['model']).name}", args.outdir / "layer_search.png")
    switches = args.switches or args.outdir / "switches.json"
    update_switches(switches, args.task, summary)
    written = ["layer_search.json", "layer_search.png"]
    if args.explain:
        explain(task, examples, values, summary, args.explain, args.outdir)
        written.append("explain.md")
    print(f"\n{', '.join(written)}: {args.outdir}\nswitches: {switches}")


if __name__ == "__main__":
    run_command(main)
