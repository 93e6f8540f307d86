"""Whether files that were listed once are as they were, without a look at each: the times of their folders say it.

Shapes: F folders.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.collect import Collector
from engine.data.contents import spread
from engine.data.listing import Columns, Listing, is_worth_a_file
from engine.data.names import Names
from engine.data.rules import RULES
from engine.logger import warn

TICK_NS = 2 * 10**9  # of the coarsest clock of a file system
LOOKED_AT = 256  # files, spread over the list: one that is written over changes no folder's time

Times = tuple[int, int]
Timed = tuple[Columns, dict[str, Any], np.ndarray]  # a listing, and the times of its folders, int64 [F, 2]


def times_of(path: Path | os.DirEntry[bytes] | bytes) -> Times:
    """When a folder's entries changed, twice: the second cannot be set back by who copies it; -1 where it is gone."""
    try:
        status = os.stat(path)  # noqa: PTH116 (of millions, as they come)
    except OSError:
        return -1, -1
    return status.st_mtime_ns, status.st_ctime_ns


def append_times(collector: Collector, times: Mapping[bytes, Times]) -> np.ndarray:
    """Keep the folders' times in a listing; int64 [F, 2]."""
    time_F2 = np.array(list(times.values()), np.int64)
    collector.append_names("folder", Names.of(times))
    collector.append("folder_times", time_F2)
    return time_F2


def list_settled(
    what: Path, list_once: Callable[[], tuple[Columns, dict, np.ndarray]]
) -> tuple[Columns, dict[str, Any]]:
    """What `list_once` finds, with its folders' times; once more where one was changed just now: what is changed in the
    same tick of a clock changes no time. Its `settled` is whether all times are of use."""
    columns, facts, waits = _timed(list_once)
    if waits and is_worth_a_file(facts):
        time.sleep(waits / 1e9)
        columns, facts, waits = _timed(list_once)
        if waits:
            warn(f"{what} is being changed, or its times are wrong: every rank looks at all its files, at each start")
    return columns, facts | {"settled": not waits, "rules": RULES}


def _timed(list_once: Callable[[], Timed]) -> tuple[Columns, dict, int]:
    """A list, and how many nanoseconds it came too soon, or without times."""
    began = time.time_ns()
    columns, facts, time_F2 = list_once()
    known = time_F2[time_F2 != -1]
    soon = TICK_NS - (began - int(known.max())) if known.size and known.min() > 0 else TICK_NS
    return columns, facts, max(0, min(soon, TICK_NS))


def is_unchanged(root: Path, listing: Listing, lead: bytes = b"") -> bool:
    """Whether no folder has another time; and some of the files, and all that could not be found, are as they were.

    root: to which all paths are relative; lead: how those of images begin.
    """
    if listing.facts.get("rules") != RULES:
        return False
    folders, time_F2 = listing.names_of("folder"), listing.arrays["folder_times"].reshape(-1, 2)
    for folder, times in zip(folders, time_F2.tolist(), strict=True):
        if times_of(root / os.fsdecode(folder)) != tuple(times):
            return False
    files = [*spread(len(listing), LOOKED_AT), *listing.arrays["lost"].tolist()]
    return all(_size(root / os.fsdecode(lead + listing.names[i])) == listing.sizes_N[i] for i in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
