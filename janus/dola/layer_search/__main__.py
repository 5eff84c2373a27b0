"""`python -m janus.dola.layer_search image --data pairs.jsonl --outdir found` searches the layer for painting.

`answers` and `tower` do it for lm_head and for SigLIP. Found are a table, a curve, and the switches that every command
reads with `--config`.
"""

if __name__ == "__main__":
    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dola_runtime import check_alpha, check_cfg_weight
from generation_inference import (
    Decoding,
    default_sampling,
    format_image_prompt,
    format_question,
    pack_prompts,
    sample_image_tokens,
    tokens_to_images,
)
from janus.dola.cli import CommandParser, add_model_arguments, parse_layers, positive, run_command, run_settings
from janus.dola.compare.report import points as score_points
from janus.dola.files import RunLog
from janus.dola.layer_search.examples import FIELDS, Example, read_examples, texts_of
from janus.dola.layer_search.metrics import ALPHAS, metric_names, search, summarise
from janus.dola.layer_search.report import (
    MEANS,
    Decision,
    decide,
    decide_all,
    explain,
    plot,
    table,
    update_switches,
    write_json,
)
from janus.dola.layer_search.survivors import judge, pick_survivors, score_painted, variants_of
from janus.dola.layer_search.tasks import answers_task, image_task, tower_task
from janus.dola.loading import load_pretrained_model
from janus.dola.painting import prompt_seed
from janus.dola.scorers import Reader, make_scorer, needs_model
from janus.dola.switches import DoLaSwitches
from janus.dola.text_encoder import find_text_encoder

OWN_FILES = r"layer_search\.(json|png)|explain\.md|explain/[0-9]{5,}\.png"

WEIGHT_VALUES = 64
"""How many values of each weight a fingerprint takes: training moves them all."""


def parse_alphas(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected alphas like 0.05,0.1,0.2, got {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m janus.dola.layer_search",
        description="Find the contrast layer on a validation set: all layers from one forward pass per example.",
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
        add("--no_norm", action="store_true", help="read contrast layers without the final norm (default: with it)")
        add("--alphas", type=parse_alphas, default=list(ALPHAS), help="APC thresholds (default: 0.02,0.05,0.1,0.2,0.5)")
        if task == "image":
            add("--cfg_weight", type=float, help="guidance, at least 0 (default: the checkpoint's own, else 5)")
            help_paint = (
                "paint with the K best, the baseline and APC only, and decide by that (default: by given tokens)"
            )
            add("--paint", type=positive, metavar="K", help=help_paint)
            help_scorer = "of painted images: caption, vqa, tower or module:function (default: %(default)s)"
            add("--scorer", default="caption", metavar="SPEC", help=help_scorer)
            add("--samples", type=positive, default=4, help="images of a prompt for --paint (default: %(default)s)")
        add("--domain_field", metavar="NAME", help="a field that names each line's domain: a layer for each")
        add("--explain", type=positive, metavar="N", help="write explain.md: N examples made right, N made wrong")
        add("--batch_size", type=positive, default=16, help="examples in one forward pass (default: %(default)s)")
        add_model_arguments(one)
    return parser


def encode_prompts(processor, device: torch.device, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    return pack_prompts(processor, [format_image_prompt(processor, text) for text in texts], device)


def hash_images(examples: Sequence[Example]) -> str:
    """A sha256 of the content of all images, in order."""
    digest = hashlib.sha256()
    for example in examples:
        if "image" in example:
            digest.update(hashlib.sha256(example["image"].read_bytes()).digest())
    return digest.hexdigest()


def fingerprint(model: nn.Module, *readers: object) -> str:
    """A sha256 of some values of every weight and of what reads its inputs: another checkpoint of this name differs."""
    digest = hashlib.sha256(repr(readers).encode())
    for name, weight in model.state_dict().items():
        some = getattr(weight, "qdata", weight).flatten()[:: 1 + weight.numel() // WEIGHT_VALUES]
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def paint_survivors(
    args: argparse.Namespace, processor, model, summary: dict[str, Any], examples: Sequence[Example], settings: dict
) -> dict[str | None, Decision]:
    """The prompts painted with what teacher forcing found best, and what their scores decide, by domain too."""
    survivors = pick_survivors(summary, args.paint)
    shared = {
        "norm": settings["norm"],
        **default_sampling(model, settings["cfg_weight"]),
        "cfg_order": "guide_first",
    }
    variants = variants_of(survivors, shared)
    domain_of = {example["prompt"]: example.get("domain") for example in examples}
    texts = list(domain_of)

    def paint(prompts: Sequence[str], fields: Mapping[str, Any]) -> list[list[Image.Image]]:
        rendered = [format_image_prompt(processor, text) for text in prompts]
        seeds = [prompt_seed(0, text) for text in prompts]
        decoding = Decoding(**{**fields, "layers": tuple(fields["layers"])})
        tokens = sample_image_tokens(model, processor, rendered, decoding, parallel_size=args.samples, seeds=seeds)
        return [tokens_to_images(model, of_prompt) for of_prompt in tokens]

    reader = Reader(model, processor, partial(format_question, processor))
    scorer = make_scorer(args.scorer, reader, partial(find_text_encoder, args.model, None))
    painted = {"variants": variants, "scorer": args.scorer, "samples": args.samples}
    with RunLog(args.outdir / "painted" / "scores.jsonl", settings | painted, texts, overwrite=args.overwrite) as log:
        scores = score_painted(texts, variants, paint, scorer, args.batch_size, log)
    decisions = {}
    for name in (None, *summary.get("domains", {})):
        among = [i for i, text in enumerate(texts) if name in (None, domain_of[text])]
        measured = f"{len(among)} prompts painted, scored by {args.scorer}"
        decisions[name] = decide(judge(variants, scores[among]), measured, score_points)
    return decisions


def main() -> None:
    args = build_parser().parse_args()
    if args.offload:
        raise ValueError("--offload: a layer search reads all weights, to tell another checkpoint of this name")
    if args.task == "image":
        needs_model(args.scorer)
    if find_spec("matplotlib") is None:  # the original code does not ask for it
        raise ValueError("the layer search draws its curve with matplotlib: pip install matplotlib")
    for alpha in args.alphas:
        check_alpha(alpha)
    if args.switches and args.switches.exists():
        DoLaSwitches.from_json(args.switches)
    if args.task == "image" and args.cfg_weight is not None:
        check_cfg_weight(args.cfg_weight)
    examples, norm = read_examples(args.data, args.task, args.domain_field), not args.no_norm
    settings: dict[str, Any] = {
        "task": args.task,
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "images_sha256": hash_images(examples),
        "alphas": args.alphas,
        "batch_size": args.batch_size,
        "norm": norm,
    }
    tokenizer, processor, model = load_pretrained_model(
        args.model, args.dtype, args.device, args.quantize, args.offload
    )
    settings |= run_settings(args, model)
    texts = texts_of(examples)
    settings["model_sha256"] = fingerprint(model, tokenizer(texts)["input_ids"], vars(processor.image_processor))
    if args.task == "image":
        settings["cfg_weight"] = default_sampling(model, args.cfg_weight)["cfg_weight"]
        encode = partial(encode_prompts, processor, model.device)
        task = image_task(model, processor, settings["cfg_weight"], encode, norm)
    elif args.task == "answers":
        task = answers_task(model, processor, partial(format_question, processor), norm)
    else:
        siglip, tokenizer = find_text_encoder(args.model, args.text_encoder)
        settings["text_encoder"] = args.text_encoder or "siglip/ of the model"
        settings["text_encoder_sha256"] = fingerprint(siglip, tokenizer(texts)["input_ids"])
        vit = model.vision_model.vision_tower
        task = tower_task(vit, processor.image_processor, siglip, tokenizer, examples, norm)
    settings["layers"] = sorted(set(args.layers or range(1, task.num_layers)))
    if outside := [layer for layer in settings["layers"] if not 1 <= layer < task.num_layers]:
        raise ValueError(f"--layers: a contrast layer is in 1..{task.num_layers - 1}, got {outside[0]}")

    with RunLog(
        args.outdir / "layer_search.jsonl",
        settings,
        overwrite=args.overwrite,
        folders=lambda settings: ["explain"],
        is_own=lambda settings, inputs, name: re.fullmatch(OWN_FILES, name) is not None,
    ) as log:
        values = search(task, examples, settings["layers"], args.alphas, args.batch_size, log)
        domains = [example["domain"] for example in examples] if args.domain_field else None
        summary = summarise(values, metric_names(examples), task.num_layers, settings["layers"], args.alphas, domains)
        print(table(summary))
        write_json(args.outdir / "layer_search.json", settings | summary)
        plot(summary, f"{args.task}: {Path(settings['model']).name}", args.outdir / "layer_search.png")
        switches = args.switches or args.outdir / "switches.json"
        decisions = decide_all(summary, MEANS[summary["metric"]])
        if args.task == "image" and args.paint:
            decisions = paint_survivors(args, processor, model, summary, examples, settings)
            for name, decision in decisions.items():
                print(f"{name or 'Painted'}: {decision.why}.")
        update_switches(switches, args.task, decisions)
        written = ["layer_search.json", "layer_search.png"]
        if args.explain:
            explain(task, examples, values, summary, args.explain, args.outdir)
            written.append("explain.md")
        print(f"\n{', '.join(written)}: {args.outdir}\nswitches: {switches}")


if __name__ == "__main__":
    run_command(main)
