"""The drawn scenes janus-tiny is trained and judged on: grammar, renderer, questions, held-out lists.

The grammar is fixed: 64x64 pixels, one object ("a large red star on a gray background") or two ("a red star left of
a blue cross on a gray background"). A tenth of the one-object captions and a tenth of the unordered two-object
(colour, shape) pairs are listed in `held_out.json` and never trained on.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "pink": (245, 150, 190),
    "cyan": (60, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
BACKGROUNDS = {"white": 245, "black": 20, "gray": 128}
SIZES = {"small": 0.22, "large": 0.38}
RELATIONS = {"left of": ((0.27, 0.5), (0.73, 0.5)), "above": ((0.5, 0.27), (0.5, 0.73))}
PAIR_RADIUS = 0.20
JITTER = 1  # whole pixels by which a scene is shifted, each way, in x and in y
SUPERSAMPLING = 8

Object = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Scene:
    """One drawing: one object and its `size`, or two objects and their `relation`."""

    objects: tuple[Object, ...]
    background: str
    size: str | None = None
    relation: str | None = None

    @property
    def caption(self) -> str:
        named = [f"{colour} {shape}" for colour, shape in self.objects]
        what = f"a {self.size} {named[0]}" if self.size else f"a {named[0]} {self.relation} a {named[1]}"
        return f"{what} on a {self.background} background"

    @property
    def places(self) -> list[tuple[str, float, float, float]]:
        """(shape, centre x, centre y, radius) of each object, as shares of the side."""
        if self.size:
            return [(self.objects[0][1], 0.5, 0.5, SIZES[self.size])]
        centres = RELATIONS[str(self.relation)]
        return [(shape, x, y, PAIR_RADIUS) for (_, shape), (x, y) in zip(self.objects, centres, strict=True)]


def one_object_scenes() -> list[Scene]:
    """All 288 one-object scenes."""
    return [Scene(((c, s),), b, size=z) for z in SIZES for c in COLOURS for s in SHAPES for b in BACKGROUNDS]


def two_object_scenes() -> list[Scene]:
    """All 13,536 two-object scenes; the two objects always differ in colour, shape or both."""
    objects = [(c, s) for c in COLOURS for s in SHAPES]
    return [
        Scene((a, b), g, relation=r) for a in objects for b in objects if a != b for r in RELATIONS for g in BACKGROUNDS
    ]


@cache
def _held_out() -> tuple[frozenset[str], frozenset[frozenset[Object]]]:
    lists = json.loads(Path(__file__).with_name("held_out.json").read_text(encoding="utf-8"))
    pairs = frozenset(frozenset((a, b)) for a, b in (map(tuple, pair) for pair in lists["two_object_pairs"]))
    return frozenset(lists["one_object_captions"]), pairs


def is_held_out(scene: Scene) -> bool:
    captions, pairs = _held_out()
    return scene.caption in captions if scene.size else frozenset(scene.objects) in pairs


def polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of `shape` (any but the circle) of radius `r` around (x, y); y grows downwards."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "star":
        turns = [(k * math.pi / 5, r if k % 2 == 0 else 0.4 * r) for k in range(10)]
        return [(x + rho * math.sin(turn), y - rho * math.cos(turn)) for turn, rho in turns]
    if shape == "cross":
        arm = [(-r / 3, -r), (r / 3, -r), (r / 3, -r / 3)]  # then turned by a quarter, three times
        corners = arm + [(-dy, dx) for dx, dy in arm] + [(-dx, -dy) for dx, dy in arm] + [(dy, -dx) for dx, dy in arm]
        return [(x + dx, y + dy) for dx, dy in corners]
    raise ValueError(f"shape {shape!r} has no corners")


@cache
def coverage(shape: str, x: float, y: float, r: float) -> np.ndarray:
    """How much of each pixel the shape covers, float32 [64, 64] in [0, 1]; x, y, r in pixels."""
    canvas = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    # supersampled pixel i is centred on i + 0.5, and PIL fills the pixels that an outline touches
    cx, cy, radius = (value * SUPERSAMPLING - 0.5 for value in (x, y, r))
    if shape == "circle":
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
    else:
        draw.polygon(polygon(shape, cx, cy, radius), fill=255)
    covered = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255
    covered.setflags(write=False)
    return covered


def render(scene: Scene, dx: float = 0, dy: float = 0) -> np.ndarray:
    """Draws the scene shifted by (dx, dy) pixels: uint8 [64, 64, 3]."""
    image = np.full((SIDE, SIDE, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    for (colour, _), (shape, x, y, r) in zip(scene.objects, scene.places, strict=True):
        mask = coverage(shape, x * SIDE + dx, y * SIDE + dy, r * SIDE)[..., None]
        image += mask * (np.array(COLOURS[colour], dtype=np.float32) - image)
    return image.round().astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Renders the scene with a little jitter: uint8 [64, 64, 3]."""
    dx, dy = rng.integers(-JITTER, JITTER + 1, 2).tolist()
    return render(scene, dx, dy)


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Every (kind, question, answer) that the scene settles without ambiguity."""
    (colour, shape), *others = scene.objects
    asked = [
        ("background", "What colour is the background?", scene.background),
        ("count", "How many objects are there?", "one" if scene.size else "two"),
        ("caption", "What is in the image?", scene.caption),
    ]
    if scene.size:
        asked += [
            ("colour", "What colour is the object?", colour),
            ("shape", "What shape is the object?", shape),
            ("size", "What size is the object?", scene.size),
        ]
    for c, s in scene.objects:
        if all(s != other[1] for other in scene.objects if other != (c, s)):
            asked.append(("colour", f"What colour is the {s}?", c))
        if all(c != other[0] for other in scene.objects if other != (c, s)):
            asked.append(("shape", f"What shape is the {c} object?", s))
    for c, s in others:
        asked.append(("relation", f"What is {scene.relation} the {c} {s}?", f"a {colour} {shape}"))
    return asked


@cache
def _stencils() -> np.ndarray:
    """Masks of every shape where the grammar puts one, shifted by up to 2 pixels: [6 places, 6 shapes, 25, 4096]."""
    places = [(0.5, 0.5, r) for r in SIZES.values()]
    places += [(x, y, PAIR_RADIUS) for pair in RELATIONS.values() for x, y in pair]
    shifts = [(dx, dy) for dx in range(-2, 3) for dy in range(-2, 3)]
    masks = [
        [[coverage(shape, x * SIDE + dx, y * SIDE + dy, r * SIDE) for dx, dy in shifts] for shape in SHAPES]
        for x, y, r in places
    ]
    return np.stack(masks).reshape(len(places), len(SHAPES), len(shifts), -1)


def judge(image: np.ndarray) -> tuple[Scene, float]:
    """The scene of the whole grammar whose drawing is nearest to `image` (uint8 [64, 64, 3]), and how far it lies.

    Each object may be up to 2 pixels off its place. The distance is the root mean square over pixels and channels, in
    grey levels. Exact, without drawing all scenes: objects do not overlap, so their shares of the error add up.
    """
    x = image.reshape(-1, 3).astype(np.float32)
    masks = _stencils()
    backgrounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    tint = colours - backgrounds[:, None, None]  # [background, colour, channel]
    overlap = masks @ x  # [place, shape, shift, channel]
    overlap = overlap[None] - backgrounds[:, None, None, None, None] * masks.sum(-1)[None, ..., None]
    # |x - b - m t|^2 = |x - b|^2 - 2 t.<m, x - b> + |m|^2 |t|^2, summed over pixels
    gain = np.einsum("bkc,bpsjc->bpksj", tint, overlap)
    cost = (masks**2).sum(-1)[None, :, None] * (tint**2).sum(-1)[:, None, :, None, None] - 2 * gain
    cost = cost.min(-1).reshape(len(backgrounds), len(masks), -1)  # [background, place, colour x shape]
    blank = ((x[None] - backgrounds[:, None, None]) ** 2).sum((1, 2))
    one = blank[:, None, None] + cost[:, :2]
    two = blank[:, None, None, None] + cost[:, 2::2, :, None] + cost[:, 3::2, None, :]
    two[..., range(two.shape[-1]), range(two.shape[-1])] = np.inf
    objects = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    error = max(float(min(one.min(), two.min())), 0.0)
    if one.min() <= two.min():
        b, z, a = np.unravel_index(one.argmin(), one.shape)
        scene = Scene((objects[a],), list(BACKGROUNDS)[b], size=list(SIZES)[z])
    else:
        b, r, first, second = np.unravel_index(two.argmin(), two.shape)
        scene = Scene((objects[first], objects[second]), list(BACKGROUNDS)[b], relation=list(RELATIONS)[r])
    return scene, math.sqrt(error / x.size)


CLEAN = 10.9
"""Grey levels from a drawing: what 99% of true ones kept after janus-tiny's VQ model when this was fixed. It stays, so
that later checkpoints are held to the same; `tools.eval_janus_tiny` also tells what today's VQ model keeps."""


def prompt_met(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A scorer of painted scenes: 1 where the nearest drawing of the grammar is the prompt's own, else 0.

    Raises ValueError for a prompt that is no caption of the grammar, and for an image of another size.
    """
    return _met(images, prompts, math.inf)


def prompt_met_clean(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """`prompt_met` by an image that lies no further than `CLEAN` from that drawing."""
    return _met(images, prompts, CLEAN)


def _met(images: Sequence[Image.Image], prompts: Sequence[str], farthest: float) -> list[float]:
    if unknown := [prompt for prompt in prompts if prompt not in _captions()]:
        raise ValueError(f"{unknown[0]!r} is no caption of a drawn scene")
    if sizes := {image.size for image in images} - {(SIDE, SIDE)}:
        raise ValueError(f"a drawn scene has {SIDE} x {SIDE} pixels, this image {sizes.pop()}")
    read = [judge(np.asarray(image.convert("RGB"))) for image in images]
    return [float(s.caption == prompt and d <= farthest) for (s, d), prompt in zip(read, prompts, strict=True)]


@cache
def _captions() -> frozenset[str]:
    return frozenset(scene.caption for scene in one_object_scenes() + two_object_scenes())
