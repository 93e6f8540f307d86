"""Whether a run learns, from what a step saw anyway (paper section 4: instability shows before the loss does).

Shapes: N = V * B rows of this rank, D features, P width of the queries.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.torch_internals import norm_each, subtract_each
from engine.training.loss import chance_level
from engine.training.step import StepOutput, TrainState


@torch.no_grad()
def health(output: StepOutput, state: TrainState) -> dict[str, float]:
    """Numbers of the global batch for the log, equal on all ranks; waits for the device.

    loss, chance_share (loss over that of guessing), top1 (queries whose nearest key is their own), positive_similarity,
    negative_similarity, feature_std and query_std (of normalised rows, times the square root of their width: 1 spread,
    0 collapsed), grad_norm, momentum_distance (|base - momentum| / |base|), skipped_steps.
    """
    group = state.group
    chance = chance_level(state.temperature, group.size() * len(output.queries) // 2)
    seen = torch.stack([output.loss, output.top1, output.positive, output.negative]).double()
    own = [seen, moments(output.features), moments(output.queries), lag_squares(state)]
    sums = torch.cat([part.flatten() for part in own])
    dist.all_reduce(sums, group=group)
    known = torch.stack([output.applied.grad_norm.double(), state.update.skipped.double()])
    *parts, known = torch.cat([sums, known]).cpu().split([*(part.numel() for part in own), len(known)])
    sums_4, features, queries, lag = (part.view(one.shape) for part, one in zip(parts, own, strict=True))
    loss, top1, positive, negative = (sums_4 / group.size()).tolist()
    return {
        "loss": loss,
        "chance_share": loss / chance,
        "top1": top1,
        "positive_similarity": positive,
        "negative_similarity": negative,
        "feature_std": spread(features / group.size()),
        "query_std": spread(queries / group.size()),
        "grad_norm": known[0].item(),
        "momentum_distance": (lag[0] / lag[1]).sqrt().item(),
        "skipped_steps": int(known[1]),
    }


def moments(x_ND: Tensor) -> Tensor:
    """Mean and mean square of each column of the normalised rows, float64 [2, D]."""
    x_ND = F.normalize(x_ND.double(), dim=1)
    return torch.stack([x_ND.mean(0), x_ND.square().mean(0)])


def spread(moments_2D: Tensor) -> float:
    """Standard deviation of the rows that have these moments, mean over columns, times sqrt(D)."""
    mean_D, square_D = moments_2D
    return ((square_D - mean_D.square()).clamp(min=0).sqrt().mean() * len(mean_D) ** 0.5).item()


def lag_squares(state: TrainState) -> Tensor:
    """|base - momentum|^2 and |base|^2 over this rank's shards, float64 [2]. Copies of a shard count in both alike."""
    difference = subtract_each(state.base_shards, state.momentum_shards)
    return torch.stack([norm_each(shards).square().sum() for shards in (difference, state.base_shards)])
