"""prompt.json to images, with DoLa or without, or both side by side."""

import argparse
import hashlib
import math
import os
import re
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from dola_runtime import check_alpha, check_cfg_weight, check_temperature, pick_contrast_layers
from generation_inference import (
    Decoding,
    default_guidance,
    format_image_prompt,
    num_image_tokens,
    sample_image_tokens,
    tokens_to_images,
)
from janus.dola.cli import JANUS_TINY, CommandParser, add_model_arguments, parse_layers, positive, run_command
from janus.dola.files import RunLog, read_json_file, write_whole
from janus.dola.loading import load_pretrained_model, resolve_device, resolve_dtype
from janus.dola.switches import DoLaSwitches

EXAMPLE_PROMPTS = Path(__file__).parent / "examples" / "prompt.json"
MAX_IMAGES_PER_BATCH = {"cpu": 64, "cuda": 256}


def read_prompts(path: str | os.PathLike, max_prompts: int | None = None) -> list[str]:
    """The prompts of a `{"prompts": [...]}` file. Raises ValueError naming the file and the entry."""
    content = read_json_file(path)
    if not isinstance(content, dict) or "prompts" not in content:
        raise ValueError(f'{path}: expected an object with the key "prompts"')
    prompts = content["prompts"]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f'{path}: "prompts" must be a list of at least one prompt')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: prompts[{i}] must be a string, found {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{path}: prompts[{i}] is blank")
        if re.search("[\ud800-\udfff]", prompt):
            raise ValueError(f"{path}: prompts[{i}] holds half a surrogate pair, which is not text")
    return prompts[:max_prompts]


def prompt_seed(seed: int, prompt: str) -> int:
    """The seed of one prompt's noise: from the run's seed and the prompt alone, so that nothing else moves it."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "big") >> 1


def file_stub(prompt: str, max_chars: int = 50, max_bytes: int = 120) -> str:
    """The prompt as a part of a file name on any system: Unicode kept, separators and the like as `_`, bounded."""
    text = unicodedata.normalize("NFC", prompt).strip()[:max_chars]
    text = "".join(c if unicodedata.category(c)[0] in "LMNS" and c not in '<>|"`$^~+=' else "_" for c in text)
    text = re.sub("_+", "_", text).strip("_") or "prompt"
    return text.encode()[:max_bytes].decode(errors="ignore")


# --- batches ---------------------------------------------------------------------------------------------------------


def images_per_batch(model, num_layers_read: int, max_length: int) -> int:
    """How many images fit into 0.7 of the free memory, each with two rows of cache and of logits."""
    llama, device = model.language_model.config, model.language_model.get_input_embeddings().weight.device
    bytes_per_value = model.language_model.get_input_embeddings().weight.element_size()
    head_dim = llama.hidden_size // llama.num_attention_heads
    cache = 2 * 2 * llama.num_hidden_layers * llama.num_key_value_heads * head_dim * max_length * bytes_per_value
    logits = 2 * 4 * 4 * num_layers_read * model.gen_embed.weight.shape[0]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4 << 30
    return max(1, min(MAX_IMAGES_PER_BATCH.get(device.type, 64), int(0.7 * free / (cache + logits))))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def sample_within_memory(
    model, processor, prompts: list[str], decoding: Decoding, seeds: list[int], parallel_size: int, rows: slice, on_step
) -> Tensor:
    """`sample_image_tokens`, halving the prompts, then the rows, where memory runs out: `[prompts, rows, T]`."""
    try:
        return sample_image_tokens(
            model,
            processor,
            prompts,
            decoding,
            parallel_size=parallel_size,
            seeds=seeds,
            samples=rows,
            on_step=on_step,
        )
    except (RuntimeError, MemoryError) as error:
        count = rows.stop - rows.start
        if not is_out_of_memory(error) or (len(prompts) == 1 and count == 1):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(prompts) > 1:
        half = len(prompts) // 2
        parts = [(prompts[:half], seeds[:half], rows), (prompts[half:], seeds[half:], rows)]
    else:
        middle = rows.start + count // 2
        parts = [(prompts, seeds, slice(rows.start, middle)), (prompts, seeds, slice(middle, rows.stop))]
    tqdm.write(f"out of memory with {len(prompts)} prompts x {count} images: trying half")
    sampled = [sample_within_memory(model, processor, p, decoding, s, parallel_size, r, on_step) for p, s, r in parts]
    return torch.cat(sampled, dim=0 if len(prompts) > 1 else 1)


# --- pictures --------------------------------------------------------------------------------------------------------


def save_image(image: Image.Image, path: Path) -> None:
    options = {"quality": 95} if path.suffix == ".jpg" else {}
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    write_whole(path, lambda temporary: image.save(temporary, format=kind, **options))


def contact_sheet(title: str, rows: dict[str, list[Image.Image]], cell: int = 128) -> Image.Image:
    """Labelled rows of images below a title, each image scaled into a cell."""
    font = ImageFont.load_default(13)
    label = 8 + max(int(font.getlength(name)) for name in rows) + 8
    width = label + max(map(len, rows.values())) * (cell + 4)
    while title and font.getlength(title) > width - 8:
        title = title[:-2] + "…"
    sheet = Image.new("RGB", (width, 26 + len(rows) * (cell + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 5), title, fill="black", font=font)
    for r, (name, images) in enumerate(rows.items()):
        top = 24 + r * (cell + 4)
        pen.text((8, top + cell // 2 - 8), name, fill="black", font=font)
        for c, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (label + c * (cell + 4), top))
    return sheet


def tile(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of one size in a grid about as wide as high."""
    width, height = max(s.width for s in sheets), max(s.height for s in sheets)
    columns = max(1, round(math.sqrt(len(sheets) * height / width)))
    whole = Image.new("RGB", (columns * width, -(-len(sheets) // columns) * height), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (i % columns * width, i // columns * height))
    return whole


# --- the run ---------------------------------------------------------------------------------------------------------


class BatchRun:
    """One run over a prompt list: which images are wanted, where they go, what is done already."""

    def __init__(self, outdir: Path, prompts: list[str], variants: dict[str, Decoding], suffix: str, args, settings):
        self.outdir, self.prompts, self.variants, self.suffix = outdir, prompts, variants, suffix
        self.parallel_size, self.seed = args.parallel_size, args.seed
        manifest = outdir / "manifest.jsonl"
        if outdir.is_dir() and not manifest.exists() and not args.overwrite:
            foreign = [file for i in range(len(prompts)) for file in self.files(i) if (outdir / file).exists()]
            if foreign:
                raise ValueError(f"{outdir / foreign[0]} exists and no manifest.jsonl names it: pass --overwrite")
        self.log = RunLog(manifest, settings, args.overwrite)
        for index, entries in self.log.entries.items():
            if index < len(prompts) and entries[0]["prompt"] != prompts[index]:
                raise ValueError(
                    f"{outdir} holds another prompt list (prompt {index} is {entries[0]['prompt']!r}): "
                    "choose another directory, or pass --overwrite"
                )
        for name in variants if len(variants) > 1 else ():
            (outdir / name).mkdir(exist_ok=True)
        self.todo = [i for i in range(len(prompts)) if not self.finished(i)]

    def stem(self, index: int) -> str:
        return f"{index:04d}_{file_stub(self.prompts[index])}"

    def files(self, index: int) -> list[str]:
        folders = [f"{name}/" for name in self.variants] if len(self.variants) > 1 else [""]
        return [f"{f}{self.stem(index)}_p{k}{self.suffix}" for f in folders for k in range(self.parallel_size)]

    def finished(self, index: int) -> bool:
        return index in self.log.entries and all((self.outdir / f).is_file() for f in self.files(index))

    def write(self, index: int, images: list[Image.Image], tokens: Tensor) -> None:
        """Write one prompt's images (variant by variant; tokens `[images, T]`), its sheet, and its manifest lines."""
        files, entries = self.files(index), []
        for i, (file, image, row) in enumerate(zip(files, images, tokens.cpu(), strict=True)):
            save_image(image, self.outdir / file)
            variant, decoding = list(self.variants.items())[i // self.parallel_size]
            sheet = {"sheet": f"{self.stem(index)}_ab.png"} if len(self.variants) > 1 else {}
            entries.append(
                {
                    "prompt": self.prompts[index],
                    "image": i % self.parallel_size,
                    "variant": variant,
                    "seed": prompt_seed(self.seed, self.prompts[index]),
                    "layer": list(decoding.layers) if len(decoding.layers) > 1 else next(iter(decoding.layers), None),
                    "file": file,
                    **sheet,
                    "tokens_sha256": hashlib.sha256(row.numpy().tobytes()).hexdigest(),
                }
            )
        if len(self.variants) > 1:
            save_image(self.sheet(index), self.outdir / f"{self.stem(index)}_ab.png")
        self.log.add(index, entries)

    def sheet(self, index: int) -> Image.Image:
        images = [Image.open(self.outdir / file).convert("RGB") for file in self.files(index)]
        rows = {n: images[i * self.parallel_size :][: self.parallel_size] for i, n in enumerate(self.variants)}
        return contact_sheet(self.prompts[index], rows)


def decode_and_write(run: BatchRun, model, processor, indices: list[int], tokens: Tensor) -> None:
    """VQ codes `[prompts, images, T]` to files; runs beside the next batch's decoding."""
    for index, rows in zip(indices, tokens, strict=True):
        run.write(index, tokens_to_images(model, rows), rows)


def run_prompts(run: BatchRun, model, processor, batch_size: int | None) -> tuple[int, float]:
    """Make what is still to do; returns (tokens sampled, seconds)."""
    rendered = {i: format_image_prompt(processor, run.prompts[i]) for i in run.todo}
    longest = max((len(processor.tokenizer.encode(text)) for text in rendered.values()), default=0)
    layers_read = 1 + max(len(d.layers) for d in run.variants.values())
    chosen = batch_size or images_per_batch(model, layers_read, longest + num_image_tokens(model, processor))
    prompts_per_batch = max(1, chosen // run.parallel_size)
    rows_per_part = min(run.parallel_size, chosen)
    print(f"batches of {prompts_per_batch} prompts x {rows_per_part} images")
    tokens_done, started = 0, time.perf_counter()
    with (
        tqdm(total=len(run.prompts), initial=len(run.prompts) - len(run.todo), unit="prompt") as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        pending: Future | None = None

        def on_step() -> None:
            nonlocal tokens_done
            tokens_done += rows_now
            bar.set_postfix_str(f"{tokens_done / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(0)

        for start in range(0, len(run.todo), prompts_per_batch):
            indices = run.todo[start : start + prompts_per_batch]
            seeds = [prompt_seed(run.seed, run.prompts[i]) for i in indices]
            sampled = []
            for decoding in run.variants.values():
                for row in range(0, run.parallel_size, rows_per_part):
                    rows = slice(row, min(row + rows_per_part, run.parallel_size))
                    rows_now = len(indices) * (rows.stop - rows.start)
                    prompts = [rendered[i] for i in indices]
                    sampled.append(
                        sample_within_memory(
                            model, processor, prompts, decoding, seeds, run.parallel_size, rows, on_step
                        )
                    )
            if pending is not None:
                pending.result()
            pending = writer.submit(decode_and_write, run, model, processor, indices, torch.cat(sampled, dim=1))
            bar.update(len(indices))
        if pending is not None:
            pending.result()
    return tokens_done, time.perf_counter() - started


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        description="Paint every prompt of a JSON file with Janus, with DoLa decoding unless --no_dola."
    )
    add_model_arguments(parser)
    add = parser.add_argument_group("files").add_argument
    add("--prompt_json", default=str(EXAMPLE_PROMPTS), help='{"prompts": [...]} (default: examples/prompt.json)')
    add("--outdir", default="outputs", help="where images and manifest.jsonl go (default: %(default)s)")
    add("--format", choices=("jpg", "png"), default="jpg", help="image format (default: %(default)s)")
    add("--overwrite", action="store_true", help="start anew where --outdir holds another run (default: refuse)")
    add("--max_prompts", type=positive, help="only the first so many prompts (default: all)")
    dola = parser.add_argument_group("DoLa", "flags win over --config")
    dola.add_argument("--config", help="switches as JSON, with the layer and alpha (default: none)")
    dola.add_argument("--domain", help="a domain of --config (default: the file's own values)")
    add = dola.add_mutually_exclusive_group().add_argument
    add("--layer", type=int, help="fixed contrast layer, 1..N; N is the baseline (default: by --layer_ratio)")
    add("--layer_ratio", type=float, help="fixed contrast layer by depth, 0..1 (default: 0.8)")
    add("--candidate_layers", type=parse_layers, help="early exit among these, as 22,24,26,28 (default: fixed layer)")
    dola.add_argument("--alpha", type=float, help="APC threshold, 0..1 (default: 0.1)")
    dola.add_argument(
        "--cfg_order",
        choices=("guide_first", "contrast_first"),
        default="guide_first",
        help="guide the layers, then contrast them, or the other way round (default: %(default)s)",
    )
    add = dola.add_mutually_exclusive_group().add_argument
    add("--no_dola", action="store_true", help="the baseline: sample from the last layer itself (default: DoLa)")
    add("--ab", action="store_true", help="both, with the same noise, and contact sheets (default: DoLa alone)")
    add = parser.add_argument_group("sampling").add_argument
    add("--parallel_size", type=positive, default=4, help="images per prompt (default: %(default)s)")
    add("--cfg_weight", type=float, help="guidance, at least 0 (default: the checkpoint's own, else 5)")
    add("--temperature", type=float, default=1.0, help="sampling temperature, above 0 (default: %(default)s)")
    add("--seed", type=int, default=0, help="with the prompt, gives each prompt's own seed (default: %(default)s)")
    add("--batch_size", type=positive, help="images decoded together (default: by the free memory)")
    return parser


def apply_switches(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in, from --config, the layer and alpha of painting that no flag gives."""
    if args.domain and not args.config:
        parser.error("--domain needs --config")
    switches = DoLaSwitches.from_json(args.config, args.domain) if args.config else DoLaSwitches()
    if args.alpha is None:
        args.alpha = switches.alpha_gen
    if (args.layer, args.layer_ratio, args.candidate_layers) == (None, None, None):
        args.layer = switches.fixed_layer_gen
        args.no_dola |= not switches.use_dola_lm_static and not args.ab
    if args.layer_ratio is None:
        args.layer_ratio = 0.8


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    apply_switches(args, parser)
    prompts = read_prompts(args.prompt_json, args.max_prompts)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    check_alpha(args.alpha)
    check_temperature(args.temperature)
    if args.cfg_weight is not None:
        check_cfg_weight(args.cfg_weight)
    _, processor, model = load_pretrained_model(args.model, dtype, device)
    cfg_weight = default_guidance(model) if args.cfg_weight is None else args.cfg_weight
    num_layers = len(model.language_model.model.layers)
    layers = pick_contrast_layers(num_layers, args.layer, args.layer_ratio, args.candidate_layers)
    dola = Decoding(layers, args.alpha, temperature=args.temperature, cfg_weight=cfg_weight, cfg_order=args.cfg_order)
    variants: dict[str, Decoding] = {"baseline": dola.baseline, "dola": dola}
    if not args.ab:
        variants.pop("dola" if args.no_dola else "baseline")
    settings: dict[str, Any] = {
        "model": args.model if args.model != str(JANUS_TINY) else JANUS_TINY.name,
        "variants": list(variants),
        "layers": [] if args.no_dola else list(layers),
        "alpha": args.alpha,
        "cfg_order": args.cfg_order,
        "cfg_weight": cfg_weight,
        "temperature": args.temperature,
        "parallel_size": args.parallel_size,
        "seed": args.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "format": args.format,
    }
    run = BatchRun(Path(args.outdir), prompts, variants, f".{args.format}", args, settings)
    skipped = len(prompts) - len(run.todo)
    tokens, seconds = run_prompts(run, model, processor, args.batch_size)
    print(f"{len(run.todo)} prompts painted ({skipped} were done already), {tokens / seconds:.0f} tokens/s")
    if args.ab:
        sheets = [Image.open(run.outdir / f"{run.stem(i)}_ab.png") for i in range(len(prompts))]
        save_image(tile(sheets), run.outdir / "contact_sheet.png")
        print(f"contact sheet: {run.outdir / 'contact_sheet.png'}")
    print(f"images and manifest.jsonl: {run.outdir}")


if __name__ == "__main__":
    run_command(main)
