"""The monitor of pre-training: how well the base trunk's features tell the classes of labelled images apart."""

from pathlib import Path

import torch
from torch import nn

from engine.data.decode import Reading
from engine.data.source import Source
from engine.data.splits import Splits, open_labelled_beside
from engine.data.subset import take_per_class
from engine.data.workers import Workers
from engine.distributed.world import World
from engine.errors import UserError
from engine.evaluation.features import AtBatch, unchecked_features
from engine.evaluation.knn import accuracy, classify, gather_rows
from engine.evaluation.online_probe import OnlineProbe
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.evaluation.subject import Subject
from engine.recipe.keys import wrong
from engine.recipe.paths import named
from engine.recipe.sections import Evaluate, Pretrain
from engine.training.step import TrainState

K = 20  # neighbours


def open_watched(recipe: Pretrain, recipe_file: Path, world: World, splits: Splits, **options: bool) -> Splits:
    """The images that the monitor looks at: the labelled ones that the recipe names beside training's, else training's.

    options: of `open_labelled_beside`. Raises UserError on every rank.
    """
    beside = open_labelled_beside(recipe.evaluate, recipe_file, world, **options)
    if beside is not None and len(beside.train) < K:
        raise UserError(
            f"evaluate.train_root ({named(recipe.evaluate.train_root)}) must hold {K} images or more, kNN's neighbours "
            f"({len(beside.train)}); give it more"
        )
    return beside or splits


def has_monitor(splits: Splits) -> bool:
    """kNN needs labels on both sides and enough training images to be neighbours; the online probe the labels."""
    return splits.val is not None and splits.val.labels is not None and len(splits.train) >= K


def open_bank(recipe: Pretrain, splits: Splits) -> Source:
    """The training images that are kNN's neighbours; where `has_monitor` holds.

    Raises:
        UserError: the recipe wants too few.
    """
    per_class, train = recipe.evaluate.knn_bank, splits.train
    if per_class is None:
        return train
    bank = take_per_class(train, per_class, recipe.run.seed)
    if len(bank) < K:
        needs = f"null, or so many that there are {K} neighbours in all {len(train.classes)} classes ({len(bank)})"
        raise wrong("evaluate.knn_bank", per_class, needs)
    return bank


def make_probe(
    recipe: Pretrain, world: World, splits: Splits, state: TrainState, dtype: torch.dtype
) -> OnlineProbe | None:
    """The recipe's online probe; None where it wants none, or training images have none of the monitor's labels."""
    if not (recipe.evaluate.online_probe and has_monitor(splits) and recipe.evaluate.train_root is None):
        return None
    return OnlineProbe(
        state.moco.width,
        splits.train.labels,
        len(splits.train.classes),
        state.schedule,
        seed=recipe.run.seed,
        device=world.device,
        dtype=dtype,
        group=world.group,
    )


def monitor_row(
    recipe: Pretrain,
    world: World,
    workers: Workers,
    bank: Source,
    val: Source,
    trunk: nn.Module,
    dtype: torch.dtype,
    probe: OnlineProbe | None,
    *,
    at_batch: AtBatch | None,
) -> dict[str, float]:
    """Top-1 and top-5 on the validation images, from 0 to 1, by kNN and by the probe; RankMe of their features. Equal
    on all ranks.

    All ranks call it together. The trunk computes in `dtype`; `at_batch` is called as `features` says. Raises what
    `knn.classify` and `features.extract` raise, on all ranks alike.
    """
    augment, evaluate = recipe.augment, recipe.evaluate
    form = recipe.model.image_size, augment.mean, augment.std, evaluate.crop_fraction
    subject = Subject(trunk, *form, dtype=dtype, reading=Reading.of(recipe.data))
    more = {"consequence": "it is left out of the monitor", "at_batch": at_batch}
    neighbours, queries = (unchecked_features(subject, source, None, world, workers, **more) for source in (bank, val))
    query = gather_rows(queries.to(world.device), world.group)
    found = classify(neighbours, query.feature_ND, classes=len(bank.classes), ks=(K,), group=world.group)
    row = {f"knn_{top}": share for top, share in accuracy(found[K], query.label_N).items()}
    gram_DD = feature_gram(query.feature_ND, world.group)  # a sum of as many equal ones as there are ranks
    row["val_rankme"] = rankme_from_gram(gram_DD).item()
    return row if probe is None else row | probe.accuracy(query.feature_ND, query.label_N)


def monitor_in_words(evaluate: Evaluate, splits: Splits, watched: Splits, bank: Source | None) -> list[str]:
    """Lines where labelled images lie beside those of training, or kNN or the probe is wanted and off.

    bank: kNN's neighbours; None where `has_monitor` does not hold.
    """
    needs = f"it needs labelled validation images and at least {K} labelled training images"
    own, lines = watched is not splits, []
    if bank is None and evaluate.knn_every_epochs:
        do = "pass evaluate.train_root and evaluate.val_root for labelled images beside these, or watch `rankme`"
        lines.append(f"monitor   kNN is off: {needs}; {do}")
    if own and evaluate.knn_every_epochs:
        found = f"{len(bank):,} as neighbours of {len(watched.val):,}, {len(watched.train.classes)} classes"
        lines.append(f"monitor   kNN on labelled images beside: {found}")
    if evaluate.online_probe and (bank is None or own):
        why = "training images have none of evaluate.train_root's labels" if own else needs
        lines.append(f"probe     the online probe is off: {why}")
    return lines
