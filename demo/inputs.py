"""What the page takes in, bounded: every refusal is one line, raised as ValueError."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dola_runtime import check_alpha, check_cfg_weight, check_gamma, check_number, check_temperature
from janus.dola.files import load_image
from janus.dola.layer_search.examples import IMAGE_TAG
from janus.dola.scorers import READ_BY
from janus.dola.variants import parse_variant, parse_variants

LONGEST_PROMPT, LONGEST_QUESTION, LONGEST_ANSWER, LONGEST_CANDIDATE = 500, 500, 300, 100
MOST_IMAGES, MOST_VARIANTS, MOST_CANDIDATES, MOST_TURNS, MOST_TOKENS = 8, 4, 40, 8, 256
MOST_PIXELS = 16_000_000
LARGEST_SEED = 2**32 - 1
LARGEST_UPLOAD = "20mb"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Read as pictures; not whatever else Pillow opens, some of it with programs of the server's."""

KINDS = ("off", "baseline", "APC only", "one layer", "early exit")
"""What a row of the page can say of a decoding."""


def check_text(name: str, text: Any, longest: int) -> str:
    """A text that is not blank, not too long, and nothing but text."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: write something")
    if len(text) > longest:
        raise ValueError(f"{name}: at most {longest} characters, got {len(text)}")
    if IMAGE_TAG in text or re.search("[\ud800-\udfff\0]", text):
        raise ValueError(f"{name}: holds what is no text")
    return text


def check_count(name: str, value: Any, most: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most or value % 1:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value!r}"[:200])
    return int(value)


def check_sampling(guidance: Any, temperature: Any) -> tuple[float, float]:
    check_cfg_weight(guidance)
    check_temperature(temperature)
    return float(guidance), float(temperature)


def check_specs(specs: Any) -> list[str]:
    """One to four decodings, as `--compare` takes them."""
    if not isinstance(specs, list) or not 1 <= len(specs) <= MOST_VARIANTS:
        raise ValueError(f"decodings: expected 1 to {MOST_VARIANTS}")
    for spec in specs:
        check_text("decodings", spec, LONGEST_CANDIDATE)
        if spec != spec.strip() or spec.startswith(("-", "@")):
            raise ValueError(f"decodings: {spec!r} is none")
    parse_variants(specs)
    return specs


def check_scorer(scorer: Any) -> str | None:
    """A scorer of Janus's own, by name alone: a function of the user's would be code of the visitor's choice."""
    if scorer in (None, "", "none"):
        return None
    if scorer not in READ_BY:
        raise ValueError(f"best of: expected none, {', '.join(READ_BY)}, got {scorer!r}"[:200])
    return scorer


def write_spec(kind: Any, layers: Any, alpha: Any, gamma: Any) -> str | None:
    """A row of the page as `--compare` would have it; None for one that is off."""
    if kind not in KINDS:
        raise ValueError(f"decodings: expected one of {', '.join(KINDS)}")
    if kind in ("off", "baseline"):
        return None if kind == "off" else kind
    check_alpha(alpha)
    if kind == "APC only":
        return f"apc,alpha={alpha:g}"
    check_gamma(gamma)
    numbers = re.findall("[0-9]{1,4}", layers) if isinstance(layers, str) else []
    if not numbers or re.sub("[0-9, ]", "", layers) or (kind == "one layer") != (len(numbers) == 1):
        expected = "one number" if kind == "one layer" else "at least two numbers, as in 2,4,6"
        raise ValueError(f"{kind}: expected {expected}, got {layers!r}"[:200])
    key = "layer" if kind == "one layer" else "exit"
    return f"{key}={','.join(numbers)},alpha={alpha:g}" + ("" if gamma == 1 else f",gamma={gamma:g}")


def write_specs(rows: Sequence[Any]) -> list[str]:
    """All rows of the page, four values each, to the decodings that are not off."""
    found = [write_spec(*rows[i : i + 4]) for i in range(0, len(rows), 4)]
    return check_specs([spec for spec in found if spec is not None])


def read_contrast(spec: Any) -> dict[str, Any]:
    """A decoding of answers to the keywords of `DoLaLogitsProcessor`."""
    values = parse_variant(check_text("decoding", spec, LONGEST_CANDIDATE))
    for keyword in ("cfg_order", "cfg_weight", "temperature"):
        if keyword in values:
            raise ValueError(f"decoding {spec!r}: answers have no {keyword}")
    check_number("alpha", values.get("alpha", 0.1), 0.0, 1.0)
    return values


def check_candidates(text: Any) -> list[str]:
    """A line for each candidate; none, or at least two."""
    lines = text.splitlines() if isinstance(text, str) else []
    candidates = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(candidates) == 1 or len(candidates) > MOST_CANDIDATES:
        raise ValueError(f"candidates: expected none or 2 to {MOST_CANDIDATES} lines, got {len(candidates)}")
    return [check_text("candidates", candidate, LONGEST_CANDIDATE) for candidate in candidates]


def check_picture(path: str | Path) -> Path:
    """A picture's file, read to its end, whose name is not for the visitor to see."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"at most {MOST_PIXELS:,} pixels, got {width} x {height}")
            if max(width, height) > 20 * min(width, height):
                raise ValueError(f"too long and thin ({width} x {height})")
        load_image(path)
    except Image.UnidentifiedImageError:
        raise ValueError(f"picture: not an image ({', '.join(FORMATS)})") from None
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture: {error}".replace(f"{path}", "the file")) from None
    return Path(path)
