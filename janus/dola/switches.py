"""What to switch on and how strongly, in one JSON file that every command reads with `--config` and `--domain`."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dola_runtime import check_alpha, check_gamma
from janus.dola.files import read_json_file, write_whole


@dataclass(frozen=True)
class DoLaSwitches:
    """The switches of the two-tower plan (section 4.5). Raises ValueError for a value of a wrong type or range.

    use_dola_siglip_static, use_dola_lm_static, use_dola_gen_static: contrast in the tower, for words, in painting.
    lambda_mm: weight of the vision prior on the language side, in [0, 1]; 0 is no fusion.
    alpha_V, alpha_L, alpha_gen: plausibility thresholds of the tower, of words (lm_head) and of image codes (gen_head),
        in [0, 1]. The tower's default is the least that did no harm among 5 to 13,536 captions (docs/understanding.md).
    gamma_V, gamma_L, gamma_gen: their contrasts' weights; 1 is DoLa, 0 leaves the mask alone.
    fixed_layer_vit, fixed_layer_llm, fixed_layer_gen: their contrast layers, counted from 1; None is 0.8 of the depth.
        The last two are both layers of the language model.
    mm_topk_for_T: how many candidates, the most probable ones, the vision prior speaks for.
    """

    use_dola_siglip_static: bool = True
    use_dola_lm_static: bool = True
    use_dola_gen_static: bool = True
    lambda_mm: float = 0.7
    alpha_V: float = 0.5
    alpha_L: float = 0.1
    alpha_gen: float = 0.1
    gamma_V: float = 1.0
    gamma_L: float = 1.0
    gamma_gen: float = 1.0
    fixed_layer_vit: int | None = None
    fixed_layer_llm: int | None = None
    fixed_layer_gen: int | None = None
    mm_topk_for_T: int = 5

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            expected, fits = {
                bool: ("true or false", isinstance(value, bool)),
                float: ("a number", isinstance(value, (int, float)) and not isinstance(value, bool)),
                int: ("a whole number", isinstance(value, int) and not isinstance(value, bool)),
                type(None): ("a whole number or null", value is None or type(value) is int),
            }[type(field.default)]
            if not fits:
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")
        for name in ("lambda_mm", "alpha_V", "alpha_L", "alpha_gen"):
            check_alpha(getattr(self, name), name)
        for name in ("gamma_V", "gamma_L", "gamma_gen"):
            check_gamma(getattr(self, name), name)
        for name in ("fixed_layer_vit", "fixed_layer_llm", "fixed_layer_gen", "mm_topk_for_T"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @classmethod
    def from_json(cls, path: str | os.PathLike, domain: str | None = None) -> "DoLaSwitches":
        """Read the switches of a file: `{switch: value, ..., "domains": {name: {switch: value, ...}}}`.

        What stands under "why", there and in a domain, is for people.

        A domain starts from the file's own values, and those from the defaults. Raises ValueError, one line that
        names the file, for one that is not there or not such JSON, an unknown key, a wrong value, in whichever domain
        it stands, and for a domain that the file does not have.
        """
        content = read_json_file(path)
        domains = content.pop("domains", {}) if isinstance(content, dict) else {}
        if not isinstance(domains, dict):
            raise ValueError(f"{path}: domains must be an object of named domains, got {domains!r}")
        read = {None: cls()._updated(content, f"{path}")}
        read |= {name: read[None]._updated(values, f"{path}: domain {name!r}") for name, values in domains.items()}
        if domain not in read:
            raise ValueError(f"{path}: no domain {domain!r} (domains: {', '.join(domains) or 'none'})")
        return read[domain]

    def _updated(self, values: Any, where: str) -> "DoLaSwitches":
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object of switches, got {values!r}")
        values = {key: value for key, value in values.items() if key != "why"}
        names = [field.name for field in fields(self)]
        if unknown := [key for key in values if key not in names]:
            raise ValueError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(names)})")
        try:
            return replace(self, **values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_json(self, path: str | os.PathLike, domains: Mapping[str, "DoLaSwitches"] | None = None) -> None:
        """Write a file that `from_json` reads; of each domain, what differs from these switches."""
        content: dict[str, Any] = asdict(self)
        if domains:
            content["domains"] = {
                name: {key: value for key, value in asdict(switches).items() if value != content[key]}
                for name, switches in domains.items()
            }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
