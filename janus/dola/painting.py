"""The files of a painting run: which there are, what the manifest says of each, what is done, how it is batched."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from janus.dola.files import RunLog, is_whole_image, load_image, parse_json, read_text, write_whole
from janus.dola.pictures import contact_sheet, frame, layer_map, save_image, tile, where_map
from janus.dola.prompt_files import Prompt
from janus.dola.shards import ShardLog

PROMPTS_PER_PAGE = 200
"""Of the contact sheet over all prompts: a page of them is some 100 MB while it is made."""

Told = Mapping[str, np.ndarray]
"""What a `Record` holds of one image: arrays `[T, ...]` by name, and the passes that its batch took, a number."""

# --- names -----------------------------------------------------------------------------------------------------------


def prompt_seed(seed: int, prompt: str) -> int:
    """The seed of one prompt's noise: from the run's seed and the prompt alone, so that nothing else moves it."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "big") >> 1


def file_stub(prompt: str, max_chars: int = 50, max_bytes: int = 120) -> str:
    """The prompt as a part of a file name on any system: Unicode kept, separators and the like as `_`, bounded."""
    text = unicodedata.normalize("NFC", prompt).strip()[:max_chars]
    text = "".join(c if unicodedata.category(c)[0] in "LMNS" and c not in '<>|"`$^~+=' else "_" for c in text)
    text = re.sub("_+", "_", text).strip("_") or "prompt"
    return text.encode()[:max_bytes].decode(errors="ignore")


def image_hash(codes: np.ndarray) -> str:
    """The SHA-256 of an image's codes `[T]` int64."""
    return hashlib.sha256(codes.tobytes()).hexdigest()


@functools.lru_cache(maxsize=2**17)
def file_stem(index: int, prompt: str) -> str:
    return f"{index:04d}_{file_stub(prompt)}"


def contact_sheet_files(num_prompts: int) -> list[str]:
    """One page, or numbered ones of at most `PROMPTS_PER_PAGE`."""
    pages = -(-num_prompts // PROMPTS_PER_PAGE)
    return ["contact_sheet.png"] if pages == 1 else [f"contact_sheet_{page + 1}.png" for page in range(pages)]


def variant_folders(settings: Mapping[str, Any]) -> list[str]:
    """The subdirectories of a run: one for each variant, none where there is but one. Settings may be anyone's."""
    variants = settings.get("variants")
    names = list(variants) if isinstance(variants, dict) else []
    return names if len(names) > 1 and all(re.fullmatch(r"[a-z0-9][\w.-]*", name) for name in names) else []


FILE = re.compile(
    r"(?:(?P<folder>[^/]+)/)?(?P<index>[0-9]{4,9})_.*_(?:(?P<sheet>ab|where)\.png|p(?P<image>[0-9]{1,9})(?P<end>.*))",
    re.DOTALL,
)


def is_run_file(settings: Mapping[str, Any], prompts: Sequence[Any], name: str) -> bool:
    """Whether a run makes a file of this name; settings and prompts are as run.json has them, whoever wrote it."""
    folders, images, trace = (variant_folders(settings), settings.get("parallel_size"), settings.get("trace") is True)
    parts = FILE.fullmatch(name)
    if parts is None:
        return bool(folders) and name in contact_sheet_files(len(prompts))
    index = int(parts["index"])
    if index >= len(prompts) or not isinstance(prompts[index], str):
        return False
    stem = file_stem(index, prompts[index])
    if parts["sheet"]:
        made = {"ab": bool(folders), "where": trace}[parts["sheet"]]
        return made and name == f"{stem}_{parts['sheet']}.png"
    folder, image = parts["folder"], int(parts["image"])
    ends = [f".{settings.get('format')}", "_trace.jsonl"][: 1 + trace]
    there = (folder in folders if folders else folder is None) and isinstance(images, int) and image < images
    return there and any(name == f"{folder + '/' if folder else ''}{stem}_p{image}{end}" for end in ends)


# --- words for a decoding --------------------------------------------------------------------------------------------


def describe_decoding(decoding: Mapping[str, Any]) -> str:
    """A decoding's fields in a few words: `baseline`, `layer 6 · α 0.1`, `exit 2, 4 · α 0.1 · γ 0.5`."""
    layers = decoding["layers"]
    if not layers and decoding["gamma"] != 0:
        return "baseline"
    if decoding["gamma"] == 0:
        words = ["APC only"]
    else:
        words = [f"{'exit' if len(layers) > 1 else 'layer'} {', '.join(map(str, layers))}"]
    words.append(f"α {decoding['alpha']:g}")
    if decoding["gamma"] not in (0, 1):
        words.append(f"γ {decoding['gamma']:g}")
    if not decoding["norm"]:
        words.append("no norm")
    if decoding["cfg_order"] != "guide_first":
        words.append("contrast first")
    return " · ".join(words)


SAMPLING = {"cfg_weight": "cfg", "temperature": "T"}


def describe_variants(variants: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """Words for each variant, with the guidance and temperature where these differ, and those they all share."""
    shared = [key for key in SAMPLING if len({decoding[key] for decoding in variants.values()}) == 1]

    def sampling(decoding: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
        return [f"{SAMPLING[key]} {decoding[key]:g}" for key in keys]

    own = [key for key in SAMPLING if key not in shared]
    labels = {name: " · ".join([describe_decoding(d), *sampling(d, own)]) for name, d in variants.items()}
    return labels, " · ".join(sampling(next(iter(variants.values())), shared))


# --- the run ---------------------------------------------------------------------------------------------------------


class PaintingRun:
    """One run over a prompt list: its images, where they go, how they are batched, and what is still to do.

    All of it follows from the log's settings and the prompts. A position is an image's line in the manifest: prompt by
    prompt, and for each of them variant by variant. `indices` are the prompts that are looked after here: all of
    them, unless others work on the run too. Raises ValueError where the log holds what this run does not write.
    """

    def __init__(self, log: RunLog | ShardLog, prompts: Sequence[Prompt], indices: Sequence[int] | None = None):
        self.log, self.prompts, self.settings = log, prompts, log.run["settings"]
        self.indices = range(len(prompts)) if indices is None else indices
        self.variants: dict[str, dict[str, Any]] = self.settings["variants"]
        self.folders, self.trace = variant_folders(self.settings), self.settings["trace"]
        self.scorer, self.keep_all = self.settings["scorer"], self.settings["keep_all"]
        self.parallel_size, self.seed, self.suffix = (self.settings[k] for k in ("parallel_size", "seed", "format"))
        self.images_per_prompt = len(self.variants) * self.parallel_size
        self.labels, self.shared = describe_variants(self.variants)
        self.best = {position for position, entry in log.items() if entry.get("best") is True}
        for position, entry in log.items():
            if position >= len(prompts) * self.images_per_prompt or not self.is_line(position, entry):
                raise ValueError(f"{log.path}: line {position + 1} is not a line of this run")
        if self.scorer:
            for first in sorted({position - position % self.parallel_size for position, _ in log.items()}):
                if len(self.best.intersection(range(first, first + self.parallel_size))) != 1:
                    raise ValueError(f"{log.path}: of the samples from line {first + 1} on not one is the best")
        for name in self.folders:
            (log.directory / name).mkdir(exist_ok=True)
        self.todo = {index for index in self.indices if not all(map(self.is_done, self.positions(index)))}

    def positions(self, index: int) -> range:
        return range(index * self.images_per_prompt, (index + 1) * self.images_per_prompt)

    def samples(self, start: int, stop: int) -> list[range]:
        """The positions from `start` to `stop`, by prompt and variant."""
        return [range(i, i + self.parallel_size) for i in range(start, stop, self.parallel_size)]

    def place(self, position: int) -> tuple[int, str, int]:
        """(index of the prompt, variant, number of the image)"""
        index, image = divmod(position, self.images_per_prompt)
        return index, list(self.variants)[image // self.parallel_size], image % self.parallel_size

    def file(self, position: int, end: str | None = None) -> str:
        """An image's file, or with an `end` another file of the same beginning."""
        index, variant, image = self.place(position)
        folder, stem = f"{variant}/" if self.folders else "", file_stem(index, self.prompts[index].text)
        return f"{folder}{stem}_p{image}{end or f'.{self.suffix}'}"

    def sheet(self, index: int, kind: str) -> str:
        return f"{file_stem(index, self.prompts[index].text)}_{kind}.png"

    def prompt_seed(self, index: int) -> int:
        return prompt_seed(self.seed, self.prompts[index].text)

    def is_kept(self, position: int) -> bool:
        """Whether an image has files: of several samples that were scored, the best has."""
        return self.keep_all or position in self.best

    def line(self, position: int) -> dict[str, Any]:
        """What an image's line says beside what came of painting it."""
        index, variant, image = self.place(position)
        text, fields = self.prompts[index]
        layers = self.variants[variant]["layers"]
        line = {
            "index": index,
            "prompt": text,
            **({"fields": fields} if fields else {}),
            "image": image,
            "variant": variant,
            "seed": self.prompt_seed(index),
            "layer": list(layers) if len(layers) > 1 else next(iter(layers), None),
        }
        if self.is_kept(position):
            line["file"] = self.file(position)
        if self.folders:
            line["sheet"] = self.sheet(index, "ab")
        if self.trace and self.is_kept(position):
            line |= {"trace": self.file(position, "_trace.jsonl"), "where": self.sheet(index, "where")}
        return line

    def is_line(self, position: int, entry: Mapping[str, Any]) -> bool:
        """Whether a line of the manifest, whoever wrote it, can be that of this image."""
        decoding = self.variants[self.place(position)[1]]
        line = self.line(position)
        told: dict[str, Any] = {key: entry.get(key) for key in ("passes", "tokens_per_pass")}
        if type(told["passes"]) is not int or type(told["tokens_per_pass"]) is not float:
            return False
        told["tokens_sha256"] = f"{entry.get('tokens_sha256')}"
        if self.scorer:
            told |= {"score": entry.get("score"), "best": entry.get("best")}
            if type(told["score"]) is not float or type(told["best"]) is not bool:
                return False
        if self.trace or decoding["layers"] or decoding["gamma"] == 0:
            told["argmax_changed"] = entry.get("argmax_changed")
            if not isinstance(told["argmax_changed"], float) or not 0 <= told["argmax_changed"] <= 1:
                return False
        if len(decoding["layers"]) > 1:
            told["layers_chosen"] = entry.get("layers_chosen")
            counts = told["layers_chosen"] if isinstance(told["layers_chosen"], dict) else {}
            if list(counts) != [*map(str, decoding["layers"])] or not all(type(n) is int for n in counts.values()):
                return False
        return entry == line | told and re.fullmatch("[0-9a-f]{64}", told["tokens_sha256"]) is not None

    def image_settings(self, position: int, tokens_sha256: str) -> dict[str, Any]:
        """What goes into an image's file: all it takes to paint it again."""
        index, variant, image = self.place(position)
        text = self.prompts[index].text
        return {
            "prompt": text,
            "seed": self.prompt_seed(index),
            "run_seed": self.seed,
            "index": index,
            "image": image,
            "parallel_size": self.parallel_size,
            **{
                key: self.settings[key]
                for key in ("model", "dtype", "device", "quantize", "window")
                if key in self.settings
            },
            "variant": variant,
            "decoding": self.variants[variant],
            "tokens_sha256": tokens_sha256,
        }

    def is_done(self, position: int) -> bool:
        there = self.log.get(position) is not None
        if not there or not self.is_kept(position):
            return there
        traced = not self.trace or (self.log.directory / self.file(position, "_trace.jsonl")).is_file()
        return traced and is_whole_image(self.log.directory / self.file(position))

    def batch(self, start: int) -> tuple[range, int]:
        """The prompts that are decoded together from `start` on, and how many images of each at a time."""
        return cut_batch(self.log.run["batch_sizes"], self.parallel_size, len(self.prompts), start)

    def units(self) -> dict[int, int]:
        """The first position of each batch of the cut, and how many it has."""
        starts, start = {}, 0
        while start < len(self.prompts):
            batch, _ = self.batch(start)
            starts[self.positions(start).start] = len(batch) * self.images_per_prompt
            start = batch.stop
        return starts

    def halve(self, batch: range, images: int) -> None:
        """From this batch on, decode half as many images together as these."""
        tqdm.write(f"out of memory with {len(batch)} prompts x {images} images: half as many from here on")
        sizes = self.log.run["batch_sizes"]
        sizes.append([batch.start, len(batch) * images // 2])
        sizes.sort(key=itemgetter(0))  # stable: of two sizes from one prompt on, the later one holds
        self.log.save()

    def choose_batch_size(self, size: int) -> None:
        """Put the images per batch into the run's record, where it has none yet."""
        if "batch_sizes" not in self.log.run:
            self.log.run["batch_sizes"] = [[0, size]]
            self.log.save()

    # --- writing

    def write(
        self,
        batch: range,
        images: Sequence[Sequence[Image.Image]],
        tokens: np.ndarray,
        told: Sequence,
        scores: Sequence[float] = (),
    ) -> None:
        """Images, codes and what was told of a batch (`[prompts, images, ...]`) to files, then lines of the manifest.

        With a scorer there is a score for each image, and the first of the highest is the best of its samples. Of what
        the manifest has already, only what is lost is written again.
        """
        first = self.positions(batch.start).start
        for samples in self.samples(first, first + len(scores)):
            self.best.add(max(samples, key=lambda position: scores[position - first]))
        hashes = [image_hash(codes) for rows in tokens for codes in rows]
        lines = []
        for position, (tokens_sha256, values) in enumerate(zip(hashes, chain(*told), strict=True), start=first):
            layers = self.variants[self.place(position)[1]]["layers"]
            passes = {
                "passes": int(values["passes"]),
                "tokens_per_pass": round(tokens.shape[2] / int(values["passes"]), 2),
            }
            if (old := self.log.get(position)) is not None:  # another machine may take others to the same tokens
                passes = {key: old[key] for key in passes}
            line = self.line(position) | {"tokens_sha256": tokens_sha256} | passes | summarise(values, layers)
            if self.scorer:
                line |= {"score": scores[position - first], "best": position in self.best}
            lines.append(line)
        self.log.check(first, lines)
        for index, *made in zip(batch, images, tokens, told, strict=True):
            for position, image, codes, values in zip(self.positions(index), *made, strict=True):
                if self.is_kept(position) and not self.is_done(position):
                    settings = self.image_settings(position, image_hash(codes))
                    save_image(image, self.log.directory / self.file(position), settings)
                    if self.trace:
                        write_trace(self.log.directory / self.file(position, "_trace.jsonl"), codes, values)
            if index in self.todo:
                self.write_sheets(index)
        self.log.add(first, lines)

    def write_sheets(self, index: int, lost_only: bool = False) -> None:
        """The sheets of one prompt, from its files."""
        for kind, wanted, make in (("ab", self.folders, self.comparison), ("where", self.trace, self.where_sheet)):
            path = self.log.directory / self.sheet(index, kind)
            if wanted and not (lost_only and is_whole_image(path)):
                save_image(make(index), path)

    def by_variant(self, index: int) -> dict[str, list[int]]:
        """Label -> positions of a prompt's images that are kept."""
        positions = self.positions(index)
        parts = [list(filter(self.is_kept, part)) for part in self.samples(positions.start, positions.stop)]
        return dict(zip(self.labels.values(), parts, strict=True))

    def load(self, position: int) -> Image.Image:
        """An image for a sheet, in a frame where it is the best of several."""
        image = load_image(self.log.directory / self.file(position))
        return frame(image) if self.keep_all and position in self.best else image

    @property
    def subtitle(self) -> str:
        return " · ".join([Path(self.settings["model"]).name, *filter(None, [self.shared]), f"seed {self.seed}"])

    def comparison(self, index: int) -> Image.Image:
        rows = {
            label: [self.load(position) for position in positions]
            for label, positions in self.by_variant(index).items()
        }
        return contact_sheet(self.prompts[index].text, self.subtitle, rows)

    def where_sheet(self, index: int) -> Image.Image:
        """Where DoLa acted: each image beside its map, and beside the layers that early exit took."""
        places = self.by_variant(index)
        if len(places) > 1:
            places.pop("baseline", None)  # there it does not act
        traces = {
            position: read_trace(self.log.directory / self.file(position, "_trace.jsonl"))
            for positions in places.values()
            for position in positions
        }
        top = max(told["jsd"].max() for told in traces.values())
        rows: dict[str, list[Image.Image]] = {}
        for label, positions in places.items():
            rows[label] = []
            for position in positions:
                told = traces[position]
                rows[label].append(where_map(self.load(position), told["jsd"], told["draw_changed"], top))
                if len(np.unique(told["layer"])) > 1:
                    rows[label].append(layer_map(told["layer"]))
        scale = f"JSD(q_N, p_hat): dark 0, bright {top:.2g} nats · red: another token than the baseline's"
        return contact_sheet(self.prompts[index].text, f"{self.subtitle} · {scale}", rows, cell=None)

    def write_contact_sheets(self) -> list[str]:
        """One sheet over all prompts, or pages; those that are whole stay."""
        names = contact_sheet_files(len(self.prompts))
        for page, name in enumerate(names):
            if not is_whole_image(self.log.directory / name):
                indices = range(len(self.prompts))[page * PROMPTS_PER_PAGE :][:PROMPTS_PER_PAGE]
                sheets = [self.log.directory / self.sheet(i, "ab") for i in indices]
                save_image(tile(sheets), self.log.directory / name)
        return names


def cut_batch(sizes: Sequence[Sequence[int]], parallel_size: int, num_prompts: int, start: int) -> tuple[range, int]:
    """The prompts of the batch that begins at `start`, and how many of the `parallel_size` images of each at a time.

    `sizes` are (prompt, images per batch from there on), in order: a batch depends on them and on the list alone.
    """
    size = [size for first, size in sizes if first <= start][-1]
    ends = [first for first, _ in sizes if first > start]
    return range(start, min([start + max(1, size // parallel_size), num_prompts, *ends])), min(size, parallel_size)


def check_batch_size(log: RunLog, asked_for: int | None) -> None:
    """Raises ValueError where the run's sizes are none, or begin with another than the one asked for."""
    sizes = log.run.get("batch_sizes", [[0, asked_for or 1]])
    if not is_batch_sizes(sizes):
        raise ValueError(f"{log.run_file}: batch_sizes: expected [[0, images], [prompt, images], ...]")
    if "batch_sizes" in log.run and asked_for not in (None, sizes[0][1]):
        raise log.refusal("with other settings (batch_size)")


def is_batch_sizes(sizes: Any) -> bool:
    """Whether this is `[[0, images], [prompt, images], ...]`, in the order of the prompts."""
    pairs = isinstance(sizes, list) and sizes and all(isinstance(pair, list) and len(pair) == 2 for pair in sizes)
    if not pairs or not all(type(number) is int for pair in sizes for number in pair):
        return False
    firsts = [first for first, _ in sizes]
    return firsts[0] == 0 and firsts == sorted(firsts) and all(size > 0 for _, size in sizes)


IMAGE_SETTINGS = {
    **dict.fromkeys(("prompt", "model", "dtype", "variant", "tokens_sha256"), str),
    **dict.fromkeys(("run_seed", "index", "image", "parallel_size"), int),
    "decoding": dict,
}
"""What an image's file must say, and of which type, for the image to be painted again."""

# --- what was told of an image ---------------------------------------------------------------------------------------


def summarise(told: Told, layers: Sequence[int]) -> dict[str, Any]:
    """For the manifest: the share of tokens whose argmax changed, and how often early exit took each layer."""
    summary: dict[str, Any] = {}
    if "argmax_changed" in told:
        summary["argmax_changed"] = round(float(told["argmax_changed"].mean()), 4)
    if len(layers) > 1:
        counts = Counter(told["layer"].tolist())
        summary["layers_chosen"] = {str(layer): counts[layer] for layer in layers}
    return summary


def write_trace(path: Path, codes: np.ndarray, told: Told) -> None:
    """A line for each token: what was drawn, the top-k as [token, probability], and what changed."""
    lists = {name: values.tolist() for name, values in told.items() if name != "passes"}
    for name in [name.removesuffix("_tokens") for name in lists if name.endswith("_tokens")]:
        pairs = zip(lists.pop(f"{name}_tokens"), lists[name], strict=True)
        lists[name] = [list(zip(tokens, (round(p, 6) for p in probs), strict=True)) for tokens, probs in pairs]
    lines = [
        json.dumps({"token": i, "drawn": int(code), **{name: values[i] for name, values in lists.items()}})
        for i, code in enumerate(codes)
    ]
    write_whole(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def read_trace(path: Path) -> dict[str, np.ndarray]:
    """JSD, changed draws and layers (0 where there is none) of a trace, each `[side, side]`. Raises ValueError."""
    lines = [parse_json(line, f"{path}") for line in read_text(path).splitlines()]
    side = round(len(lines) ** 0.5)
    try:
        columns = ([line.get(name, 0) for line in lines] for name in ("jsd", "draw_changed", "layer"))
        jsd, draw_changed, layer = (np.array(column).reshape(side, side) for column in columns)
    except (AttributeError, ValueError):
        raise ValueError(f"{path}: not a trace of this command") from None
    return {"jsd": jsd.astype(float), "draw_changed": draw_changed.astype(bool), "layer": layer.astype(int)}
