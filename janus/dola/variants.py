"""Decodings to set side by side, written as `baseline`, `apc`, `layer=4,alpha=0.5` or `exit=2,4,6,gamma=0.5`."""

from collections.abc import Sequence
from typing import Any


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _one_of(**values: Any):
    def read(text: str) -> Any:
        if text not in values:
            raise ValueError
        return values[text]

    return read


KINDS: dict[str, dict[str, Any]] = {"baseline": {"use_dola": False}, "apc": {"gamma": 0.0}, "dola": {}}
KEYS = {
    "layer": ("layer", int, "a whole number"),
    "ratio": ("layer_ratio", float, "a number"),
    "exit": ("candidate_layers", _layers, "layers as 2,4,6"),
    "alpha": ("alpha", float, "a number"),
    "gamma": ("gamma", float, "a number"),
    "norm": ("norm", _one_of(on=True, off=False), "on or off"),
    "order": (
        "cfg_order",
        _one_of(guide_first="guide_first", contrast_first="contrast_first"),
        "guide_first or contrast_first",
    ),
    "cfg": ("cfg_weight", float, "a number"),
    "temperature": ("temperature", float, "a number"),
}
"""Key of a spec -> (keyword of the functions that decode, reader of its value, what is expected)."""
LAYER_KEYS = ("layer", "ratio", "exit")
LAYER_KEYWORDS = tuple(KEYS[key][0] for key in LAYER_KEYS)
CONTRAST_KEYS = (*LAYER_KEYS, "alpha", "gamma", "norm", "order")


def parse_variant(spec: str) -> dict[str, Any]:
    """A spec to the keywords that it sets, in the order of `KEYS`; what it leaves out is the command's.

    It is a comma-separated list of keys with values, behind `baseline`, `apc` (the mask alone) or `dola` (what the
    command does by itself) or without: `layer=6` is `dola,layer=6`. Raises ValueError that names the spec.
    """
    kind, *parts = spec.split(",") if spec.split(",")[0] in KINDS else ("dola", *spec.split(","))
    texts: dict[str, str] = {}
    for part in parts:
        key, equals, text = (x.strip() for x in part.partition("="))
        if not equals and list(texts)[-1:] == ["exit"]:  # the next of its layers
            texts["exit"] += f",{key}"
        elif not equals or key not in KEYS or key in texts:
            problem = "is given twice" if key in texts else f"is none of {', '.join([*KINDS, *KEYS])}"
            raise ValueError(f"variant {spec!r}: {key!r} {problem}")
        else:
            texts[key] = text
    if len(set(LAYER_KEYS) & set(texts)) > 1:
        raise ValueError(f"variant {spec!r}: give one of {', '.join(LAYER_KEYS)}")
    if kind == "baseline" and (wrong := [key for key in texts if key in CONTRAST_KEYS]):
        raise ValueError(f"variant {spec!r}: the baseline has no {wrong[0]}")
    if kind == "apc" and "gamma" in texts:
        raise ValueError(f"variant {spec!r}: apc is gamma=0")
    values = dict(KINDS[kind])
    for key, (keyword, read, expected) in KEYS.items():
        if key in texts:
            try:
                values[keyword] = read(texts[key])
            except ValueError:
                raise ValueError(f"variant {spec!r}: {key} must be {expected}, got {texts[key]!r}") from None
    return values


def fill_variant(own: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What a spec sets, and the command's own values for the rest; a spec that names layers replaces the command's."""
    names_layer = any(keyword in own for keyword in LAYER_KEYWORDS)
    return {k: x for k, x in usual.items() if not (names_layer and k in LAYER_KEYWORDS)} | own


def variant_name(values: dict[str, Any]) -> str:
    """A short name for folders and manifests, the same for every spelling: `baseline`, `layer4_alpha0.5`, `exit2-4`."""
    parts = [kind for kind in ("baseline", "apc") if KINDS[kind].items() <= values.items()]
    for key, (keyword, _, _) in KEYS.items():
        if keyword not in values or (key == "gamma" and "apc" in parts):
            continue
        value = values[keyword]
        if isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, tuple):
            value = "-".join(map(str, value))
        parts.append(f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}")
    return "_".join(parts) or "dola"


def parse_variants(specs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> keywords of each spec, in their order. Raises ValueError for a bad spec and for one given twice."""
    variants: dict[str, dict[str, Any]] = {}
    for spec in specs:
        values = parse_variant(spec)
        if (name := variant_name(values)) in variants:
            raise ValueError(f"variant {spec!r} is given twice")
        variants[name] = values
    return variants
