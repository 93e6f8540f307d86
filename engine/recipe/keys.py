"""The keys of a section: dataclass fields that state type and range, and the way of plain data into them.

It knows no key of any recipe. Every complaint is a `UserError`: one line that says what must be and what to do.
"""

import dataclasses
import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from engine.errors import UserError, one_line

# ---- fields ----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A range: how it reads after the type's name, and whether a value (each entry of a list) is in it."""

    text: str
    holds: Callable[[Any], bool]


def key(rule: Rule | None = None, **default: Any) -> Any:
    """A dataclass field with its range; required unless it has a `default` or `default_factory`."""
    return dataclasses.field(metadata={"rule": rule or Rule("", lambda value: True)}, **default)


def read_section(name: str, kind: type, raw: dict) -> Any:
    """The dataclass `kind` from the plain data of the section `name`, whose keys are known to be `kind`'s."""
    values = {}
    for field in dataclasses.fields(kind):
        dotted = f"{name}.{field.name}"
        if field.name in raw:
            values[field.name] = _read(dotted, field, raw[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            do = f"add it to the recipe or pass {dotted}=VALUE"
            raise UserError(f"{dotted} (missing) must be {_describe(field)}; {do}")
    return kind(**values)


def _read(dotted: str, field: dataclasses.Field, raw: Any) -> Any:
    rule = field.metadata["rule"]
    try:
        value = _convert(field.type, raw)
    except (TypeError, OverflowError):
        raise wrong(dotted, raw, _describe(field)) from None
    entries = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(rule.holds(entry) for entry in entries):
        raise wrong(dotted, raw, _describe(field))
    return value


def _convert(kind: Any, raw: Any) -> Any:
    """`raw` as a field of type `kind` holds it; TypeError if it is something else. No text is taken for a number."""
    if isinstance(kind, UnionType):
        return None if raw is None else _convert(_without_null(kind), raw)
    if get_origin(kind) is tuple and isinstance(raw, list) and len(raw) == len(get_args(kind)):
        return tuple(_convert(inner, entry) for inner, entry in zip(get_args(kind), raw, strict=True))
    if get_origin(kind) is Literal and isinstance(raw, str) and raw in get_args(kind):
        return raw
    if kind is float and type(raw) in (int, float) and math.isfinite(float(raw)):
        return float(raw)
    if kind is int and type(raw) is int and abs(raw) < 2**63:  # what a tensor and a seed can hold
        return raw
    if (kind in (bool, str) and type(raw) is kind) or (kind is dict and isinstance(raw, dict) and _is_finite(raw)):
        return raw
    raise TypeError


def _is_finite(raw: Any) -> bool:
    """Nothing in it is nan or infinite: nan equals nothing, not even itself in the recipe of a resumed run."""
    if isinstance(raw, dict | list):
        return all(_is_finite(inner) for inner in (raw.values() if isinstance(raw, dict) else raw))
    return not isinstance(raw, float) or math.isfinite(raw)


def _without_null(kind: UnionType) -> type:
    return next(inner for inner in get_args(kind) if inner is not NoneType)


_WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "printable text",
    dict: "a mapping of names to finite values",
}


def _describe(field: dataclasses.Field) -> str:
    """What a field must be, in words: `an integer >= 1 or null`."""
    kind, rule = field.type, field.metadata["rule"].text
    if isinstance(kind, UnionType):
        return f"{_WORDS[_without_null(kind)]}{rule} or null"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))}, each {_WORDS[get_args(kind)[0]]}{rule}"
    return f"{_WORDS[kind]}{rule}"


# ---- how an error reads ----------------------------------------------------------------------------------------------


def wrong(dotted: str, value: Any, must: str, do: str = "") -> UserError:
    """`key (value) must ...; do ...`."""
    return UserError(f"{dotted} ({show(value)}) must be {must}; {do or f'change the recipe or pass {dotted}=VALUE'}")


def show(value: Any) -> str:
    """A value as a recipe has it, on one line and no longer than a reader wants."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = one_line(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."
