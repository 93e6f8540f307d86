"""A CHECKPOINT measured on images by all ranks together: features, then kNN, RankMe or many linear classifiers.

Images are opened before the network, for their mistakes cost the least. `workers`: processes per rank that decode.
`choice`: the keywords of `subject.open_subject`.
What is raised is raised on every rank: UserError for images and CHECKPOINT, RunFailed for features (`features`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from engine.data.source import Root
from engine.data.splits import Splits, open_labelled, open_unlabelled
from engine.data.workers import Workers
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.evaluation import fast_linear
from engine.evaluation.fast_linear import Score
from engine.evaluation.features import Features, features
from engine.evaluation.knn import accuracy, check_k, classify, gather_rows
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import Subject, open_subject_together
from engine.logger import note, warn

SAME = 0.1  # share of val's images that are also train's above which that is said


def measure_knn(
    checkpoint: str, train: Root, val: Root, ks: Sequence[int], world: World, workers: int, **choice: Any
) -> list[dict[str, float | int]]:
    """{"top1", "top5", "k"} for each k: the share of val that the k nearest images of train classify rightly.

    The bank stays spread over the ranks. Raises UserError for a k larger than the bank, before any computing.
    """
    splits = open_labelled(train, val, world)
    with Workers(splits, workers, device=world.device) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        note(in_words(checkpoint, subject, splits, **choice))
        for k in ks:
            check_k(k, len(splits.train), "--k")
        bank = features(subject, splits.train, "train", world, readers)
        query = gather_rows(features(subject, splits.val, "val", world, readers).to(world.device), world.group)
    warn_of_same_images(bank, query, world)
    classes = len(splits.train.classes)
    predictions = classify(bank, query.feature_ND, classes=classes, ks=ks, group=world.group)
    return [{**accuracy(predictions[k], query.label_N), "k": k} for k in ks]


def knn_table(results: Sequence[dict[str, float | int]]) -> str:
    """What `measure_knn` found, a row for each k."""
    rows = [f"{r['k']:>6} {r['top1']:>8.2%} {r['top5']:>8.2%}" for r in results]
    return "\n".join(["     k    top-1    top-5", *rows])


def knn_result(results: Sequence[dict[str, float | int]]) -> dict[str, Any]:
    """What `measure_knn` found for the first k; of several all of them, as `by_k`."""
    return dict(results[0]) | ({"by_k": list(results)} if len(results) > 1 else {})


def measure_rankme(checkpoint: str, data: Root, world: World, workers: int, **choice: Any) -> float:
    """The effective rank of the features, to three decimals: more would depend on the number of ranks."""
    source = open_unlabelled(data, world)
    with Workers([source], workers, device=world.device) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        note(in_words(checkpoint, subject, Splits(source, None), **choice))
        found = features(subject, source, "data", world, readers).to(world.device)
    width = found.feature_ND.shape[1]
    if len(source) < width:
        note(f"RankMe is at most the number of images ({len(source):,}), below the features' width ({width:,})")
    return round(rankme_from_gram(feature_gram(found.feature_ND, world.group)).item(), 3)


def measure_fast_linear(
    checkpoint: str, train: Root, val: Root, world: World, workers: int, *, share: float = 1.0, **choice: Any
) -> list[Score]:
    """Every candidate's score, in the order of `fast_linear.candidates`, equal on all ranks.

    share: of the training images, as many of every class.
    """
    splits = open_labelled(train, val, world, share=share)
    with Workers(splits, workers, device=world.device) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        note(in_words(checkpoint, subject, splits, **choice))
        bank = features(subject, splits.train, "train", world, readers)
        query = gather_rows(features(subject, splits.val, "val", world, readers), world.host_group)
    warn_of_same_images(bank, query, world)
    return fast_linear.train_all(bank, query, len(splits.train.classes), world)


def in_words(
    checkpoint: str, subject: Subject, splits: Splits, *, encoder: str = "base", baseline: str | None = None, **_: Any
) -> str:
    """A line that says what is measured: encoder, images and their size."""
    network = {"pixels": "the images' pixels", "initial": f"{checkpoint} before training"}
    who = network.get(baseline or "", f"the {encoder} encoder of {checkpoint}")
    of = "of train" if splits.val is not None else "of data"
    counts = f"{len(splits.train):,} image{'s' * (len(splits.train) != 1)} {of}" + (
        f", {len(splits.val):,} of val" if splits.val is not None else ""
    )
    return f"{who}, on images of {subject.image_size} pixels: {counts}"


def warn_of_same_images(train: Features, val: Features, world: World) -> None:
    """Says where many images of val are train's too, under whatever paths: their features are.

    train: this rank's rows; val: all rows. All ranks call it together.
    """
    mine, wanted = set(_marks(train)), _marks(val)
    everyones = all_gather([mark in mine for mark in wanted], world.host_group)
    share = sum(map(any, zip(*everyones, strict=True))) / len(wanted)
    if share > SAME and world.is_first:
        warn(f"{share:.0%} of val's images are among train's: the result says little of new ones")


def _marks(rows: Features) -> list[bytes]:
    """What tells features of different images apart, but not those of one image in other batches.

    All features count: of the pixels of different images the first may well be of one colour.
    """
    pooled = [F.adaptive_avg_pool1d(some_ND.double(), 16) for some_ND in rows.feature_ND.split(1024)]  # no whole copy
    direction_ND = F.normalize(torch.cat(pooled), dim=1).cpu()
    return [row_D.tobytes() for row_D in (direction_ND * 1e5).round().int().numpy()]
