"""FACTOR's expert set on SmolLM2-135M: does DoLa rank the true completion above three false ones more often?

    python -m benchmarks.factor path/to/expert_factor.csv

One forward pass per question reads every layer, with and without LN_out, at every alpha. Writes docs/factor.md,
docs/factor.json and docs/factor.png.
"""

import argparse
import csv
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.smollm2 import load_smollm2
from janus.dola.scoring import DROPPED, ContinuationScores, fill_dropped, score_forced, teacher_force

LAYERS = list(range(2, 30, 2))
EARLY_EXITS = ([2, 4, 6, 8, 10, 12, 14], [16, 18, 20, 22, 24, 26, 28], [22, 24, 26, 28])
ALPHAS = (0.0, 0.1)
ROWS = ["no contrast"] + [str(layer) for layer in LAYERS] + [f"early exit {c[0]}-{c[-1]}" for c in EARLY_EXITS]
TREATMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alpha 0": lambda log_p, log_qN: log_p[0],
    "alpha 0.1": lambda log_p, log_qN: fill_dropped(log_p[1]),
    "0.1, dropped as log q_N": lambda log_p, log_qN: fill_dropped(log_p[1], log_qN),
    "0.1, paper's code": lambda log_p, log_qN: torch.where(log_p[1] > -math.inf, log_p[0], DROPPED),
}
TEXTS = {
    "as distributed": lambda text: text,
    "period closed up": lambda text: text.removesuffix(" .") + "." if text.endswith(" .") else text,
}


def read_questions(path: Path) -> list[tuple[str, list[str]]]:
    """Prefix, and completions with the true one first."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (row["turncated_prefixes"].rstrip(), [row["completion"], *(row[f"contradiction_{i}"] for i in range(3))])
            for row in csv.DictReader(file)
        ]


def every_decoding(scores: ContinuationScores) -> Tensor:
    """Log-probability of each token under each treatment and row of the tables: `[treatments, rows, T]`."""
    early_exits = [scores.early_exit(candidates).log_p for candidates in EARLY_EXITS]
    log_p = torch.cat([scores.apc_only.log_p[:, None], scores.static.log_p, torch.stack(early_exits, dim=1)], dim=1)
    return torch.stack([treat(log_p, scores.baseline.log_p) for treat in TREATMENTS.values()])


def measure_question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefix: str, completions: list[str]
) -> dict[str, Tensor]:
    """Sum and mean over the tokens of each completion, in both texts.

    `baseline` is `[texts, completions, 2 (sum, mean)]`, `dola` `[norms, treatments, rows, texts, completions, 2]`, and
    `kept` `[texts, completions]` the share of the true tokens that APC keeps.
    """
    texts = [" " + change(text) for change in TEXTS.values() for text in completions]
    distinct = list(dict.fromkeys(texts))
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in distinct]
    forced = teacher_force(model, torch.tensor(tokenizer(prefix)["input_ids"]), ids)
    normed, raw = (
        score_forced(model, forced, layers=LAYERS, alphas=ALPHAS, norm=norm, overlap=True) for norm in (True, False)
    )
    normed, raw = (dict(zip(distinct, scores, strict=True)) for scores in (normed, raw))
    dola = [
        torch.stack([sum_and_mean(every_decoding(scores[text])) for text in texts], dim=-2) for scores in (normed, raw)
    ]
    in_order, split = [normed[text] for text in texts], (len(TEXTS), len(completions))
    return {
        "baseline": torch.stack([sum_and_mean(s.baseline.log_p) for s in in_order]).unflatten(0, split),
        "dola": torch.stack(dola).unflatten(-2, split),
        "kept": torch.stack([(s.static.log_p[1, 0] > -math.inf).float().mean() for s in in_order]).unflatten(0, split),
    }


def sum_and_mean(log_p: Tensor) -> Tensor:
    return torch.stack([log_p.sum(-1), log_p.mean(-1)], dim=-1)


def wilson_interval(correct: Tensor) -> tuple[float, float]:
    """95% interval of a share, from bools `[questions]`."""
    n, p, z = len(correct), correct.float().mean().item(), 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def paired_interval(difference: Tensor) -> tuple[float, float]:
    """95% bootstrap interval of a mean over questions, `[questions]`."""
    draws = torch.randint(len(difference), (10_000, len(difference)), generator=torch.Generator().manual_seed(0))
    low, high = difference[draws].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def summarise(measured: dict[str, Tensor]) -> list[dict]:
    """One record per text, reduction and decoding, from what `measure_question` gives, stacked over questions.

    A record holds the accuracy and its interval, and the difference from the baseline and its interval.
    """
    records = []
    for (t, text), (r, reduce) in product(enumerate(TEXTS), enumerate(("sum", "mean"))):
        where = {"text": text, "score": reduce}
        right = is_right(measured["baseline"][:, t, :, r])
        records.append(where | {"decoding": "baseline"} | accuracy(right, right))
        for (n, norm), (k, treatment), (d, row) in product(
            enumerate((True, False)), enumerate(TREATMENTS), enumerate(ROWS)
        ):
            found = accuracy(is_right(measured["dola"][:, n, k, d, t, :, r]), right)
            records.append(where | {"decoding": row, "norm": norm, "treatment": treatment} | found)
    return records


def is_right(scores: Tensor) -> Tensor:
    """Whether the first of the completions `[questions, 4]` has the highest score; a tie is wrong."""
    return scores[:, 0] > scores[:, 1:].amax(-1)


def accuracy(right: Tensor, baseline: Tensor) -> dict:
    low, high = wilson_interval(right)
    difference = right.float() - baseline.float()
    difference_low, difference_high = paired_interval(difference)
    return {
        "accuracy": right.float().mean().item(),
        "interval": [low, high],
        "difference": difference.mean().item(),
        "difference_interval": [difference_low, difference_high],
    }


def plot(records: list[dict], path: Path) -> None:
    """Layer on x, accuracy on y, one line per treatment, for each text and score, with and without LN_out.

    Early exit, and the mask without a contrast, are diamonds beside the line.
    """
    matplotlib.use("agg")
    figure, axes = plt.subplots(4, 2, figsize=(12, 14), sharex=True, sharey=True, layout="constrained")
    for (i, (text, reduce)), (j, norm) in product(enumerate(product(TEXTS, ("mean", "sum"))), enumerate((True, False))):
        here = [record for record in records if record["text"] == text and record["score"] == reduce]
        baseline = next(record for record in here if record["decoding"] == "baseline")
        axis = axes[i, j]
        axis.plot(ROWS, [baseline["accuracy"]] * len(ROWS), alpha=0)  # the order of the categories
        axis.axhline(baseline["accuracy"], color="black", linestyle="--", label="baseline, 95% interval")
        axis.axhspan(*baseline["interval"], color="black", alpha=0.08)
        axis.axhline(0.25, color="grey", linewidth=0.8, linestyle=":", label="chance")
        for treatment in TREATMENTS:
            found = {
                record["decoding"]: record["accuracy"]
                for record in here
                if record.get("norm") is norm and record.get("treatment") == treatment
            }
            line = axis.plot(
                ROWS[1 : -len(EARLY_EXITS)],
                [found[row] for row in ROWS[1 : -len(EARLY_EXITS)]],
                marker="o",
                markersize=4,
                label=treatment,
            )
            for row in (ROWS[0], *ROWS[-len(EARLY_EXITS) :]):
                axis.plot(row, found[row], marker="D", markersize=5, color=line[0].get_color())
        axis.set_title(f"text {text}, {reduce} of log-probabilities, {'through' if norm else 'without'} LN_out")
        axis.tick_params(axis="x", rotation=60)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("contrast layer (the last is 30), or candidate layers of early exit")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, 4 choices")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("FACTOR expert set, SmolLM2-135M-Instruct")
    figure.savefig(path, dpi=110)


def to_markdown(records: list[dict], kept: Tensor, command: str) -> str:
    """The page: what was measured, and a table per text and readout with the interval of every accuracy."""
    kept_true, kept_false = kept[:, 0, 0].mean(), kept[:, 0, 1:].mean()
    lines = [
        f"""# FACTOR's expert set on SmolLM2-135M-Instruct

`{command}`

{len(kept)} questions, one true completion against three false ones. Accuracy in %, in brackets its 95% interval
(Wilson). `mean` and `sum` are over the log-probabilities of a completion's tokens. A star marks a difference from the
baseline whose 95% interval (paired bootstrap over questions) excludes 0. SmolLM2 has 30 layers.

At alpha 0.1 APC keeps {kept_true:.1%} of a true completion's tokens and {kept_false:.1%} of a false one's, and
what stands in for the others decides the score: {DROPPED:g} in `alpha 0.1`, the baseline's log q_N in the next
column. The last one scores as the DoLa paper's code does: normalised over the whole vocabulary, then {DROPPED:g}.
`no contrast` is q_N renormalised on the plausible tokens, the mask alone.

In this set most true completions end in a free-standing period (` .`) and few false ones do. The second text closes it
up in all of them.

![accuracy by layer](factor.png)"""
    ]
    for text, norm in product(TEXTS, (True, False)):
        here = [record for record in records if record["text"] == text]
        base = {record["score"]: record for record in here if record["decoding"] == "baseline"}
        columns = list(product(TREATMENTS, ("mean", "sum")))
        lines += [
            "",
            f"## Text {text}, layers read {'through' if norm else 'without'} LN_out",
            "",
            f"Baseline: mean {cell(base['mean'])}, sum {cell(base['sum'])}.",
            "",
            "| layer | " + " | ".join(f"{treatment}, {reduce}" for treatment, reduce in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        found = {
            (record["decoding"], record["treatment"], record["score"]): record
            for record in here
            if record.get("norm") is norm
        }
        for row in ROWS:
            lines.append(f"| {row} | " + " | ".join(cell(found[(row, *column)]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def cell(record: dict) -> str:
    low, high = record["difference_interval"]
    star = "*" if low > 0 or high < 0 else ""
    return f"{record['accuracy'] * 100:.1f}{star} ({record['interval'][0] * 100:.0f}-{record['interval'][1] * 100:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="FACTOR's expert set")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="folder of factor.md, factor.json and factor.png"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/factor"), help="one file per question: a killed run resumes"
    )
    args = parser.parse_args()
    questions = read_questions(args.csv)
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2()
    for i, (prefix, completions) in enumerate(tqdm(questions, desc="FACTOR", unit="question")):
        part = args.work / f"{i:03d}.pt"
        if not part.exists():
            torch.save(measure_question(model, tokenizer, prefix, completions), part.with_suffix(".part"))
            part.with_suffix(".part").rename(part)
    parts = [torch.load(args.work / f"{i:03d}.pt", weights_only=True) for i in range(len(questions))]
    measured = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    records = summarise(measured)
    args.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.factor {args.csv.name}"
    (args.out / "factor.md").write_text(to_markdown(records, measured["kept"], command), encoding="utf-8")
    (args.out / "factor.json").write_text(
        json.dumps({"command": command, "records": records}, indent=1) + "\n", encoding="utf-8"
    )
    plot(records, args.out / "factor.png")


if __name__ == "__main__":
    main()
