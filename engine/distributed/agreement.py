"""Ranks that succeed together or fail together. Without a process group this process is the only rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from engine.errors import UserError, one_line


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    values = [value] * size(group)
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


@contextmanager
def agreement(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Body without collectives; if it fails on any rank, every rank raises, so none waits for the others for ever.

    UserError and OSError become one UserError that names the ranks. Anything else is a fault of the program: it is
    raised as it is where it happened, and as a RuntimeError elsewhere.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    theirs = isinstance(error, UserError | OSError)
    found = all_gather(error and (theirs, describe(error)), group)
    if error is not None and not theirs:
        raise error
    failures = {number: failure for number, failure in enumerate(found) if failure is not None}
    if not failures:
        return
    text = by_rank({number: text for number, (_, text) in failures.items()}, size(group))
    raise (UserError if all(user for user, _ in failures.values()) else RuntimeError)(text) from error


def describe(error: BaseException) -> str:
    """One line; the kind of error where its text alone might not tell."""
    text = one_line(error)
    return text if isinstance(error, UserError | OSError) and text else f"{type(error).__name__}: {text}"


def by_rank(failures: dict[int, str], ranks: int) -> str:
    """{2: "disk full", 3: "disk full"} as one line that says each thing once.

    A failure of rank 0 alone is given without its rank.
    """
    texts = dict.fromkeys(failures.values())
    if len(texts) == 1 and len(failures) in (ranks, int(0 in failures)):
        return next(iter(texts))
    return "; ".join(
        f"rank {', '.join(str(r) for r, other in failures.items() if other == text)}: {text}" for text in texts
    )
