"""One training step of MoCo v3 (paper, Algorithm 1) and the state that it changes.

Shapes: V = 2 views, B images of this rank, W ranks, G = W * B images of all ranks, P width of queries and keys.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from engine.recipe.sections import Optimizer
from engine.torch_internals import lerp_each_
from engine.training.loss import contrastive_loss
from engine.training.micro_batch import MicroBatches, passes_over
from engine.training.optim import build_optimizer
from engine.training.parallelize import gather_early, local, own_gradients, saved, shares
from engine.training.schedule import MocoSchedule
from engine.training.update import Applied, Update
from models.moco import MoCo


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step saw, on the device: nothing here waits for it. Scalars are this rank's."""

    loss: Tensor
    top1: Tensor  # share of queries whose nearest key is their own
    positive: Tensor  # mean cosine similarity of a query and its key
    negative: Tensor  # mean cosine similarity of a query and the other keys
    features: Tensor  # [V*B, D] of the base trunk
    queries: Tensor  # [V*B, P], not normalised
    keys: Tensor  # [V*B, P], not normalised
    momentum: float  # of the momentum encoder's update
    applied: Applied  # the base encoder's and the predictor's update


class TrainState:
    """Networks, optimizer and counters: all that a step changes, and all that a checkpoint must hold.

    Args:
        moco: parallelized and materialized (engine.training.parallelize).
        mesh: how a parameter lies over the ranks: spread along "shard", copied along "replicate".
        group: the ranks of the global batch.
    """

    def __init__(
        self,
        moco: MoCo,
        schedule: MocoSchedule,
        optimizer: Optimizer,
        *,
        temperature: float,
        mesh: DeviceMesh,
        group: dist.ProcessGroup,
    ):
        self.moco, self.schedule, self.temperature, self.group = moco, schedule, temperature, group
        self.saved = {f"model.{name}": tensor for name, tensor in saved(moco).items()}
        with torch.no_grad():
            self.base_shards = [local(p) for p in moco.base.parameters()]
            self.momentum_shards = [local(p) for p in moco.momentum.parameters()]
            self.shares = shares(moco.base.parameters(), group).to(self.base_shards[0].device)
        gather_early(moco.base, moco.predictor)
        gather_early(moco.momentum)
        trained = {name: p for name, p in moco.named_parameters() if p.requires_grad}
        self.update = Update(
            build_optimizer(optimizer, trained.values(), mesh["shard"].get_group()),
            trained,
            list(moco.buffers()),
            own_gradients(moco, group),
            group=group,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        return self.saved | self.update.tensors()


def train_step(state: TrainState, images: Tensor | MicroBatches) -> StepOutput:
    """Update the networks once on two views [V*B, 3, H, W] of this rank's images: view 1's batch, then view 2's.

    The loss is over the global batch, so W ranks with B images each make the step of one rank with all of them, and
    micro-batches that of the whole batch. Where a gradient on any rank is not finite, the step moves the momentum
    encoder alone.
    """
    passes, step = passes_over(images, state.moco), state.update.step
    momentum = state.schedule.momentum_at(step)
    state.update.begin()  # remembers what a step without update must leave as it is

    # Before the keys, as the published code has it: Algorithm 1 has it after the optimizer, and so one update further.
    # Parameters alone: the momentum encoder's BatchNorm buffers follow its own forward.
    lerp_each_(state.momentum_shards, state.base_shards, 1 - momentum)
    keys = passes.keys()
    gathered = KeyGather(keys, state.group)
    features, queries = passes.queries()

    q1_BP, q2_BP = queries.chunk(2)
    k1_GP, k2_GP = gathered.wait()
    first = state.group.rank() * len(q1_BP)
    one = contrastive_loss(q1_BP, k2_GP, first, state.temperature)
    two = contrastive_loss(q2_BP, k1_GP, first, state.temperature)
    loss = one.loss + two.loss
    passes.backward(loss)
    applied = state.update.apply(state.schedule.learning_rate_at(step))

    return StepOutput(
        loss=loss.detach(),
        top1=(one.top1 + two.top1) / 2,
        positive=(one.positive + two.positive) / 2,
        negative=(one.negative + two.negative) / 2,
        features=features.detach(),
        queries=queries.detach(),
        keys=keys,
        momentum=momentum,
        applied=applied,
    )


class KeyGather:
    """All ranks' keys, on their way while the queries are computed. No gradient passes."""

    def __init__(self, keys: Tensor, group: dist.ProcessGroup):
        self.keys = keys.new_empty(group.size(), *keys.shape)
        # One name in torch 2.14, another before.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        self.work = gather(self.keys.flatten(0, 1), keys.contiguous(), group=group, async_op=True)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys of view 1 and of view 2, [G, P] each, rank by rank."""
        self.work.wait()
        k1_WBP, k2_WBP = self.keys.chunk(2, dim=1)
        return k1_WBP.flatten(0, 1), k2_WBP.flatten(0, 1)
