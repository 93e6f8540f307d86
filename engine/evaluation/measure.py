"""A CHECKPOINT measured on images by all ranks together: features, then kNN, RankMe or many linear classifiers.

Images are opened before the network, for their mistakes cost the least. `workers`: processes per rank that decode.
`choice`: the keywords of `subject.open_subject`.
What is raised is raised on every rank: UserError for images and CHECKPOINT, RunFailed for features (`features`).
"""

from collections.abc import Sequence
from typing import Any

from engine.data.source import Root
from engine.data.splits import open_labelled, open_unlabelled
from engine.data.workers import Workers
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.evaluation import fast_linear
from engine.evaluation.fast_linear import Score
from engine.evaluation.features import features, progress
from engine.evaluation.knn import accuracy, check_k, classify, gather_rows
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import open_subject_together


def measure_knn(
    checkpoint: str, train: Root, val: Root, ks: Sequence[int], world: World, workers: int, **choice: Any
) -> list[dict[str, float | int]]:
    """{"top1", "top5", "k"} for each k: the share of val that the k nearest images of train classify rightly.

    The bank stays spread over the ranks. Raises UserError for a k larger than the bank, before any computing.
    """
    splits = open_labelled(train, val, world)
    with Workers(splits, workers, pin_memory=world.on_gpu) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        for k in ks:
            check_k(k, len(splits.train), "--k")
        bank = features(subject, splits.train, "train", world, readers)
        query = gather_rows(features(subject, splits.val, "val", world, readers).to(world.device), world.group)
    classes = len(splits.train.classes)
    predictions = classify(bank, query.feature_ND, classes=classes, ks=ks, group=world.group)
    return [{**accuracy(predictions[k], query.label_N), "k": k} for k in ks]


def knn_table(results: Sequence[dict[str, float | int]]) -> str:
    """What `measure_knn` found, in per cent, a row for each k."""
    rows = [f"{r['k']:>6} {100 * r['top1']:>7.2f} {100 * r['top5']:>7.2f}" for r in results]
    return "\n".join(["     k   top-1   top-5", *rows])


def measure_rankme(checkpoint: str, data: Root, world: World, workers: int, **choice: Any) -> float:
    """The effective rank of the features, to three decimals: more would depend on the number of ranks."""
    source = open_unlabelled(data, world)
    with Workers([source], workers, pin_memory=world.on_gpu) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        found = features(subject, source, "data", world, readers).to(world.device)
    return round(rankme_from_gram(feature_gram(found.feature_ND, world.group)).item(), 3)


def measure_fast_linear(
    checkpoint: str, train: Root, val: Root, world: World, workers: int, **choice: Any
) -> list[Score]:
    """Every candidate's score, in the order of `fast_linear.candidates`, equal on all ranks."""
    splits = open_labelled(train, val, world)
    with Workers(splits, workers, pin_memory=world.on_gpu) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        sides = [
            gather_rows(features(subject, source, name, world, readers), world.group)
            for name, source in splits._asdict().items()
        ]
    standard = fast_linear.standardise(*(rows.feature_ND for rows in sides))
    sides = [rows._replace(feature_ND=x).to(world.device) for rows, x in zip(sides, standard, strict=True)]
    mine = []
    groups = fast_linear.groups_of_rank(world.rank, world.size)
    for group in progress(groups, len(groups), "linear classifiers", "group", world):
        mine += fast_linear.train_group(group, *sides, classes=len(splits.train.classes))
    scores = {score.candidate: score for part in all_gather(mine, world.host_group) for score in part}
    return [scores[candidate] for candidate in fast_linear.candidates()]
