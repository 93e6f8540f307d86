"""Ranks that succeed together or fail together. Without a process group this process is the only rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from engine.errors import RunFailed, SystemRefused, UserError, one_line

KNOWN = (RunFailed, UserError, SystemRefused)  # of several at once, the first ends the body


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


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Every rank's value, in rank order, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * size(group) if rank(group) == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values


def scatter(values: Sequence[Any] | None, group: dist.ProcessGroup | None) -> Any:
    """This rank's of the values that rank 0 has, one for each rank."""
    if not dist.is_initialized():
        return values[0]
    box = [None]
    dist.scatter_object_list(box, values, group=group, group_src=0)
    return box[0]


@contextmanager
def agreement(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Body without collectives; if it fails on any rank, every rank raises, so none waits for the others for ever.

    What ranks know to say becomes one error that names them: a RunFailed where one of them has that, else a UserError;
    a SystemRefused where all that happened are OSErrors. Anything else is a fault of the program: it is raised as it is
    where it happened, and as a RuntimeError elsewhere.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    kind = _kind(error)
    found = all_gather(error and (kind, describe(error)), group)
    if error is not None and kind is None:
        raise error
    failures = {number: failure for number, failure in enumerate(found) if failure is not None}
    if not failures:
        return
    text = by_rank({number: text for number, (_, text) in failures.items()}, size(group))
    kinds = {kind for kind, _ in failures.values()}
    raise (RuntimeError if None in kinds else next(kind for kind in KNOWN if kind in kinds))(text) from error


def _kind(error: BaseException | None) -> type[Exception] | None:
    """Which of KNOWN an error is; None for a fault of the program."""
    if isinstance(error, OSError | SystemRefused):
        return SystemRefused
    return next((kind for kind in KNOWN if isinstance(error, kind)), None)


def describe(error: BaseException) -> str:
    """One line; the kind of error where its text alone might not tell."""
    text = one_line(error)
    return text if isinstance(error, RunFailed | UserError | OSError) and text else f"{type(error).__name__}: {text}"


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
