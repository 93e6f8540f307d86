"""Labels that lie beside an image as files of their own, as WebDataset packs them."""

import json
from collections.abc import Iterable

LABEL_SUFFIXES = (b"cls", b"cls.txt", b"json")  # the first that a sample has counts
MOST_BYTES = 1 << 20  # of such a file
_FIELDS = ("label", "class", "cls")  # of a JSON object


def read_label(suffix: bytes, data: bytes) -> bytes:
    """What such a file says: a class's name, or its number in digits; empty where it says none.

    A negative number stands for none, as is usual.
    """
    try:
        found = json.loads(data) if suffix == b"json" else data.decode().strip()
    except (ValueError, RecursionError):
        return b""
    if suffix == b"json":
        found = next((found[field] for field in _FIELDS if field in found), None) if isinstance(found, dict) else None
    return _as_name(found)


def _as_name(found: object) -> bytes:
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int | str):
        return b""
    text = str(found).strip()
    if text.removeprefix("-").isascii() and text.removeprefix("-").isdecimal():
        text = "" if text.startswith("-") else text.lstrip("0") or "0"
    return text.encode(errors="backslashreplace") if text.isprintable() else b""


def by_number(names: Iterable[bytes]) -> list[bytes]:
    """Class names in order: numbers by value, before all others."""

    def place(name: bytes) -> tuple[bool, int, bytes, bytes]:
        number = name.lstrip(b"0") if name.isdigit() else b""  # no int, which 4,300 digits are too many for
        return not name.isdigit(), len(number), number, name

    return sorted(names, key=place)
