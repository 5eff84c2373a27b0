"""Pictures as files: with their settings inside, side by side on sheets, and beside a map of where DoLa acted."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from janus.dola.files import load_image, parse_json, write_whole

MARGIN, GAP = 8, 4
LEAST_FOR_TITLES = 480
"""Pixels that a sheet of few images grows to, so that its title can be read."""
MAP_SIDE = 224
"""Least side of a map in pixels; a cell of it has at least 14, so that a layer's number can be read in it."""

# --- settings inside a file ------------------------------------------------------------------------------------------

PNG_KEY = "parameters"
"""The text chunk in which image tools look for what made a picture."""
UNICODE = b"UNICODE\0"


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a `.png` or `.jpg` whole, with what made it as text: its prompt, then all settings as JSON.

    A PNG holds it in the chunk `parameters`, a JPEG in the EXIF field UserComment.
    """
    options: dict[str, Any] = {}
    text = None if settings is None else f"{settings['prompt']}\n{json.dumps(settings, ensure_ascii=False)}"
    if path.suffix == ".jpg":
        options = {"format": "JPEG", "quality": 95}
        if text is not None:
            exif = Image.Exif()
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = UNICODE + text.encode("utf-16-be")
            options["exif"] = exif
    else:
        options = {"format": "PNG"}
        if text is not None:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt(PNG_KEY, text)
    write_whole(path, lambda temporary: image.save(temporary, **options))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_image` put into a file. Raises ValueError, naming the file, where it holds none."""
    load_image(path)
    text: Any = None
    with Image.open(path) as image:
        if image.format == "PNG":
            text = getattr(image, "text", {}).get(PNG_KEY)
        else:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            if isinstance(comment, bytes) and comment.startswith(UNICODE):
                text = comment.removeprefix(UNICODE).decode("utf-16-be", errors="replace")
    if not isinstance(text, str) or "\n{" not in text:
        raise ValueError(f"{path}: holds no settings of a painted image")
    settings = parse_json(text[text.rindex("\n{") + 1 :], f"{path}: its settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its settings are no object")
    return settings


# --- sheets ----------------------------------------------------------------------------------------------------------


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that comes with matplotlib and has Greek letters; where there is no matplotlib, Pillow's own."""
    try:
        from matplotlib import font_manager
    except ImportError:  # a checkout of the original code
        return ImageFont.load_default(size)
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def shorten(text: str, width: float, size: int) -> str:
    """The text on one line, cut to so many pixels."""
    text = " ".join(text.split())
    while text and font(size).getlength(text) > width:
        text = text[:-2] + "…"
    return text


def wrap(text: str, width: float, size: int) -> list[str]:
    """The words of a text in lines of so many pixels at most; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def label_width(labels: Sequence[str]) -> int:
    return 2 * MARGIN + max(math.ceil(font(12).getlength(label)) for label in labels)


def contact_sheet(
    title: str,
    subtitle: str,
    rows: Mapping[str, Sequence[Image.Image]],
    cell: int | None = 128,
    columns: Sequence[str] = (),
) -> Image.Image:
    """Labelled rows of images below two lines of text, each image scaled into a cell, or as it is without one.

    `columns` are texts above the images of the first row, where all rows have images of the same widths.
    """
    labels = label_width(list(rows))
    scaled = {
        name: [im if cell is None else im.resize((cell, cell), Image.Resampling.LANCZOS) for im in images]
        for name, images in rows.items()
    }
    widths = [sum(image.width + GAP for image in images) for images in scaled.values()]
    heights = [max(image.height for image in images) + GAP for images in scaled.values()]
    lines = [(title, 13), (subtitle, 11)]
    longest = max(math.ceil(font(size).getlength(text)) for text, size in lines)
    width = max(labels + max(widths), min(2 * MARGIN + longest, LEAST_FOR_TITLES))
    first = next(iter(scaled.values()))
    heads = [wrap(text, image.width - MARGIN, 12) for text, image in zip(columns, first, strict=bool(columns))]
    head = 16 * max(map(len, heads), default=0)
    sheet = Image.new("RGB", (width, 44 + head + sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 5
    for text, size in lines:
        pen.text((MARGIN, top), shorten(text, sheet.width - 2 * MARGIN, size), fill="black", font=font(size))
        top += 18
    left = labels
    for text, image in zip(heads, first, strict=False):
        for i, line in enumerate(text):  # the last line just above the image
            pen.text((left, top + head - 16 * (len(text) - i)), line, fill="black", font=font(12))
        left += image.width + GAP
    top += head
    for (name, images), height in zip(scaled.items(), heights, strict=True):
        pen.text((MARGIN, top + height / 2), name, fill="black", font=font(12), anchor="lm")
        left = labels
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + GAP
        top += height
    return sheet


def frame(image: Image.Image) -> Image.Image:
    """The image with a green frame, inside its borders."""
    framed, width = image.copy(), max(2, image.width // 32)
    ImageDraw.Draw(framed).rectangle((0, 0, image.width - 1, image.height - 1), outline="limegreen", width=width)
    return framed


def tile(paths: Sequence[Path]) -> Image.Image:
    """Images of one size in a grid about as wide as high; one file is open at a time."""
    sizes = [Image.open(path).size for path in paths]
    width, height = (max(side) for side in zip(*sizes, strict=True))
    columns = max(1, round(math.sqrt(len(paths) * height / width)))
    whole = Image.new("RGB", (columns * width, -(-len(paths) // columns) * height), "white")
    for i, path in enumerate(paths):
        whole.paste(load_image(path), (i % columns * width, i // columns * height))
    return whole


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets one below the other."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


# --- where DoLa acted ------------------------------------------------------------------------------------------------


def where_map(image: Image.Image, jsd: np.ndarray, drawn_changed: np.ndarray, top: float) -> Image.Image:
    """The picture beside its token grid: JSD(q_N, p_hat) from 0 to `top` nats, redrawn tokens framed in red.

    `jsd` and `drawn_changed` are `[side, side]`; a token is redrawn where the baseline, after the same tokens and with
    the same noise, would have drawn another.
    """
    from matplotlib import colormaps  # here, so that painting without a trace does not need it

    colours = colormaps["viridis"](jsd / top if top > 0 else jsd)[..., :3]
    grid, pixels = _grid(colours)
    pen = ImageDraw.Draw(grid)
    for y, x in np.argwhere(drawn_changed).tolist():
        pen.rectangle((x * pixels, y * pixels, (x + 1) * pixels - 1, (y + 1) * pixels - 1), outline="red", width=2)
    return _beside(image, grid)


def layer_map(layers: np.ndarray) -> Image.Image:
    """Which layer early exit took for each token, `[side, side]`, as numbers on colours."""
    from matplotlib import colormaps

    ranks = np.searchsorted(np.unique(layers), layers)
    grid, pixels = _grid(colormaps["Pastel1"](ranks % 9)[..., :3])
    pen = ImageDraw.Draw(grid)
    for (y, x), layer in np.ndenumerate(layers):
        place = ((x + 0.5) * pixels, (y + 0.5) * pixels)
        pen.text(place, str(layer), fill="black", font=font(min(12, int(pixels * 0.7))), anchor="mm")
    return grid


def _grid(colours: np.ndarray) -> tuple[Image.Image, int]:
    """A cell for each colour `[side, side, 3]` in [0, 1], and its pixels."""
    pixels = max(14, MAP_SIDE // len(colours))
    side = len(colours) * pixels
    image = Image.fromarray((colours * 255).round().astype(np.uint8))
    return image.resize((side, side), Image.Resampling.NEAREST), pixels


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (2 * right.width + GAP, right.height), "white")
    both.paste(left.resize(right.size, Image.Resampling.LANCZOS), (0, 0))
    both.paste(right, (right.width + GAP, 0))
    return both
