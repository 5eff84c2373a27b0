"""`python -m janus.dola.compare DIR` scores what `run_batch_prompts.py --compare` painted, and compares the decodings.

Found are tables, a plot, the prompts that gained and lost most, and all of it as JSON.
"""

if __name__ == "__main__":
    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from generation_inference import format_question
from janus.dola.cli import JANUS_TINY, CommandParser, add_model_arguments, run_command, run_settings
from janus.dola.compare.report import extremes, plot, tables
from janus.dola.compare.results import read_results
from janus.dola.compare.summary import compare, judge_choices
from janus.dola.files import RunLog, load_image, read_bytes, write_whole
from janus.dola.loading import load_pretrained_model
from janus.dola.painted import read_painted
from janus.dola.painting import PaintingRun
from janus.dola.scorers import Reader, Scorer, make_scorer, needs_model
from janus.dola.shards import LogState, ShardLog, gathered, open_patiently, parse_shard, share
from janus.dola.text_encoder import find_text_encoder

UNIT = 16
"""Prompts that are scored, and put into the log, at a time."""
OWN_FILES = ("compare.json", "compare.md", "compare.png", "extremes.png")


def read_result(text: str) -> tuple[str, Path]:
    variant, equals, path = text.partition("=")
    if not equals or not path:
        raise argparse.ArgumentTypeError(f"expected VARIANT=FILE, got {text!r}")
    return variant, Path(path)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m janus.dola.compare",
        description="Score a directory painted with --compare, and compare its decodings on the same prompts.",
    )
    add = parser.add_argument_group("files").add_argument
    add("directory", type=Path, metavar="DIR", help="painted by run_batch_prompts.py --compare baseline apc ...")
    help_results = "what GenEval, GenEval 2 or T2I-CompBench++ wrote of a variant's layout, as one more scorer"
    add("--results", action="append", default=[], type=read_result, metavar="VARIANT=FILE", help=help_results)
    add("--outdir", type=Path, help="where the scores and tables go (default: compare/ in DIR)")
    add("--overwrite", action="store_true", help="start anew where --outdir holds other scores (default: refuse)")
    add = parser.add_argument_group("scores").add_argument
    help_scorer = "caption, vqa, tower, each also as caption,layer=6, or module:function; again for more"
    add("--scorer", action="append", metavar="SPEC", help=f"{help_scorer} (default: caption)")
    add("--referee", metavar="SPEC", help="a scorer that judges the others' choices of the best image (default: none)")
    add("--by", metavar="COLUMN", help="split the prompts by this column of their file too (default: no)")
    add("--text_encoder", help="SiglipModel of the scorer tower: directory or hub id (default: siglip/ in the model)")
    help_shard = "score every Nth unit of prompts from I on; auto: torchrun's or a Slurm array's numbers (default: all)"
    add("--shard", type=parse_shard, metavar="I/N", help=help_shard)
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    return parser


def score_units(
    run: PaintingRun, scorers: Mapping[str, Scorer], log: RunLog | ShardLog, units: Mapping[int, int]
) -> None:
    """Score the prompts that the log lacks, unit by unit."""
    with tqdm(total=sum(units.values()), unit="prompt") as bar:
        for start, count in units.items():
            indices = range(start, start + count)
            if any(log.get(index) is None for index in indices) and log.claim(start):
                log.add(start, [{"index": index, "scores": score_prompt(run, index, scorers)} for index in indices])
            bar.update(count)


def score_prompt(run: PaintingRun, index: int, scorers: Mapping[str, Scorer]) -> dict[str, list[float]]:
    """Scorer -> the scores of a prompt's images that were kept, in the order of the manifest."""
    files = [run.file(position) for position in run.positions(index) if run.is_kept(position)]
    images = [load_image(run.log.directory / file) for file in files]
    return {spec: list(score(images, [run.prompts[index].text] * len(images))) for spec, score in scorers.items()}


def read_scores(run: PaintingRun, specs: Sequence[str], log: RunLog) -> dict[str, np.ndarray]:
    """Scorer -> `[prompts, variants, images]`, NaN for images that were not kept. Raises ValueError for another log."""
    scores = {spec: np.full((len(run.prompts), len(run.variants), run.parallel_size), np.nan) for spec in specs}
    for index, entry in enumerate(log.entries):
        first = run.positions(index).start
        kept = [position - first for position in run.positions(index) if run.is_kept(position)]
        try:
            for spec, of in scores.items():
                of[index].flat[kept] = np.array(entry["scores"][spec], float)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{log.path}: line {index + 1} is not what this comparison scores") from None
    return scores


def load_scorers(specs: Sequence[str], args: argparse.Namespace, run: PaintingRun) -> tuple[dict[str, Scorer], dict]:
    """The scorers, and where their numbers come from; the model is loaded where one of them needs it."""
    reader, settings = None, {}
    source = args.model or run.settings["model"]
    source = str(JANUS_TINY) if source == JANUS_TINY.name else source
    if any(map(needs_model, specs)):
        _, processor, model = load_pretrained_model(source, args.dtype, args.device, args.quantize, args.offload)
        reader = Reader(model, processor, partial(format_question, processor))
        settings = run_settings(argparse.Namespace(model=source), model) | {"text_encoder": args.text_encoder}
    texts = partial(find_text_encoder, source, args.text_encoder)
    return {spec: make_scorer(spec, reader, texts) for spec in specs}, settings


def mean_of_images(scores: np.ndarray) -> np.ndarray:
    """`[..., images]` to `[...]`, over those that have a score; NaN where none has."""
    there = ~np.isnan(scores)
    return np.where(there.any(-1), np.nansum(scores, -1) / np.maximum(there.sum(-1), 1), np.nan)


def main() -> None:
    args = build_parser().parse_args()
    specs = list(dict.fromkeys(args.scorer or ([] if args.results else ["caption"])))
    specs += [args.referee] if args.referee and args.referee not in specs else []
    for spec in specs:
        needs_model(spec)
    if find_spec("matplotlib") is None:  # the original code does not ask for it
        raise ValueError("the comparison draws its plot with matplotlib: pip install matplotlib")
    run = read_painted(args.directory)
    if unknown := [name for name, _ in args.results if name not in run.variants]:
        raise ValueError(f"--results: no variant {unknown[0]!r} in {args.directory} ({', '.join(run.variants)})")
    if args.referee and (run.parallel_size == 1 or not run.keep_all):
        raise ValueError("--referee: needs several images of each prompt, all kept (--keep_all)")
    if args.by and not any(args.by in prompt.fields for prompt in run.prompts):
        raise ValueError(f"--by: no prompt of {args.directory} has a column {args.by!r}")
    results = read_all_results(args.results, run)
    scorers, settings = load_scorers(specs, args, run)
    settings |= {"manifest_sha256": hashlib.sha256(read_bytes(run.log.path)).hexdigest(), "scorers": specs}
    open_log = partial(
        RunLog,
        (args.outdir or args.directory / "compare") / "scores.jsonl",
        settings,
        [prompt.text for prompt in run.prompts],
        is_own=lambda settings, inputs, name: name in OWN_FILES,
    )
    units = {start: min(UNIT, len(run.prompts) - start) for start in range(0, len(run.prompts), UNIT)}
    with open_patiently(partial(open_log, overwrite=args.overwrite)) as log:
        state = LogState(log.path, log.run, log.entries)
        if args.shard is None:
            score_units(run, scorers, log, units)
    if args.shard is not None:
        with ShardLog(state, mine := share(units, args.shard)) as shard_log:
            score_units(run, scorers, shard_log, mine)
    with gathered(open_log, units) as log:
        if log is not None:
            report(args, run, read_scores(run, specs, log) | results, log.directory)


def read_all_results(given: Sequence[tuple[str, Path]], run: PaintingRun) -> dict[str, np.ndarray]:
    """The results of benchmarks as one more scorer, where there are any."""
    if not given:
        return {}
    scores = np.full((len(run.prompts), len(run.variants), run.parallel_size), np.nan)
    texts = [prompt.text for prompt in run.prompts]
    for name, path in given:
        scores[:, list(run.variants).index(name)] = read_results(path, texts, run.parallel_size)
    return {"results": scores}


def report(args: argparse.Namespace, run: PaintingRun, scores: dict[str, np.ndarray], outdir: Path) -> None:
    """Tables on the terminal and in files, the plot, the sheet of extremes, the JSON."""
    columns = [str(prompt.fields.get(args.by, "")) for prompt in run.prompts] if args.by else None
    means = {spec: mean_of_images(of) for spec, of in scores.items()}
    found: dict[str, Any] = {
        "variants": run.variants,
        "images": run.parallel_size,
        "by": args.by,
        "scorers": {spec: compare(run.variants, of, columns) for spec, of in means.items()},
    }
    if args.referee:
        scored = {spec: of for spec, of in scores.items() if spec != "results"}
        found |= {"referee": args.referee, "choices": judge_choices(run.variants, scored, args.referee)}
    shown = extremes(run, next(iter(means.values())), outdir / "extremes.png")
    text = tables(found, run.labels)
    print(text)
    write_whole(outdir / "compare.md", lambda path: path.write_text(text, encoding="utf-8"))
    content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_whole(outdir / "compare.json", lambda path: path.write_text(content, encoding="utf-8"))
    plot(found, run.labels, outdir / "compare.png")
    print(f"compare.md, compare.json, compare.png{', extremes.png' if shown else ''}: {outdir}")


if __name__ == "__main__":
    run_command(main)
