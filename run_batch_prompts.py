"""Prompts to images, with DoLa or without, or any decodings side by side."""

if __name__ == "__main__":
    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dola_runtime import (
    DEFAULT_LAYER_RATIO,
    check_alpha,
    check_cfg_weight,
    check_gamma,
    check_temperature,
    pick_contrast_layers,
)
from generation_inference import (
    Decoding,
    Draft,
    Record,
    default_sampling,
    format_image_prompt,
    format_question,
    num_image_tokens,
    sample_image_tokens,
    tokens_to_images,
)
from janus.dola import static_backbone
from janus.dola.cli import (
    JANUS_TINY,
    CommandParser,
    Progress,
    add_dola_arguments,
    add_model_arguments,
    positive,
    run_command,
    run_settings,
)
from janus.dola.files import RunLog, read_json_file
from janus.dola.layouts import LAYOUTS, check_layout, write_layout
from janus.dola.loading import load_pretrained_model
from janus.dola.memory import free_cached_memory, free_memory, is_out_of_memory
from janus.dola.painting import (
    IMAGE_SETTINGS,
    PaintingRun,
    check_batch_size,
    cut_batch,
    image_hash,
    is_batch_sizes,
    is_run_file,
    prompt_seed,
    variant_folders,
)
from janus.dola.pictures import read_settings, save_image
from janus.dola.prompt_files import Prompt, read_prompts
from janus.dola.scorers import Reader, Scorer, make_scorer, needs_model
from janus.dola.shards import (
    UNITS,
    LogState,
    ShardLog,
    gathered,
    open_patiently,
    parse_shard,
    put_away,
    share,
    unfinished,
)
from janus.dola.switches import DoLaSwitches
from janus.dola.text_encoder import find_text_encoder
from janus.dola.variants import LAYER_KEYWORDS, fill_variant, parse_variants

EXAMPLE_PROMPTS = Path(__file__).parent / "examples" / "prompt.json"
MAX_IMAGES_PER_BATCH = {"cpu": 64, "cuda": 256}
TRACED = 5
"""How many of the most probable tokens a trace tells."""

# --- within memory ---------------------------------------------------------------------------------------------------


def images_per_batch(model, num_layers_read: int, prompt_length: int, num_tokens: int, window: int) -> int:
    """How many images fit into 0.7 of the free memory, each with two rows of cache and of logits, and with noise."""
    llama, device = model.language_model.config, model.language_model.get_input_embeddings().weight.device
    bytes_per_value = model.language_model.get_input_embeddings().weight.element_size()
    head_dim = llama.hidden_size // llama.num_attention_heads
    max_length = prompt_length + num_tokens + window
    cache = 2 * 2 * llama.num_hidden_layers * llama.num_key_value_heads * head_dim * max_length * bytes_per_value
    logits = 2 * 4 * 4 * num_layers_read * window * model.gen_embed.weight.shape[0]
    noise = 4 * model.gen_embed.weight.shape[0] * (num_tokens if window > 1 else 1)
    most = int(0.7 * free_memory(device) / (cache + logits + noise))
    return max(1, min(MAX_IMAGES_PER_BATCH.get(device.type, 64), most))


def decode_within_memory(model, tokens: Tensor) -> list[Image.Image]:
    """`tokens_to_images`, halving the codes where memory runs out."""
    try:
        return tokens_to_images(model, tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(tokens) == 1:
            raise
    free_cached_memory()
    halves = tokens.tensor_split(2)
    return [image for half in halves for image in decode_within_memory(model, half)]


# --- painting --------------------------------------------------------------------------------------------------------

Sampled = tuple[Tensor, dict[str, np.ndarray]]
"""Tokens `[prompts, samples, T]` of one variant, and what was recorded of them, each `[prompts, samples, T, ...]`."""


def sample_slices(parallel_size: int, images: int) -> list[slice]:
    """A prompt's samples, so many at a time."""
    return [slice(first, min(first + images, parallel_size)) for first in range(0, parallel_size, images)]


def sample_variant(
    run: PaintingRun,
    model,
    processor,
    batch: range,
    images: int,
    decoding: Decoding,
    tell: Callable[[int, str], None],
    watch: Callable[[Draft], None] | None = None,
) -> Sampled:
    """A batch's prompts under one decoding, so many images of each at a time.

    After each pass `tell` is called with the number of tokens made and a note, and `watch` with the tokens themselves.
    """
    prompts = [format_image_prompt(processor, run.prompts[index].text) for index in batch]
    tokens, told = [], []
    for samples in sample_slices(run.parallel_size, images):
        count = len(batch) * (samples.stop - samples.start)
        record = Record(count, num_image_tokens(model, processor), TRACED if run.trace else 0)
        made: list[int] = []

        def on_step(tokens: int, made=made, count=count) -> None:
            made.append(tokens)
            tell(tokens, f"{sum(made) / count / len(made):.1f} tokens per pass")

        tokens.append(
            sample_image_tokens(
                model,
                processor,
                prompts,
                decoding,
                parallel_size=run.parallel_size,
                seeds=[run.prompt_seed(index) for index in batch],
                samples=samples,
                window=run.settings["window"],
                record=record if run.trace or decoding != decoding.baseline else None,
                on_step=on_step,
                watch=watch,
            )
        )
        values = record.values | {"passes": torch.full((count,), len(made))}
        told.append({k: v.unflatten(0, (len(batch), -1)).cpu() for k, v in values.items()})
    whole = {name: torch.cat([part[name] for part in told], dim=1).numpy() for name in told[0]}
    return torch.cat(tokens, dim=1), whole


def decode_and_write(
    run: PaintingRun,
    model,
    batch: range,
    sampled: Sequence[Sampled],
    ready: Any,
    scorer: Scorer | None,
) -> None:
    """Tokens of a batch under every variant to pixels and files; without a scorer beside the next batch's decoding.

    Each prompt's images under a variant become pixels together, whatever else is in the batch. `ready` is the event
    after which the tokens are there.
    """
    with static_backbone.beside_decoding(sampled[0][0].device, ready):
        tokens = torch.cat([tokens for tokens, _ in sampled], dim=1).cpu()
        images = [
            [image for of_variant, _ in sampled for image in decode_within_memory(model, of_variant[p])]
            for p in range(len(batch))
        ]
    told = [
        [{k: v[p, s] for k, v in values.items()} for _, values in sampled for s in range(run.parallel_size)]
        for p in range(len(batch))
    ]
    scores = []
    if scorer is not None:
        prompts = [run.prompts[index].text for index in batch for _ in range(run.images_per_prompt)]
        scores = scorer([image for of_prompt in images for image in of_prompt], prompts)
    run.write(batch, images, tokens.numpy(), told, scores)


def paint(
    run: PaintingRun, model, processor, decodings: Mapping[str, Decoding], scorer: Scorer | None = None
) -> dict[str, float]:
    """Make what is still to do; returns the seconds of sampling by variant."""
    for index in run.indices:
        if index not in run.todo:
            run.write_sheets(index, lost_only=True)
    tokens_per_prompt = run.images_per_prompt * num_image_tokens(model, processor)
    done = len(run.indices) - len(run.todo)
    seconds = dict.fromkeys(decodings, 0.0)
    pending: Future | None = None
    with (
        Progress(len(run.indices) * tokens_per_prompt, done * tokens_per_prompt, "token") as progress,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        start = 0
        while start < len(run.prompts):
            batch, images = run.batch(start)
            start = batch.stop
            if run.todo.isdisjoint(batch) or not run.log.claim(run.positions(batch.start).start):
                continue
            sampled, before = [], progress.done
            try:
                for name, decoding in decodings.items():
                    started = time.perf_counter()
                    sampled.append(sample_variant(run, model, processor, batch, images, decoding, progress.add))
                    seconds[name] += time.perf_counter() - started
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) * images == 1:
                    raise
                progress.add(before - progress.done)
                start = batch.start
            if start == batch.start:  # outside of the handler, which would keep what the batch had allocated
                free_cached_memory()
                run.halve(batch, images)
                continue
            progress.add((len(run.todo.intersection(batch)) - len(batch)) * tokens_per_prompt)  # repaired, not new
            if pending is not None:
                pending.result()
            device = sampled[0][0].device
            ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            pending = writer.submit(decode_and_write, run, model, batch, sampled, ready, scorer)
            if scorer is not None:  # it reads with the model that decodes
                pending.result()
        if pending is not None:
            pending.result()
    return seconds


# --- the command -----------------------------------------------------------------------------------------------------


COMPARE = (
    "any decodings from the same noise: baseline, apc, dola, or key=value,... of layer, ratio, exit, alpha, gamma, "
    "norm, order, cfg, temperature, as in --compare apc layer=6 exit=2,4,6 layer=4,alpha=0.5 (default: DoLa alone)"
)


SCORERS = (
    "what is best: caption (the prompt as Janus's answer to what it sees), vqa (Janus's yes to whether it is shown), "
    "tower (its SigLIP's cosine), each also with DoLa in its reading as caption,layer=6, or module:function"
)


def build_parser() -> CommandParser:
    parser = CommandParser(description="Paint prompts with Janus, with DoLa unless --no_dola.")
    what = parser.add_argument_group("prompts").add_mutually_exclusive_group().add_argument
    what("--prompt", action="append", metavar="TEXT", help="what to paint, once or more often (default: a file)")
    what(
        "--prompt_json", metavar="FILE", help="prompts as .json, .jsonl, .txt, .csv or .tsv (default: twelve examples)"
    )
    what("--show", type=Path, metavar="IMAGE", help="print what made an image of this command (default: paint)")
    what("--again", type=Path, metavar="IMAGE", help="paint an image of this command again (default: prompts)")
    add = parser.add_argument_group("files").add_argument
    add("--max_prompts", type=positive, help="only the first so many prompts (default: all)")
    add("--outdir", type=Path, default="outputs", help="where images and manifest.jsonl go (default: %(default)s)")
    add("--format", choices=("jpg", "png"), default="jpg", help="image format (default: %(default)s)")
    add("--trace", action="store_true", help="also write what DoLa did at every token, and a map of it (default: no)")
    add("--layout", choices=tuple(LAYOUTS), help="also lay the images out as a benchmark reads them (default: do not)")
    add("--overwrite", action="store_true", help="start anew where --outdir holds another run (default: refuse)")
    add_model_arguments(parser)
    add_dola_arguments(parser, "by --layer_ratio, 0.8")
    add = parser.add_argument_group("which decodings").add_mutually_exclusive_group().add_argument
    add("--no_dola", action="store_true", help="the baseline: sample from the last layer itself (default: DoLa)")
    add(
        "--ab",
        action="store_true",
        help="baseline and DoLa from the same noise: --compare baseline dola (default: DoLa)",
    )
    add("--compare", nargs="+", metavar="SPEC", help=COMPARE)
    group = parser.add_argument_group("sampling")
    add, samples = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add(
        "--cfg_order",
        choices=("guide_first", "contrast_first"),
        default="guide_first",
        help="guide the layers, then contrast them, or the other way round (default: %(default)s)",
    )
    samples("--parallel_size", type=positive, default=4, help="images per prompt (default: %(default)s)")
    samples("--best_of", type=positive, metavar="N", help="paint N images per prompt and keep the best (default: all)")
    add("--cfg_weight", type=float, help="guidance, at least 0 (default: the checkpoint's own, else 5)")
    add("--temperature", type=float, help="above 0 (default: the checkpoint's own, else 1)")
    add("--seed", type=int, default=0, help="with the prompt, gives each prompt's own seed (default: %(default)s)")
    add = parser.add_argument_group("with --best_of").add_argument
    add("--scorer", metavar="SPEC", help=f"{SCORERS} (default: caption)")
    add("--keep_all", action="store_true", help="keep the others too, the best one marked (default: the best alone)")
    add("--text_encoder", help="SiglipModel of the scorer tower: directory or hub id (default: siglip/ in --model)")
    group = parser.add_argument_group("several processes at one run, to the same bytes")
    either = group.add_mutually_exclusive_group().add_argument
    help_shard = "every Nth unit from I on; auto: torchrun's or a Slurm array's numbers (default: all)"
    either("--shard", type=parse_shard, metavar="I/N", help=help_shard)
    help_ray = "let Ray share the units out, on this cluster (default: no; without ADDRESS: a local one)"
    either("--ray", nargs="?", const="", metavar="ADDRESS", help=help_ray)
    group.add_argument("--workers", type=positive, help="actors of --ray (default: one for each GPU, else one)")
    add = parser.add_argument_group("speed").add_argument
    add("--batch_size", type=positive, help="images decoded together (default: by the free memory)")
    add("--window", type=positive, help="tokens of an image per pass, to the same tokens (default: what measured best)")
    add("--no_graphs", action="store_true", help="on CUDA, do not capture steps as graphs (default: capture)")
    add("--compile", action="store_true", help="compile passes with torch.compile, a minute once (default: do not)")
    return parser


def read_variants(parser: CommandParser, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> how to decode, in the keywords of `make_decoding`, from flags, --config and specs, numbers checked."""
    if args.domain and not args.config:
        parser.error("--domain needs --config")
    switches = DoLaSwitches.from_json(args.config, args.domain) if args.config else DoLaSwitches()
    usual: dict[str, Any] = {name: getattr(args, name) for name in LAYER_KEYWORDS}
    on = args.gamma is not None or any(value is not None for value in usual.values())
    if not any(value is not None for value in usual.values()):
        usual["layer"] = switches.fixed_layer_gen
    usual |= {
        "alpha": switches.alpha_gen if args.alpha is None else args.alpha,
        "gamma": switches.gamma_gen if args.gamma is None else args.gamma,
        "norm": not args.no_norm,
        "cfg_order": args.cfg_order,
        "cfg_weight": args.cfg_weight,
        "temperature": args.temperature,
    }
    single = "dola" if on or switches.use_dola_gen_static else "baseline"
    specs = ["baseline", "dola"] if args.ab else args.compare or ["baseline" if args.no_dola else single]
    variants = {}
    for name, own in parse_variants(specs).items():
        variants[name] = fill_variant(own, usual)
        check_alpha(variants[name]["alpha"])
        check_gamma(variants[name]["gamma"])
        for key, check in (("temperature", check_temperature), ("cfg_weight", check_cfg_weight)):
            if variants[name][key] is not None:
                check(variants[name][key])
    return variants


def read_scorer(parser: CommandParser, args: argparse.Namespace) -> dict[str, Any] | None:
    """What a run's settings say of the scorer; None without one."""
    if args.best_of is None:
        for option in ("scorer", "keep_all", "text_encoder"):
            if getattr(args, option):
                parser.error(f"--{option} needs --best_of")
        return None
    spec = args.scorer or "caption"
    needs_model(spec)
    return {"spec": spec, "text_encoder": args.text_encoder}


def make_decoding(model, *, use_dola: bool = True, cfg_weight=None, temperature=None, **values: Any) -> Decoding:
    """The decoding of a variant; the checkpoint's own sampling where it names none, no layers where none is read."""
    layers = pick_contrast_layers(
        len(model.language_model.model.layers),
        values.pop("layer", None),
        DEFAULT_LAYER_RATIO if (ratio := values.pop("layer_ratio", None)) is None else ratio,
        values.pop("candidate_layers", None),
    )
    sampling = default_sampling(model, cfg_weight, temperature)
    decoding = Decoding(layers if values["gamma"] != 0 else (), **sampling, **values)
    return decoding if use_dola else decoding.baseline


class Job(NamedTuple):
    """What a command line asks for, and the model that does it."""

    args: argparse.Namespace
    prompts: list[Prompt]
    settings: dict[str, Any]
    model: Any
    processor: Any
    decodings: dict[str, Decoding]
    scorer: Scorer | None

    def open(self) -> RunLog:
        return RunLog(
            self.args.outdir / "manifest.jsonl",
            self.settings,
            [prompt.text for prompt in self.prompts],
            overwrite=self.args.overwrite,
            folders=variant_folders,
            is_own=is_run_file,
        )

    def start(self, log: RunLog) -> None:
        """Check what the run's record says, and put the images per batch into it where it has none."""
        run = PaintingRun(log, self.prompts, indices=())
        check_batch_size(log, self.args.batch_size)
        if self.args.layout:
            check_layout(run, self.args.layout)
        if "batch_sizes" not in log.run:
            run.choose_batch_size(self.args.batch_size or self.fitting_batch_size())
        batch, images = run.batch(0)
        print(f"batches of {len(batch)} prompts x {images} images")

    def fitting_batch_size(self) -> int:
        encode = self.processor.tokenizer.encode
        longest = max(len(encode(format_image_prompt(self.processor, prompt.text))) for prompt in self.prompts)
        layers_read = 1 + max(len(decoding.layers) for decoding in self.decodings.values())
        num_tokens = num_image_tokens(self.model, self.processor)
        return images_per_batch(self.model, layers_read, longest, num_tokens, self.args.window or 1)

    def paint(self, run: PaintingRun) -> None:
        seconds = paint(run, self.model, self.processor, self.decodings, self.scorer)
        print(f"{len(run.todo)} prompts painted ({len(run.indices) - len(run.todo)} were done already)")
        for name, spent in seconds.items():
            rate = f", {len(run.todo) * run.parallel_size / spent:.2f} images/s" if run.todo else ""
            print(f"  {name}: {run.labels[name]}{rate}")

    def finish(self, run: PaintingRun) -> None:
        """What is made of all images together."""
        if run.folders:
            pages = run.write_contact_sheets()
            first, last = run.log.directory / pages[0], f" to {pages[-1]}" if len(pages) > 1 else ""
            print(f"contact sheet: {first}{last}")
        if self.args.layout:
            print(f"layout {self.args.layout}: {write_layout(run, self.args.layout)}")
        print(f"images and manifest.jsonl: {run.log.directory}")


def painting_settings(
    args: argparse.Namespace, model, scorer: Mapping[str, str | None] | None, decodings: Mapping[str, Decoding]
) -> dict[str, Any]:
    """What run.json says of a run: all that its files follow from beside the prompts."""
    return run_settings(args, model) | {
        "parallel_size": args.best_of or args.parallel_size,
        "scorer": scorer,
        "keep_all": args.best_of is None or args.keep_all,
        "seed": args.seed,
        "format": args.format,
        "trace": args.trace,
        "window": args.window,
        "variants": {name: asdict(decoding) for name, decoding in decodings.items()},
    }


def load_job(parser: CommandParser, args: argparse.Namespace) -> Job:
    variants = read_variants(parser, args)
    if args.prompt:
        for text in args.prompt:
            if not text.strip():
                parser.error("--prompt: the prompt is blank")
        prompts = [Prompt(text) for text in args.prompt][: args.max_prompts]
    else:
        prompts = read_prompts(args.prompt_json or EXAMPLE_PROMPTS, args.max_prompts)
    scorer = read_scorer(parser, args)
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device, args.quantize, args.offload)
    decodings = {name: make_decoding(model, **values) for name, values in variants.items()}
    settings = painting_settings(args, model, scorer, decodings)
    score = None
    if scorer is not None:
        reader = Reader(model, processor, partial(format_question, processor))
        score = make_scorer(scorer["spec"], reader, partial(find_text_encoder, args.model, args.text_encoder))
    return Job(args, prompts, settings, model, processor, decodings, score)


def paint_prompts(parser: CommandParser, args: argparse.Namespace) -> None:
    if args.overwrite and args.shard:
        parser.error("--overwrite would delete what other shards make: delete the directory first")
    shared = args.shard or args.ray is not None or ((args.outdir / UNITS).is_dir() and not args.overwrite)
    job = load_job(parser, args)
    if shared:
        return paint_units(job)
    with job.open() as log:
        put_away(log.directory)
        job.start(log)
        run = PaintingRun(log, job.prompts)
        job.paint(run)
        job.finish(run)


# --- several processes at one run ------------------------------------------------------------------------------------


def paint_units(job: Job) -> None:
    """This process's share of the units, and all that follows where it finds all of them done."""
    with open_patiently(job.open) as log:
        if job.args.overwrite:
            put_away(log.directory)
        job.start(log)
        units = PaintingRun(log, job.prompts, indices=()).units()
    state = LogState(log.path.resolve(), log.run, log.entries)
    if job.args.ray is None:
        paint_some(job, state, share(units, job.args.shard))
    else:
        paint_with_ray(job, state, units)
    job.args.overwrite = False  # done
    with gathered(job.open, units) as log:
        if log is not None:
            run = PaintingRun(log, job.prompts)
            if run.todo:
                job.paint(run)
            job.finish(run)


def paint_some(job: Job, state: LogState, units: Mapping[int, int]) -> None:
    with ShardLog(state, units) as log:
        per_prompt = len(job.decodings) * job.settings["parallel_size"]
        indices = [i for s, n in units.items() for i in range(s // per_prompt, (s + n) // per_prompt)]
        job.paint(PaintingRun(log, job.prompts, indices))


class UnitPainter:
    """A Ray actor: loads the model once, and paints the units that it is given of the run whose log has this path."""

    def __init__(self, arguments: Sequence[str], threads: int, path: Path):
        torch.set_num_threads(threads)
        parser = build_parser()
        args = parser.parse_args(arguments)
        set_speed(args)
        self.job, self.state = load_job(parser, args), LogState(path, read_json_file(path.with_name("run.json")), ())

    def paint(self, start: int, count: int) -> None:
        paint_some(self.job, self.state, {start: count})


def paint_with_ray(job: Job, state: LogState, units: Mapping[int, int]) -> None:
    """All units, by one actor for each GPU, or `--workers`; Ray restarts an actor that is lost, and its unit.

    Raises ValueError for what an actor could not do.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool
    except ImportError:
        raise ValueError("--ray needs Ray: pip install ray") from None
    if job.args.ray:
        ray.init(address=job.args.ray, log_to_driver=False)
    else:  # an actor takes one CPU, and waits for ever where there is none left
        cpus = max(os.cpu_count() or 1, job.args.workers or 1)
        ray.init(address="local", num_cpus=cpus, log_to_driver=False, include_dashboard=False)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1)(UnitPainter)
        arguments = [*sys.argv[1:], "--device", "cuda"] if gpus and job.args.device == "auto" else sys.argv[1:]
        workers = job.args.workers or max(1, gpus)
        pool = ActorPool([actor.remote(arguments, torch.get_num_threads(), state.path) for _ in range(workers)])
        left = unfinished(state.path.parent, units, len(state.entries))
        with Progress(len(units), len(units) - len(left), "unit") as progress:
            while left:
                for _ in pool.map_unordered(lambda a, start: a.paint.remote(start, units[start]), left):
                    progress.add(1)
                again = unfinished(state.path.parent, units, len(state.entries))
                progress.add(-len(again))
                if again == left:
                    time.sleep(1)  # their locks are those of a machine that is gone, and grow stale
                left = again
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.shutdown()


def find_batch(settings: Mapping[str, Any], path: Path) -> tuple[list[str], int, int]:
    """The prompts that an image was decoded with, which of them is its own, and how many images of each at a time.

    They are in its directory's run.json; in float32, and where there is none, its prompt alone will do.
    """
    alone = [settings["prompt"]], 0, settings["parallel_size"]
    run_file = next((f for f in (path.parent / "run.json", path.parent.parent / "run.json") if f.is_file()), None)
    if settings["dtype"] == "float32" or run_file is None:
        return alone
    run = read_json_file(run_file)
    prompts, sizes = (run.get(key, ()) if isinstance(run, dict) else () for key in ("inputs", "batch_sizes"))
    if not isinstance(prompts, list) or not is_batch_sizes(sizes):
        raise ValueError(f"{run_file}: describes no painting run")
    start = 0
    while start < len(prompts):
        batch, images = cut_batch(sizes, settings["parallel_size"], len(prompts), start)
        if settings["index"] in batch and prompts[settings["index"]] == settings["prompt"]:
            return [prompts[i] for i in batch], settings["index"] - batch.start, images
        start = batch.stop
    return alone


def paint_again(args: argparse.Namespace) -> None:
    settings = read_settings(args.again)
    for key, kind in IMAGE_SETTINGS.items():
        if type(settings.get(key)) is not kind:
            raise ValueError(f"{args.again}: its settings: expected {key} of type {kind.__name__}")
    if not 0 <= settings["image"] < settings["parallel_size"]:
        raise ValueError(f"{args.again}: its settings: image {settings['image']} of {settings['parallel_size']}")
    try:
        values = settings["decoding"]
        decoding = Decoding(**values | {"layers": tuple(values["layers"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{args.again}: its decoding: {error}") from None
    target = args.outdir / args.again.name
    if target.exists():
        raise ValueError(f"{target} exists: choose another --outdir")
    model_given = args.model != str(JANUS_TINY) or settings["model"] == JANUS_TINY.name
    source = args.model if model_given else settings["model"]
    quantize = settings.get("quantize")
    _, processor, model = load_pretrained_model(source, settings["dtype"], args.device, quantize, args.offload)
    prompts, row, images = find_batch(settings, args.again)
    size = settings["parallel_size"]
    rendered = [format_image_prompt(processor, prompt) for prompt in prompts]
    seeds = [prompt_seed(settings["run_seed"], prompt) for prompt in prompts]
    parts = [
        sample_image_tokens(
            model,
            processor,
            rendered,
            decoding,
            parallel_size=size,
            seeds=seeds,
            samples=samples,
            window=settings.get("window"),
        )[row]
        for samples in sample_slices(size, images)
    ]
    tokens = torch.cat(parts)
    args.outdir.mkdir(parents=True, exist_ok=True)
    tokens_sha256 = image_hash(tokens[settings["image"]].cpu().numpy())
    image = tokens_to_images(model, tokens)[settings["image"]]
    save_image(image, target, settings | {"tokens_sha256": tokens_sha256})
    same = tokens_sha256 == settings["tokens_sha256"]
    print(f"{target}: {'the same tokens' if same else 'other tokens, as another machine or batch can give'}")


def set_speed(args: argparse.Namespace) -> None:
    static_backbone.use_graphs = not args.no_graphs
    static_backbone.use_compile = args.compile


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    set_speed(args)
    if args.show:
        print(json.dumps(read_settings(args.show), indent=1, ensure_ascii=False))
    elif args.again:
        paint_again(args)
    else:
        paint_prompts(parser, args)


if __name__ == "__main__":
    run_command(main)
