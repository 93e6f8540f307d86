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
def health(output: StepOutput, state: TrainState) -> dict[str, Tensor]:
    """Numbers of the global batch for the log, on the device, equal on all ranks; one all-reduce serves them all.

    loss, chance_share (loss over that of guessing), top1 (queries whose nearest key is their own), positive_similarity,
    negative_similarity, feature_std and query_std (of normalised rows, times the square root of their width: 1 spread,
    0 collapsed), grad_norm, momentum_distance (|base - momentum| / |base|), skipped_steps.
    """
    group = state.group
    chance = chance_level(state.temperature, group.size() * len(output.queries) // 2)
    parts = [
        torch.stack([output.loss, output.top1, output.positive, output.negative]).double(),
        moments(output.features),
        moments(output.queries),
        momentum_squares(state),
    ]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    means = (flat / group.size()).split([part.numel() for part in parts])
    step, feature, query, (difference, base) = [m.view_as(p) for m, p in zip(means, parts, strict=True)]
    loss, top1, positive, negative = step
    return {
        "loss": loss,
        "chance_share": loss / chance,
        "top1": top1,
        "positive_similarity": positive,
        "negative_similarity": negative,
        "feature_std": spread(feature),
        "query_std": spread(query),
        "grad_norm": output.applied.grad_norm,
        "momentum_distance": (difference / base).sqrt(),
        "skipped_steps": state.update.skipped,
    }


def moments(x_ND: Tensor) -> Tensor:
    """Means over rows of the normalised rows and of their squares, float64 [2, D]."""
    x_ND = F.normalize(x_ND.double(), dim=1)
    return torch.stack([x_ND.mean(0), x_ND.square().mean(0)])


def spread(moments_2D: Tensor) -> Tensor:
    """Standard deviation over all ranks' rows of the normalised rows, mean over columns, times sqrt(D)."""
    mean_D, square_D = moments_2D
    return (square_D - mean_D.square()).clamp(min=0).sqrt().mean() * len(mean_D) ** 0.5


def momentum_squares(state: TrainState) -> Tensor:
    """Of this rank's shards of base - momentum and of base, all parameters together: how far the average lags."""
    difference = subtract_each(state.base_shards, state.momentum_shards)
    return torch.stack([norm_each(shards).square() @ state.shares for shards in (difference, state.base_shards)])
