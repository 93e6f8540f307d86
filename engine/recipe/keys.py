"""The keys of a recipe: dataclass fields that say what they mean, their type and range; plain data's way into them.

It knows no key of any recipe. Every complaint is a `UserError`: one line that says what must be and what to do.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from engine.errors import UserError, one_line
from engine.recipe.plain import parse

# ---- fields ----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A range: how it reads after the type's name, and whether a value (each entry of a list) is in it.

    words: some that are in it, the nearest of which a wrong one may have been meant for.
    """

    text: str
    holds: Callable[[Any], bool]
    words: Sequence[str] = ()


ANY = Rule("", lambda value: True)

section = dataclasses.dataclass(frozen=True, kw_only=True)  # a table of keys


class Key(NamedTuple):
    """What a field says of its key, beside type and default."""

    doc: str
    rule: Rule
    since: int
    before: Any

    def is_as_before(self, value: Any) -> bool:
        """Whether the value is what stands for the key in recipes of the schemas that lacked it."""
        return self.since > 1 and value == self.before


def key(doc: str, rule: Rule = ANY, *, since: int = 1, before: Any = None, **default: Any) -> Any:
    """A field: its meaning in one sentence and its range; required unless it has a `default` or `default_factory`.

    since: the schema that it came with; before: its value in recipes of older schemas that leave it out, which must
    reproduce what ran before the key.
    """
    return dataclasses.field(metadata={"key": Key(doc, rule, since, before)}, **default)


def keys_of(kind: type, within: str = "") -> dict[str, dataclasses.Field]:
    """{dotted name: field} of every key of a recipe's dataclass, in its order, sections opened."""
    found = {}
    for field in dataclasses.fields(kind):
        name = within + field.name
        found |= keys_of(field.type, f"{name}.") if is_section(field) else {name: field}
    return found


def is_section(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(field.type)


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read(kind: type, raw: dict, schema: int, within: str = "") -> Any:
    """The dataclass `kind` from plain data of that schema, whose keys are known to be `kind`'s."""
    values = {}
    for field in dataclasses.fields(kind):
        name = within + field.name
        if is_section(field):
            inner = raw.get(field.name, {})
            if not isinstance(inner, dict):
                raise wrong(name, inner, "a mapping", f"write its keys below it, as {name}: {{key: value}}")
            values[field.name] = read(field.type, inner, schema, f"{name}.")
        elif field.name in raw:
            values[field.name] = _read_value(name, field, raw[field.name])
        elif field.metadata["key"].since > schema:
            values[field.name] = field.metadata["key"].before
        elif is_required(field):
            raise UserError(f"{name} (missing) must be {describe(field)}; add it to the recipe or pass {name}=VALUE")
    return kind(**values)


def _read_value(name: str, field: dataclasses.Field, raw: Any) -> Any:
    try:
        value = _convert(field.type, raw)
    except OverflowError as error:
        raise wrong(name, raw, f"{describe(field)}, and {error}") from None
    except TypeError:
        do = f"`{name}=` alone says null too: pass {name}=VALUE" if raw is None else ""
        raise wrong(name, raw, describe(field), do) from None
    entries = value if isinstance(value, tuple) else (value,)
    rule = field.metadata["key"].rule
    if value is not None and not all(rule.holds(entry) for entry in entries):
        raise wrong(name, raw, describe(field), _nearest(raw if isinstance(raw, str) else "", rule.words))
    return value


def _nearest(text: str, words: Sequence[str]) -> str:
    """A word that begins so, whatever stands before its slash, or else is nearly the same: vit_tiny is no vit_conv."""
    begins = [word for word in words if text and word.rpartition("/")[2].startswith(text)]
    nearest = begins or difflib.get_close_matches(text, words, 1, cutoff=0.8)
    return f"did you mean {nearest[0]}?" if nearest else ""


_BITS = {int: 63, float: 1023}  # of an integer: what a tensor and a seed can hold, and what surely is a finite float


def _convert(kind: Any, raw: Any) -> Any:
    """`raw` as a field of type `kind` holds it; TypeError if it is something else, OverflowError, with the limit, if it
    is too large. No text is taken for a number."""
    if kind in _BITS and type(raw) is int and raw.bit_length() > _BITS[kind]:
        raise OverflowError(f"below 2**{_BITS[kind]}") if raw > 0 else TypeError
    if _is_union(kind):
        return _convert_to_one(get_args(kind), raw)
    if get_origin(kind) is tuple and isinstance(raw, list) and raw:
        inner = _entries(kind, len(raw))
        if len(raw) == len(inner):
            return tuple(_convert(each, entry) for each, entry in zip(inner, raw, strict=True))
    if get_origin(kind) is Literal and isinstance(raw, str) and raw in get_args(kind):
        return raw
    if kind is float and type(raw) in (int, float) and math.isfinite(float(raw)):
        return float(raw)
    if (kind in (int, bool, str) and type(raw) is kind) or (kind is dict and isinstance(raw, dict) and _is_finite(raw)):
        return raw
    raise TypeError


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)  # `int | Literal[...]` is the former


def _convert_to_one(kinds: Sequence[Any], raw: Any) -> Any:
    """`raw` as the first of some types that can hold it."""
    for kind in kinds:
        if raw is None and kind is NoneType:
            return None
        with suppress(TypeError):
            return _convert(kind, raw)
    raise TypeError


def _entries(kind: Any, count: int) -> Sequence[Any]:
    """The types of a tuple's entries; of one of any length, `count` of them."""
    inner = get_args(kind)
    return inner[:1] * count if inner[-1] is ... else inner


def _is_finite(raw: Any) -> bool:
    """Nothing in it is nan or infinite: nan equals nothing, not even itself in the recipe of a resumed run."""
    if isinstance(raw, dict | list):
        return all(_is_finite(inner) for inner in (raw.values() if isinstance(raw, dict) else raw))
    return not isinstance(raw, float) or math.isfinite(raw)


_WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "printable text",
    dict: "a mapping of names to finite values",
}


def describe(field: dataclasses.Field) -> str:
    """What a field must be, in words: `an integer >= 1 or null`."""
    kind, rule = field.type, field.metadata["key"].rule.text
    if _is_union(kind):
        first, *others = get_args(kind)
        if get_origin(first) is tuple:
            return f"{_list_in_words(first, rule)} or null"
        several = ", or a list of such" if any(get_origin(other) is tuple for other in others) else ""
        words = [word for other in others if get_origin(other) is Literal for word in get_args(other)]
        words += ["null"] * (NoneType in others)
        return f"{_WORDS[first]}{rule}{several}{''.join(f' or {word}' for word in words)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return _list_in_words(kind, rule)
    return f"{_WORDS[kind]}{rule}"


def _list_in_words(kind: Any, rule: str) -> str:
    return f"a list of {len(get_args(kind))}, each {_WORDS[get_args(kind)[0]]}{rule}"


# ---- how an error reads ----------------------------------------------------------------------------------------------


def wrong(dotted: str, value: Any, must: str, do: str = "") -> UserError:
    """`key (value) must ...; do ...`."""
    return UserError(f"{dotted} ({show(value)}) must be {must}; {do or f'change the recipe or pass {dotted}=VALUE'}")


def show(value: Any) -> str:
    """A value as a recipe has it, on one line and no longer than a reader wants."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not _stands_for_itself(value):
        value = repr(value)
    try:
        text = one_line(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a huge integer"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _stands_for_itself(text: str) -> bool:
    """Whether it is read as it looks: '3' is no 3, and blanks at an end are not seen."""
    with suppress(UserError):
        return not text or parse(one_line(text), "text") == text
    return True
