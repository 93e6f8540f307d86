"""Many linear classifiers on features that were taken once, trained at once: minutes instead of the paper's protocol.

All candidates (a learning rate and a weight decay each) see the same batches in the same order and share one matrix
product per step. They are dealt out to the ranks in groups of one fixed size, so that a candidate's product has one
shape, and with it the same bits, on any number of ranks.

Shapes: N training rows, Q validation rows, B rows of a batch, D features, C classes, L candidates of a group.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.evaluation.features import Features, progress
from engine.evaluation.knn import TOP, gather_rows

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
GROUP = 8  # candidates in one product
EPOCHS = 100
BATCH = 1024
MOMENTUM = 0.9
_ROWS = 1024  # that are in float64 at one time


class Candidate(NamedTuple):
    learning_rate: float
    weight_decay: float


class Score(NamedTuple):
    """Fractions of validation rows, from 0 to 1; 0 where training diverged."""

    candidate: Candidate
    top1: float
    top5: float


def candidates() -> list[Candidate]:
    return [Candidate(*pair) for pair in itertools.product(LEARNING_RATES, WEIGHT_DECAYS)]


def groups_of_rank(rank: int, world: int) -> list[list[Candidate]]:
    """The groups that one rank trains; every candidate is in one group of one rank."""
    everyone = candidates()
    return [everyone[start : start + GROUP] for start in range(0, len(everyone), GROUP)][rank::world]


def train_all(bank: Features, query: Features, classes: int, world: World) -> list[Score]:
    """Every candidate's score, in the order of `candidates`, equal on all ranks, which call it together.

    bank: this rank's rows of train; query: all rows of val. Both as the network gave them, on the CPU.
    Memory: a rank that trains gets all rows of train, and takes up to three times theirs; the others have their own.
    """
    training = [rank for rank in range(world.size) if groups_of_rank(rank, world.size)]
    train = gather_rows(bank, world.host_group, training)
    mine = _train_groups(train, query, classes, world) if world.rank in training else []
    scores = {score.candidate: score for part in all_gather(mine, world.host_group) for score in part}
    return [scores[candidate] for candidate in candidates()]


def _train_groups(train: Features, val: Features, classes: int, world: World) -> list[Score]:
    """Those of this rank."""
    standard = standardise(train.feature_ND, val.feature_ND)
    train, val = (rows._replace(feature_ND=x).to(world.device) for rows, x in zip((train, val), standard, strict=True))
    groups = groups_of_rank(world.rank, world.size)
    shown = progress(groups, len(groups), "linear classifiers", "group", world)
    return [score for group in shown for score in train_group(group, train, val, classes=classes)]


def standardise(train_ND: Tensor, val_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Both with train's mean and standard deviation per column taken out; a column that is constant becomes zero.

    Computed in float64, by so many rows at a time.
    """
    mean_D = sum(rows.double().sum(0) for rows in train_ND.split(_ROWS)) / len(train_ND)
    variance_D = sum((rows.double() - mean_D).square().sum(0) for rows in train_ND.split(_ROWS)) / len(train_ND)
    std_D = variance_D.sqrt()
    scale_D = torch.where(std_D > 1e-6 * mean_D.abs().clamp(min=1e-6), 1 / std_D, 0)
    return _scaled(train_ND, mean_D, scale_D), _scaled(val_QD, mean_D, scale_D)


def _scaled(x_ND: Tensor, mean_D: Tensor, scale_D: Tensor) -> Tensor:
    scaled_ND = torch.empty_like(x_ND)
    for rows, scaled in zip(x_ND.split(_ROWS), scaled_ND.split(_ROWS), strict=True):
        scaled.copy_((rows.double() - mean_D) * scale_D)
    return scaled_ND


@torch.no_grad()
def train_group(
    group: Sequence[Candidate], train: Features, val: Features, *, classes: int, seed: int = 0, epochs: int = EPOCHS
) -> list[Score]:
    """Train the candidates of a group together by SGD from zero, cosine per step, and score each on val.

    Features are standardised ones, on the device that computes; the order of the rows is a function of `seed`.
    """
    train_ND, _, label_N = train
    rate_L11 = train_ND.new_tensor([c.learning_rate for c in group])[:, None, None]
    decay_L11 = train_ND.new_tensor([c.weight_decay for c in group])[:, None, None]
    # The bias is the last column; decay leaves it alone.
    weight_LCE = train_ND.new_zeros(len(group), classes, train_ND.shape[1] + 1)
    momentum_LCE = torch.zeros_like(weight_LCE)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(train_ND) / BATCH)
    step = 0
    for _ in range(epochs):
        for row_B in torch.randperm(len(train_ND), generator=generator).to(label_N.device).split(BATCH):
            gradient_LCE = gradient(weight_LCE, _with_one(train_ND[row_B]), label_N[row_B])
            gradient_LCE[..., :-1].addcmul_(weight_LCE[..., :-1], decay_L11)
            momentum_LCE.mul_(MOMENTUM).add_(gradient_LCE)
            weight_LCE.addcmul_(momentum_LCE, rate_L11, value=-0.5 * (1 + math.cos(math.pi * step / total)))
            step += 1
    return [Score(c, *_score(w, val)) for c, w in zip(group, weight_LCE, strict=True)]


def best(scores: Sequence[Score]) -> dict[str, float]:
    """{"top1", "top5", "learning_rate", "weight_decay"} of the highest top-1; of equals the higher top-5, then the
    first."""
    top = max(scores, key=lambda score: (score.top1, score.top5))
    return {"top1": top.top1, "top5": top.top5, **top.candidate._asdict()}


def table(scores: Sequence[Score]) -> str:
    """Top-1, a row for each learning rate and a column for each weight decay, as text that says so."""
    top1 = {score.candidate: score.top1 for score in scores}
    head = "learning rate  " + "".join(f"{f'wd {decay:g}':>11}" for decay in WEIGHT_DECAYS)
    rows = [
        f"{rate:<15g}" + "".join(f"{top1[Candidate(rate, decay)]:>11.2%}" for decay in WEIGHT_DECAYS)
        for rate in LEARNING_RATES
    ]
    above = "top-1 on val by learning rate and weight decay (wd):"
    below = "This is not the paper's protocol: centre crops alone, and the best of these is chosen on val."
    return "\n".join([above, head, *rows, below])


def _with_one(x_BD: Tensor) -> Tensor:
    return F.pad(x_BD, (0, 1), value=1.0)


def gradient(weight_LCE: Tensor, x_BE: Tensor, label_B: Tensor) -> Tensor:
    """Of the mean cross entropy, for all candidates: softmax minus one-hot, times the features."""
    L, C, _ = weight_LCE.shape
    error_BLC = (x_BE @ weight_LCE.flatten(0, 1).T).view(-1, L, C).softmax(2)
    error_BLC.scatter_add_(2, label_B[:, None, None].expand(-1, L, 1), error_BLC.new_full((len(label_B), L, 1), -1.0))
    return (error_BLC.flatten(1).T @ x_BE).div_(len(label_B)).view_as(weight_LCE)


def _score(weight_CE: Tensor, val: Features) -> tuple[float, float]:
    if not weight_CE.isfinite().all():
        return 0.0, 0.0
    right = torch.zeros(TOP, dtype=torch.int64, device=val.label_N.device)
    for x_BD, label_B in zip(val.feature_ND.split(BATCH), val.label_N.split(BATCH), strict=True):
        logit_BC = _with_one(x_BD) @ weight_CE.T
        hit_BT = logit_BC.topk(min(TOP, logit_BC.shape[1])).indices == label_B[:, None]
        right += F.pad(hit_BT.sum(0), (0, TOP - hit_BT.shape[1]))
    return right[0].item() / len(val.label_N), right.sum().item() / len(val.label_N)
