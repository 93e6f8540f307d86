"""What some images hold, so that others under the same names and sizes are noticed."""

import hashlib
from collections.abc import Mapping

import numpy as np

from engine.data.source import Source

SAMPLED = 64  # images of a source
UNREADABLE = "unreadable"  # stands for the checksum of an image that cannot be read


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0..count-1, the first and the last among them, evenly spread; the same ones each time."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def sample(source: Source) -> dict[str, str]:
    """{number of an image: checksum of what it holds} for images spread over the source, read one after the other."""
    return {str(i): _checksum(source, i) for i in spread(len(source), SAMPLED)}


def count(checksums: Mapping[str, str]) -> int | None:
    """How many images a source had that `sample` looked at, the last one too; None where that is not known."""
    return max(map(int, checksums)) + 1 if checksums else None


def _checksum(source: Source, i: int) -> str:
    try:
        return hashlib.sha256(source.content(i)).hexdigest()[:16]
    except Exception:  # whatever its files, or whoever decodes them, have to say
        return UNREADABLE


def difference(source: Source, before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first image that holds something else than `before`, in words; None where there is none.

    An image of which nothing is known from one of the two samples is left out.
    """
    for i, checksum in now.items():
        if before.get(i, UNREADABLE) not in (UNREADABLE, checksum):
            what = "cannot be read" if checksum == UNREADABLE else "holds something else"
            return f"{source.name(int(i))} {what}"
    return None
