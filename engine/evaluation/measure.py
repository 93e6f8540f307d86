"""A frozen network measured on images: features taken over all ranks, then kNN, RankMe or many linear classifiers."""

import sys
from collections.abc import Iterator, Sequence

from torch import Tensor
from tqdm import tqdm

from engine.data import bad_images
from engine.data.loader import EvalBatch, eval_batches
from engine.data.sources import Source
from engine.data.splits import Sources
from engine.distributed.agreement import gather
from engine.distributed.world import World
from engine.errors import RunFailed
from engine.evaluation import fast_linear
from engine.evaluation.fast_linear import Score
from engine.evaluation.features import extract, rank_slice
from engine.evaluation.knn import accuracy, check_k, classify, gather_rows
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import Subject

BATCH = 128  # images per forward, whatever the number of ranks: so features have the same bits on any


def measure_knn(
    subject: Subject, sources: Sources, ks: Sequence[int], world: World, workers: int
) -> list[dict[str, float | int]]:
    """{"top1", "top5", "k"} for each k: the share of val that the k nearest images of train classify rightly.

    The bank stays spread over the ranks. Raises UserError for a k that the bank has not, before any computing.
    """
    for k in ks:
        check_k(k, len(sources.train), "--k")
    bank_ND, bank_id_N, bank_label_N = features(subject, sources.train, "train", world, workers)
    query_QD, _, label_Q = gather_rows(*_on_device(features(subject, sources.val, "val", world, workers), world))
    classes = len(sources.train.classes)
    predictions = classify(
        bank_ND, bank_label_N, bank_id_N, query_QD, classes=classes, ks=ks, group=world.group, k_name="--k"
    )
    return [{**accuracy(predictions[k], label_Q), "k": k} for k in ks]


def measure_rankme(subject: Subject, source: Source, world: World, workers: int) -> float:
    """The effective rank of the features, to three decimals: more would depend on the number of ranks."""
    feature_ND, *_ = features(subject, source, "data", world, workers)
    return round(rankme_from_gram(feature_gram(feature_ND.to(world.device), world.group)), 3)


def measure_fast_linear(subject: Subject, sources: Sources, world: World, workers: int) -> list[Score]:
    """Every candidate's score, in the order of `fast_linear.candidates`, equal on all ranks."""
    train_ND, _, label_N = gather_rows(*features(subject, sources.train, "train", world, workers), world.group)
    val_QD, _, val_label_Q = gather_rows(*features(subject, sources.val, "val", world, workers), world.group)
    tensors = (t.to(world.device) for t in (*fast_linear.standardise(train_ND, val_QD), label_N, val_label_Q))
    train_ND, val_QD, label_N, val_label_Q = tensors
    mine, classes = [], len(sources.train.classes)
    groups = fast_linear.groups_of_rank(world.rank, world.size)
    for group in _progress(groups, len(groups), "linear classifiers", "group", world):
        mine += fast_linear.train_group(group, train_ND, label_N, val_QD, val_label_Q, classes=classes)
    scores = {score.candidate: score for part in gather(mine, world.host_group) for score in part}
    return [scores[candidate] for candidate in fast_linear.candidates()]


def features(
    subject: Subject,
    source: Source,
    what: str | None,
    world: World,
    workers: int,
    remedy: str = "evaluate an earlier checkpoint",
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of a source: features [N, D], ids [N] and labels [N] on the CPU.

    what: the name under which progress shows; None for none. remedy: what a user does about features that are not
    finite.

    Raises:
        RunFailed: on every rank, where no image can be read or a feature is not finite.
    """
    feature_ND, id_N, label_N = unchecked_features(subject, source, what, world, workers)
    ranks = gather((len(feature_ND), bool(feature_ND.isfinite().all())), world.host_group)
    if not sum(rows for rows, _ in ranks):
        raise RunFailed(f"none of {len(source)} images could be read, {source.name(0)} and others; mend them")
    if not all(finite for _, finite in ranks):
        raise RunFailed(f"features are not finite: the network's weights have diverged; {remedy}")
    return feature_ND, id_N, label_N


def unchecked_features(
    subject: Subject, source: Source, what: str | None, world: World, workers: int, consequence: str = "it is left out"
) -> tuple[Tensor, Tensor, Tensor]:
    """`features` that may be none or not finite. consequence: what is said to follow for an unreadable image."""
    ids, batches = rank_slice(len(source), world.rank, world.size, BATCH)
    found = eval_batches(
        source,
        ids,
        batch_size=BATCH,
        image_size=subject.image_size,
        crop_fraction=subject.crop_fraction,
        interpolation=subject.interpolation,
        workers=workers,
        batches=batches,
    )
    found = _reported(found, consequence)
    return extract(
        subject.network,
        found if what is None else _progress(found, batches, f"features of {what}", "batch", world),
        mean=subject.mean,
        std=subject.std,
        device=world.device,
        dtype=subject.dtype,
    )


def _reported(batches: Iterator[EvalBatch], consequence: str) -> Iterator[EvalBatch]:
    for batch in batches:
        bad_images.report(batch.bad, consequence)
        yield batch


def _progress(items, total: int, what: str, unit: str, world: World):
    # In a log file a line every half minute is enough.
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, what, total, unit=unit, mininterval=seconds, dynamic_ncols=True, disable=not world.is_first)


def _on_device(rows: tuple[Tensor, Tensor, Tensor], world: World) -> tuple:
    return (*(tensor.to(world.device) for tensor in rows), world.group)
