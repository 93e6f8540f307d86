"""Whether files that were listed once are as they were, without a look at each: the times of their folders say it.

Shapes: F folders.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import twice
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


def list_settled(what: Path, list_once: Callable[[], Timed]) -> tuple[Columns, dict[str, Any]]:
    """What `list_once` finds, with its folders' times; once more where one was changed just now, or has a time that is
    still to come: what is changed in the same tick of a clock changes no time. Its `settled` is whether all times are
    of use."""
    columns, facts, time_F2, wait = _timed(list_once)
    if wait and is_worth_a_file(facts) and not _timeless(time_F2):
        former_F2 = time_F2
        time.sleep(wait / 1e9)
        columns, facts, time_F2, wait = _timed(list_once)
        wait *= not np.array_equal(time_F2, former_F2)  # a tick later all is as it was: the clock is wrong, and goes on
    if wait and is_worth_a_file(facts):
        warn(_why_unsettled(what, _timeless(time_F2)))
    return columns, facts | {"settled": not wait, "rules": RULES}


def _timed(list_once: Callable[[], Timed]) -> tuple[Columns, dict, np.ndarray, int]:
    """A list, its folders' times, and how many nanoseconds it came too soon, or without times."""
    began = time.time_ns()
    columns, facts, time_F2 = list_once()
    soon = TICK_NS if _timeless(time_F2) else TICK_NS - (began - int(time_F2.max()))
    return columns, facts, time_F2, max(0, min(soon, TICK_NS))


def _timeless(time_F2: np.ndarray) -> int:
    """How many folders have no time that a change of their entries would change, whoever sets the other one."""
    return int(((time_F2[:, 1] <= 0) & (time_F2[:, 1] != -1)).sum())


def _why_unsettled(what: Path, timeless: int) -> str:
    outlook = "so no index is kept, and every rank looks at all its files, at each start"
    if not timeless:
        return f"{what} is being changed, {outlook}"
    return (
        f"{what} has {timeless} folders that do not say when they were changed (their time is 1970, as on some network "
        f"mounts), {outlook}; of tars an index is kept: mocov3 pack makes them"
    )


def is_unchanged(root: Path, listing: Listing, lead: bytes = b"") -> bool:
    """Whether no folder has another time; and some of the files, and all that could not be found, are as they were.

    root: to which all paths are relative; lead: how those of images begin.
    """
    if listing.facts.get("rules") != RULES or twice.COLUMN not in listing.arrays:  # a former version's
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
