"""A frozen network measured on images: features taken over all ranks, then kNN, RankMe or many linear classifiers."""

from collections.abc import Sequence

from engine.data.source import Source
from engine.data.splits import Splits
from engine.distributed.agreement import gather
from engine.distributed.world import World
from engine.evaluation import fast_linear
from engine.evaluation.fast_linear import Score
from engine.evaluation.features import features, progress
from engine.evaluation.knn import accuracy, check_k, classify, gather_rows
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import Subject


def measure_knn(
    subject: Subject, sources: Splits, ks: Sequence[int], world: World, workers: int
) -> list[dict[str, float | int]]:
    """{"top1", "top5", "k"} for each k: the share of val that the k nearest images of train classify rightly.

    The bank stays spread over the ranks. Raises UserError for a k that the bank has not, before any computing.
    """
    for k in ks:
        check_k(k, len(sources.train), "--k")
    bank = features(subject, sources.train, "train", world, workers)
    query = gather_rows(features(subject, sources.val, "val", world, workers).to(world.device), world.group)
    classes = len(sources.train.classes)
    predictions = classify(bank, query.feature_ND, classes=classes, ks=ks, group=world.group, k_name="--k")
    return [{**accuracy(predictions[k], query.label_N), "k": k} for k in ks]


def measure_rankme(subject: Subject, source: Source, world: World, workers: int) -> float:
    """The effective rank of the features, to three decimals: more would depend on the number of ranks."""
    found = features(subject, source, "data", world, workers).to(world.device)
    return round(rankme_from_gram(feature_gram(found.feature_ND, world.group)), 3)


def measure_fast_linear(subject: Subject, sources: Splits, world: World, workers: int) -> list[Score]:
    """Every candidate's score, in the order of `fast_linear.candidates`, equal on all ranks."""
    train = gather_rows(features(subject, sources.train, "train", world, workers), world.group)
    val = gather_rows(features(subject, sources.val, "val", world, workers), world.group)
    standard = fast_linear.standardise(train.feature_ND, val.feature_ND)
    train, val = (rows._replace(feature_ND=x).to(world.device) for rows, x in zip((train, val), standard, strict=True))
    mine, classes = [], len(sources.train.classes)
    groups = fast_linear.groups_of_rank(world.rank, world.size)
    for group in progress(groups, len(groups), "linear classifiers", "group", world):
        mine += fast_linear.train_group(group, train, val, classes=classes)
    scores = {score.candidate: score for part in gather(mine, world.host_group) for score in part}
    return [scores[candidate] for candidate in fast_linear.candidates()]
