"""Features of a frozen network over a source of images, the same bits on any number of ranks.

A rank must make as many calls of a sharded network as its peers, with the same shapes, and a forward pass rounds
differently in another batch. So the batches are those of one process, of one fixed size, dealt out to the ranks like
cards, and a rank that gets one fewer runs an empty one.

Shapes: N rows of this rank, B batch size, S side of an image, D features.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine import logger
from engine.data import bad_images
from engine.data.loader import EvalBatch, eval_batches
from engine.data.source import Source
from engine.data.workers import Workers
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.errors import RunFailed
from engine.evaluation.subject import Subject

T = TypeVar("T")
AtBatch = Callable[[int], None]  # given the number of the batch, which is the same on all ranks

BATCH = 128  # images per forward, whatever the number of ranks


class Features(NamedTuple):
    """Float32 [N, D], with the numbers of the images in their source and their labels (int64 [N]; label -1: none)."""

    feature_ND: Tensor
    id_N: Tensor
    label_N: Tensor

    def to(self, device: torch.device) -> "Features":
        return Features(*(rows.to(device) for rows in self))


def features(
    subject: Subject,
    source: Source,
    what: str | None,
    world: World,
    workers: Workers,
    remedy: str = "evaluate an earlier checkpoint",
    **more: Any,
) -> Features:
    """This rank's share of a source's features, on the CPU.

    what: the name under which progress shows; None for none. remedy: what a user does about features that are not
    finite. more: of `unchecked_features`.

    Raises:
        RunFailed: on every rank, where no image can be read or a feature is not finite.
    """
    found = unchecked_features(subject, source, what, world, workers, **more)
    ranks = all_gather((len(found.id_N), bool(found.feature_ND.isfinite().all())), world.host_group)
    if not sum(rows for rows, _ in ranks):
        raise RunFailed(f"none of {len(source)} images could be read, {source.name(0)} and others; mend them")
    if not all(finite for _, finite in ranks):
        raise RunFailed(f"features are not finite: the network's weights have diverged; {remedy}")
    return found


def unchecked_features(
    subject: Subject,
    source: Source,
    what: str | None,
    world: World,
    workers: Workers,
    consequence: str = "it is left out",
    at_batch: AtBatch | None = None,
) -> Features:
    """`features` that may be none or not finite. consequence: ends the report of an unreadable image.

    at_batch: called before each batch, on all ranks; what it raises on all ends the work.
    """
    ids, batches = rank_slice(len(source), world.rank, world.size, BATCH)
    found = batches_for(subject, source, ids.numpy(), workers, consequence, batches)
    if at_batch is not None:
        found = announced(found, at_batch)
    if what is not None:
        found = progress(found, batches, f"features of {what}", "batch", world)
    return extract(subject, found, world.device)


def batches_for(
    subject: Subject,
    source: Source,
    ids: np.ndarray,
    workers: Workers,
    consequence: str,
    batches: int | None = None,
) -> Generator[EvalBatch, None, None]:
    """The images `ids` in the form that the subject takes. Unreadable images are left out and reported; `consequence`
    ends the report. batches: yield exactly this many, the last ones empty."""
    sizes = {"batch_size": BATCH, "batches": batches}
    for batch in eval_batches(source, ids, subject.crop, **sizes, workers=workers):
        bad_images.report(batch.bad, consequence, source.fingerprint)
        yield batch


def announced(batches: Generator[EvalBatch, None, None], at_batch: AtBatch) -> Iterator[EvalBatch]:
    """The same batches; before each `at_batch` is called with its number."""
    with closing(batches):  # else a traceback would keep its workers
        for number, batch in enumerate(batches):
            at_batch(number)
            yield batch


def rank_slice(count: int, rank: int, world: int, batch_size: int) -> tuple[Tensor, int]:
    """The share of `count` images that one rank extracts: batch j, of images j * batch_size on, is of rank j % world.

    Returns (ids, batches): int64 ids in ascending order, to be cut every batch_size, and how many forward passes every
    rank makes. Where the ids fill fewer, the remaining batches are empty.
    """
    total = -(-count // batch_size)
    ids = torch.arange(total * batch_size).view(total, batch_size)[rank::world].flatten()
    return ids[ids < count], -(-total // world)


def extract(subject: Subject, batches: Iterable[EvalBatch], device: torch.device | str) -> Features:
    """Runs the network, in eval mode and without gradients, once per batch; leaves its modes and buffers as they were.

    Rows of padding are dropped. Returns the network's output, not normalised, on the CPU.
    Raises ValueError where there is no batch at all.
    """
    parts = []
    with torch.no_grad(), _evaluating(subject.network):
        for batch in batches:
            feature_BD = subject.network(subject.normalised(batch.images, device))
            rows = feature_BD[: batch.valid].float().cpu(), batch.ids_B[: batch.valid], batch.labels_B[: batch.valid]
            parts.append(rows)
    if not parts:
        raise ValueError("features need at least one batch of images; there was none")
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every submodule's own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def progress(items: Iterable[T], total: int, what: str, unit: str, world: World) -> Iterable[T]:
    """The same items, counted on stderr by rank 0."""
    return logger.progress(items, total, what, unit, shown=world.is_first)
