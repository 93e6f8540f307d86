"""Files that are images of a set twice: by links, or in several roots. A file is known by a number of its own, whatever
it is called.

Shapes: N files.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from types import SimpleNamespace

import numpy as np

COLUMN = "file_numbers"  # of a listing
_AT_ONCE = 1 << 24  # numbers that are sorted together
_NONE = np.zeros(0, np.int64)
_IDENTITY = attrgetter("st_ino", "st_size", "st_mtime_ns")  # no st_dev: each machine that mounts a file has its own
_GONE = SimpleNamespace(st_ino=0, st_size=0, st_mtime_ns=0)


def number_of(file: os.stat_result | None) -> int:
    """Of 64 bits; the same one for all that are not there."""
    return hash(_IDENTITY(file or _GONE))


_NUMBER_OF_GONE = number_of(None)


def again(chunks: Callable[[], Iterable[np.ndarray]], count: int) -> int:
    """How many of `count` files, whose numbers come in chunks, each time anew, were there before."""
    parts, found = 1 + count // _AT_ONCE, 0
    for part in range(parts):
        chosen = (chunk[(chunk % parts == part) & (chunk != _NUMBER_OF_GONE)] for chunk in chunks())
        number_N = np.concatenate([_NONE, *chosen])
        found += len(number_N) - len(np.unique(number_N))
    return found


def in_both(one_N: np.ndarray, other_M: np.ndarray) -> int:
    """How many files of the second set the first has too; the first may be much larger, and is not sorted."""
    both = one_N[np.isin(one_N, other_M) & (one_N != _NUMBER_OF_GONE)]
    return int(np.isin(other_M, both).sum())


def in_several(sets: Sequence[np.ndarray]) -> int:
    """How many files of sets, each int64 [N], a set before had too; what is twice in one is not counted."""
    inside = sum(again(lambda one=one: [one], len(one)) for one in sets)
    return again(lambda: sets, sum(map(len, sets))) - inside
