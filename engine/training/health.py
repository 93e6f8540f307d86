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
    means = torch.stack([output.loss, output.top1, output.positive, output.negative]).double()
    dist.all_reduce(means, group=group)
    loss, top1, positive, negative = (means / group.size()).tolist()
    return {
        "loss": loss,
        "chance_share": loss / chance,
        "top1": top1,
        "positive_similarity": positive,
        "negative_similarity": negative,
        "feature_std": spread(output.features, group),
        "query_std": spread(output.queries, group),
        "grad_norm": output.applied.grad_norm.item(),
        "momentum_distance": momentum_distance(state),
        "skipped_steps": int(state.update.skipped),
    }


def spread(x_ND: Tensor, group: dist.ProcessGroup) -> float:
    """Standard deviation over all ranks' rows of the normalised rows, mean over columns, times sqrt(D)."""
    x_ND = F.normalize(x_ND.double(), dim=1)
    moments = torch.stack([x_ND.mean(0), x_ND.square().mean(0)])
    dist.all_reduce(moments, group=group)
    mean_D, square_D = moments / group.size()
    return ((square_D - mean_D.square()).clamp(min=0).sqrt().mean() * x_ND.shape[1] ** 0.5).item()


def momentum_distance(state: TrainState) -> float:
    """How far the momentum encoder lags: |base - momentum| / |base| over all parameters."""
    difference = subtract_each(state.base_shards, state.momentum_shards)
    squares = torch.stack([norm_each(shards).square().sum() for shards in (difference, state.base_shards)])
    dist.all_reduce(squares, group=state.group)  # copies of a shard count in both alike
    return (squares[0] / squares[1]).sqrt().item()
