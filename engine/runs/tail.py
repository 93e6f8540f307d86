"""Where metrics.jsonl goes on: a resume cuts off what came after its checkpoint, and reads no more than the file's end.

The steps of a log ascend, so the lines to keep end where a first one, from the end, is of the checkpoint's step or of
an earlier one. A log whose end does not ascend, or has a line that is no row, is read from its beginning instead.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import draft, newest_lines, publish, row_on, rows_and_lines, sync

RECENT = 100  # loss rows that are read again
_CHECKED = 256  # rows from the end that must ascend, at least


class _NotAscending(Exception):
    """A row is of an earlier step than the one before it."""


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave of a metrics.jsonl the lines up to `step`, byte for byte.

    Returns the newest of their rows, oldest first: with RECENT loss rows or more among them, where there are so many.

    Raises:
        UserError: a line is no row; the file is as it was.
    """
    try:
        rows, end = _from_end(path, step)
    except (UserError, _NotAscending):
        return _from_beginning(path, step)
    if end < path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(end)
            sync(file)
    return rows


def _from_end(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """The newest rows up to `step`, oldest first, and the byte at which the last of them ends."""
    kept, end, losses, above = [], 0, 0, math.inf
    for number, (line, start) in enumerate(newest_lines(path), start=1):
        row = row_on(line, f"{path} at byte {start}")
        if row["step"] > above:
            raise _NotAscending
        above = row["step"]
        if above <= step:
            end = end or start + len(line)
            kept.append(row)
            losses += "loss" in row
        if losses >= RECENT and number >= _CHECKED:
            break
    return kept[::-1], end


def _from_beginning(path: Path, step: int) -> list[dict[str, Any]]:
    newest: deque[dict[str, Any]] = deque()
    losses = 0
    with draft(path) as place:
        with place.open("xb") as file:
            for row, line in rows_and_lines(path):
                if row["step"] <= step:
                    file.write(line)
                    newest.append(row)
                    losses += "loss" in row
                    while losses - ("loss" in newest[0]) >= RECENT and len(newest) > _CHECKED:
                        losses -= "loss" in newest.popleft()
        publish(place, path)
    return list(newest)
