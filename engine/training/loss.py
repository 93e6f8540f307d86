"""The contrastive loss (paper, Algorithm 1, `ctr`), without ever holding the matrix of logits.

Shapes: B queries of this rank, G keys of all ranks, P width of a query, C keys of one chunk.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # keys whose logits are in memory at a time


class ContrastiveLoss(NamedTuple):
    """`loss` carries gradient; the others are means over the B queries that describe it."""

    loss: Tensor
    top1: Tensor  # share of queries whose nearest key is their own
    positive: Tensor  # cosine similarity with the own key
    negative: Tensor  # cosine similarity with the others


def contrastive_loss(q_BP: Tensor, k_GP: Tensor, first: int, temperature: float, chunk: int = CHUNK) -> ContrastiveLoss:
    """2T * mean over queries of the cross entropy of q.k/T against the own key, whose row in `k_GP` is `first` + i.

    Queries and keys are normalised here, in at least float32. No gradient flows into the keys. Memory grows with
    B * chunk, not with B * G: the backward pass computes the logits once more.
    """
    accurate = torch.promote_types(q_BP.dtype, torch.float32)
    q_BP = F.normalize(q_BP.to(accurate), dim=1)
    k_GP = F.normalize(k_GP.detach().to(accurate), dim=1)
    cross_entropy_B, nearest_B = _ChunkedCrossEntropy.apply(q_BP, k_GP, first, temperature, chunk)
    with torch.no_grad():
        own_BP = k_GP[first : first + len(q_BP)]
        positive_B = (q_BP * own_BP).sum(1)
        negative_B = (q_BP @ k_GP.sum(0) - positive_B) / max(len(k_GP) - 1, 1)
        own_B = torch.arange(first, first + len(q_BP), device=q_BP.device)
    top1 = (nearest_B == own_B).to(accurate).mean()
    return ContrastiveLoss(2 * temperature * cross_entropy_B.mean(), top1, positive_B.mean(), negative_B.mean())


def chance_level(temperature: float, global_batch: int) -> float:
    """The loss of a step, of both views, whose queries tell no key from another: 4 T ln G."""
    return 4 * temperature * math.log(global_batch)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy [B] of q.k/T over all keys, and the index [B] of the nearest key; logits in chunks of columns."""

    @staticmethod
    def forward(ctx, q_BP: Tensor, k_GP: Tensor, first: int, temperature: float, chunk: int):
        log_sum_B = q_BP.new_full((len(q_BP),), -torch.inf)
        best_B = torch.full_like(log_sum_B, -torch.inf)
        nearest_B = torch.zeros_like(log_sum_B, dtype=torch.long)
        for start in range(0, len(k_GP), chunk):
            logits_BC = q_BP @ k_GP[start : start + chunk].T / temperature
            log_sum_B = torch.logaddexp(log_sum_B, logits_BC.logsumexp(1))
            highest_B, column_B = logits_BC.max(1)
            nearest_B = torch.where(highest_B > best_B, column_B + start, nearest_B)
            best_B = torch.maximum(highest_B, best_B)
        positive_B = (q_BP * k_GP[first : first + len(q_BP)]).sum(1) / temperature
        ctx.save_for_backward(q_BP, k_GP, log_sum_B)
        ctx.first, ctx.temperature, ctx.chunk = first, temperature, chunk
        ctx.mark_non_differentiable(nearest_B)
        return log_sum_B - positive_B, nearest_B

    @staticmethod
    def backward(ctx, gradient_B: Tensor, _):
        q_BP, k_GP, log_sum_B = ctx.saved_tensors
        # d/dq = (sum over keys of softmax * k - own key) / T
        gradient_BP = -k_GP[ctx.first : ctx.first + len(q_BP)]
        for start in range(0, len(k_GP), ctx.chunk):
            k_CP = k_GP[start : start + ctx.chunk]
            share_BC = (q_BP @ k_CP.T / ctx.temperature - log_sum_B[:, None]).exp_()
            gradient_BP.addmm_(share_BC, k_CP)
        return gradient_BP * (gradient_B / ctx.temperature)[:, None], None, None, None, None
