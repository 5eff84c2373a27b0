"""A painted directory as the field's benchmarks read it: `python -m janus.dola.layouts DIR --layout geneval`.

Each layout puts a folder for each variant into `DIR/layouts/`, and a recipe card, how its images came about, beside it.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from janus.dola.cli import CommandParser, run_command
from janus.dola.files import load_image, write_whole
from janus.dola.painted import read_painted
from janus.dola.painting import PaintingRun, describe_decoding
from janus.dola.prompt_files import Prompt

LONGEST_NAME = 230
"""Bytes of a prompt in a file's name: 255, less the number and the ending, also those of a file half written."""

Files = Iterator[tuple[str, Image.Image | str]]
"""Names inside a folder, and the picture or the text that goes there."""


class Variant(NamedTuple):
    run: PaintingRun
    name: str

    def images(self, index: int) -> list[Image.Image]:
        """A prompt's images, those that are kept."""
        positions = dict(zip(self.run.variants, self.run.by_variant(index).values(), strict=True))[self.name]
        return [load_image(self.run.log.directory / self.run.file(position)) for position in positions]


# --- the layouts -----------------------------------------------------------------------------------------------------


def geneval(variant: Variant) -> Files:
    """`00000/metadata.jsonl`, the prompt's own object, and `00000/samples/0000.png` on, a number for each image."""
    for index, prompt in enumerate(variant.run.prompts):
        yield f"{index:05d}/metadata.jsonl", json.dumps(prompt.fields | {"prompt": prompt.text}) + "\n"
        for number, image in enumerate(variant.images(index)):
            yield f"{index:05d}/samples/{number:04d}.png", image


def geneval2(variant: Variant) -> Files:
    """`images.json`, prompt -> path of its image, the first that is kept, in `images/`."""
    paths = {prompt.text: f"images/{index:05d}.png" for index, prompt in enumerate(variant.run.prompts)}
    for index, path in enumerate(paths.values()):
        yield path, variant.images(index)[0]
    yield "images.json", json.dumps(paths, indent=1, ensure_ascii=False) + "\n"


def dpg(variant: Variant) -> Files:
    """`<item_id>.png`, a prompt's first four images as 2 x 2 tiles, and nothing else."""
    for index, prompt in enumerate(variant.run.prompts):
        images = variant.images(index)[:4]
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for i, image in enumerate(images):
            grid.paste(image, (i % 2 * width, i // 2 * height))
        yield f"{prompt.fields['item_id']}.png", grid


def t2i_compbench(variant: Variant) -> Files:
    """`samples/<prompt>_000000.png`, numbered over all images; a space for what a file's name cannot hold of a prompt.

    So for an underscore too, before which the benchmark reads the prompt.
    """
    for index, prompt in enumerate(variant.run.prompts):
        name = re.sub(r"[/\\_\x00-\x1f]+", " ", prompt.text).strip().encode()[:LONGEST_NAME].decode(errors="ignore")
        for number, image in enumerate(variant.images(index)):
            yield f"samples/{name}_{index * variant.run.parallel_size + number:06d}.png", image


class Layout(NamedTuple):
    """`fields` of the prompts' file that the benchmark needs; `own` must differ from prompt to prompt."""

    files: Callable[[Variant], Files]
    fields: tuple[str, ...] = ()
    images: int = 1
    own: Callable[[Prompt], object] | None = None


LAYOUTS = {
    "geneval": Layout(geneval, fields=("tag", "include")),
    "geneval2": Layout(geneval2, own=lambda prompt: prompt.text),
    "dpg": Layout(dpg, fields=("item_id",), images=4, own=lambda prompt: f"{prompt.fields['item_id']}"),
    "t2i_compbench": Layout(t2i_compbench),
}


def check_layout(run: PaintingRun, name: str) -> None:
    """Raises ValueError where the prompts, or the images of each, are not what a benchmark needs."""
    layout, seen = LAYOUTS[name], set()
    kept = run.parallel_size if run.keep_all else 1
    if kept < layout.images:
        raise ValueError(f"layout {name}: needs {layout.images} images of each prompt, this run keeps {kept}")
    for index, prompt in enumerate(run.prompts):
        where = f"layout {name}: prompt {index} ({prompt.text[:40]!r})"
        if missing := [field for field in layout.fields if field not in prompt.fields]:
            raise ValueError(f"{where} has no {missing[0]!r}: paint the benchmark's own file of prompts")
        if name == "dpg" and not re.fullmatch(r"[\w-][\w.-]{0,200}", f"{prompt.fields['item_id']}"):
            raise ValueError(f"{where}: item_id {prompt.fields['item_id']!r} is no name of a file")
        own = index if layout.own is None else layout.own(prompt)
        if own in seen:
            raise ValueError(f"{where}: {own!r} is there twice")
        seen.add(own)


# --- writing ---------------------------------------------------------------------------------------------------------


def recipe(run: PaintingRun, name: str) -> dict[str, Any]:
    """How a variant's images came about, so that their scores can be set beside published ones."""
    decoding, settings = run.variants[name], run.settings
    side = load_image(run.log.directory / run.file(next(filter(run.is_kept, run.positions(0))))).size
    return {
        **{key: settings[key] for key in ("model", "dtype", "device", "quantize") if key in settings},
        "decoding": describe_decoding(decoding),
        **decoding,
        "samples_per_prompt": run.parallel_size,
        "kept": "all" if run.keep_all else f"the best of {run.parallel_size} by {settings['scorer']['spec']}",
        "seed": run.seed,
        "seed_policy": "a prompt's noise is drawn from sha256(seed, prompt), for all of its samples in order",
        "prompts": len(run.prompts),
        "image_size": list(side),
        "painted_as": {"jpg": "JPEG, quality 95", "png": "PNG"}[settings["format"]],
    }


def write_layout(run: PaintingRun, layout: str) -> Path:
    """Write every variant of a finished run as a benchmark reads it; returns the folder that holds theirs.

    Raises ValueError as `check_layout` does, and where another file is in the way.
    """
    check_layout(run, layout)
    root = run.log.directory / "layouts" / layout
    for name in run.variants:
        folder, made = root / name, set()
        for file, content in LAYOUTS[layout].files(Variant(run, name)):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                write_whole(path, lambda temporary, text=content: temporary.write_text(text, encoding="utf-8"))
            else:
                write_whole(path, lambda temporary, image=content: image.save(temporary, format="PNG"))
            made.add(path)
        if strangers := sorted(path for path in folder.rglob("*") if path.is_file() and path not in made):
            raise ValueError(f"{strangers[0]} is not of this layout: move it away")
        card = json.dumps(recipe(run, name), indent=1, ensure_ascii=False) + "\n"
        write_whole(
            root / f"{name}.recipe.json", lambda temporary, text=card: temporary.write_text(text, encoding="utf-8")
        )
    return root


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m janus.dola.layouts", description="Lay a painted directory out as a benchmark reads it."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="painted by run_batch_prompts.py")
    parser.add_argument("--layout", required=True, choices=tuple(LAYOUTS), help="the benchmark")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    print(f"{args.layout}: {write_layout(read_painted(args.directory), args.layout)}")


if __name__ == "__main__":
    run_command(main)
