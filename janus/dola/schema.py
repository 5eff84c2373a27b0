"""What a JSON file may hold: a table of its keys and the values each accepts, checked before anything is built."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ABSENT, REQUIRED = object(), object()


class Field(NamedTuple):
    """`expected` says in words what `accepts` tests; `default` stands for a key left out, where there is one."""

    expected: str
    accepts: Callable[[Any], bool]
    default: Any = ABSENT


class Nullable(NamedTuple):
    """A key that may hold null, or be left out."""

    rule: "Rule"


Rule = Field | Nullable | Mapping[str, Any]
"""The rule of one key: a mapping is the table of a nested object."""


def mismatch(key: str, expected: str, found: Any) -> ValueError:
    """The error of a value that a table does not accept: one line."""
    return ValueError(f"{key}: expected {expected}, found {_shown(found)}")


def _shown(found: Any) -> str:
    if found is ABSENT:
        return "nothing"
    if isinstance(found, dict | list):
        return f"{'an object' if isinstance(found, dict) else 'a list'} of {len(found)}"
    shown = json.dumps(found)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def complete(content: Any, table: Mapping[str, Rule], prefix: str = "") -> dict[str, Any]:
    """The keys of `content` that `table` names, checked, with its defaults for those left out; other keys are dropped.

    Raises ValueError for the first value that is not accepted.
    """
    if not isinstance(content, dict):
        raise mismatch(prefix, "an object", content)
    values = {}
    for key, rule in table.items():
        name = f"{prefix}.{key}" if prefix else key
        found = content.get(key, ABSENT)
        if isinstance(rule, Nullable):
            if found is None or found is ABSENT:
                continue
            rule = rule.rule
        if isinstance(rule, Mapping):
            values[key] = complete({} if found is ABSENT else found, rule, name)
            continue
        assert isinstance(rule, Field)
        if found is ABSENT and rule.default is not REQUIRED:
            found = rule.default
        elif found is ABSENT or not rule.accepts(found):
            raise mismatch(name, rule.expected, found)
        if found is not ABSENT:
            values[key] = found
    return values


def whole(low: int, high: int, default: Any = ABSENT) -> Field:
    return Field(f"a whole number in {low}..{high}", lambda v: type(v) is int and low <= v <= high, default)


def number(low: float, high: float, default: Any = ABSENT) -> Field:
    def accepts(v):
        return type(v) in (int, float) and math.isfinite(v) and low <= v <= high

    return Field(f"a number in {low:g}..{high:g}", accepts, default)


def flag(default: Any = ABSENT) -> Field:
    return Field("true or false", lambda v: type(v) is bool, default)


def text(default: Any = ABSENT) -> Field:
    return Field("a text", lambda v: type(v) is str, default)


def one_of(*values: Any, default: Any = ABSENT) -> Field:
    return Field(" or ".join(json.dumps(v) for v in values), lambda v: v in values, default)


def either(one: Field, other: Field) -> Field:
    return Field(f"{one.expected} or {other.expected}", lambda v: one.accepts(v) or other.accepts(v), one.default)


def several(field: Field, low: int, high: int, default: Any = ABSENT) -> Field:
    """A list of `low` to `high` values, each of which `field` accepts."""
    count = f"{low}" if low == high else f"{low} to {high}"
    return Field(
        f"a list of {count} values, each {field.expected}",
        lambda v: type(v) is list and low <= len(v) <= high and all(field.accepts(entry) for entry in v),
        default,
    )
