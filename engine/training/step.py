"""One training step of MoCo v3 (paper, Algorithm 1) and the state that it changes.

Shapes: V = 2 views, B images of this rank, W ranks, G = W * B images of all ranks, P width of queries and keys.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.training.guard import BufferSnapshot, check_gradients
from engine.training.loss import contrastive_loss
from engine.training.optim import build_optimizer, local
from engine.training.schedule import Schedule
from models.moco import MoCo, update_momentum


class StepOutput(NamedTuple):
    """What a step saw, on the device: nothing here waits for it. Scalars are this rank's unless said otherwise."""

    loss: Tensor
    top1: Tensor  # share of queries whose nearest key is their own
    positive: Tensor  # mean cosine similarity of a query and its key
    negative: Tensor  # mean cosine similarity of a query and the other keys
    grad_norm: Tensor  # of all ranks
    skipped: Tensor  # 1 where a gradient on any rank was not finite, else 0
    features: Tensor  # [V*B, D] of the base trunk
    queries: Tensor  # [V*B, P], not normalised
    keys: Tensor  # [V*B, P], not normalised
    lr: float
    momentum: float


class TrainState:
    """Networks, optimizer and counters: all that a step changes, and all that a checkpoint must hold.

    Args:
        moco: parallelized and materialized (engine.training.parallelize).
        optimizer: adamw or lars.
        group: the ranks of the global batch.
        shard_group: the ranks over which one parameter is spread.
    """

    def __init__(
        self,
        moco: MoCo,
        schedule: Schedule,
        *,
        optimizer: str,
        weight_decay: float,
        temperature: float,
        group: dist.ProcessGroup,
        shard_group: dist.ProcessGroup,
    ):
        self.moco, self.schedule, self.temperature, self.group = moco, schedule, temperature, group
        self.step = 0
        # FSDP swaps a module's parameters for gathered ones while it runs, so lists of shards are taken once, here.
        self.parameters = dict(moco.named_parameters())
        self.buffers = dict(moco.named_buffers())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        with torch.no_grad():
            self.base_shards = [local(p) for p in moco.base.parameters()]
            self.momentum_shards = [local(p) for p in moco.momentum.parameters()]
        self.optimizer = build_optimizer(optimizer, self.trained.values(), weight_decay, shard_group)
        self.copies = group.size() // shard_group.size()  # of every shard
        device = self.base_shards[0].device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)  # steps without update so far
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        persistent = self.moco.state_dict().keys()
        model = {f"model.{n}": t for n, t in (self.parameters | self.buffers).items() if n in persistent}
        optimizer = {
            f"optimizer.{kind}.{name}": tensor
            for name, parameter in self.trained.items()
            for kind, tensor in self.optimizer.state[parameter].items()
        }
        return model | optimizer | {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}


def train_step(state: TrainState, images: Tensor) -> StepOutput:
    """Update the networks once on two views [V*B, 3, H, W] of this rank's images: view 1's batch, then view 2's.

    The loss is over the global batch, so W ranks with B images each make the step of one rank with all of them. Where a
    gradient on any rank is not finite, the step moves the momentum encoder alone.
    """
    moco, lr, momentum = state.moco, state.schedule.learning_rate_at(state.step), state.schedule.momentum_at(state.step)
    before = BufferSnapshot(list(state.buffers.values()))

    update_momentum(state.momentum_shards, state.base_shards, momentum)
    keys = moco.keys(images)
    gathered = KeyGather(keys, state.group)
    features, queries = moco.queries(images)

    q1_BP, q2_BP = queries.chunk(2)
    k1_GP, k2_GP = gathered.wait()
    first = state.group.rank() * len(q1_BP)
    one = contrastive_loss(q1_BP, k2_GP, first, state.temperature)
    two = contrastive_loss(q2_BP, k1_GP, first, state.temperature)
    loss = one.loss + two.loss
    loss.backward()

    grad_norm, skip = check_gradients(state.trained, state.group, state.copies)
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.found_inf = skip
    state.optimizer.step()
    state.optimizer.zero_grad()
    before.restore_where(skip > 0)
    state.skipped += skip.long()
    state.skipped_in_a_row.add_(1).mul_(skip.long())
    state.step += 1
    means = [(a + b).detach() / 2 for a, b in zip(one[1:], two[1:], strict=True)]
    outputs = (t.detach() for t in (features, queries, keys))
    return StepOutput(loss.detach(), *means, grad_norm, skip, *outputs, lr, momentum)


class KeyGather:
    """All ranks' keys, on their way while the queries are computed. No gradient passes."""

    def __init__(self, keys: Tensor, group: dist.ProcessGroup):
        self.keys = keys.new_empty(group.size(), *keys.shape)
        self.work = dist.all_gather(list(self.keys), keys.contiguous(), group=group, async_op=True)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys of view 1 and of view 2, [G, P] each, rank by rank."""
        self.work.wait()
        k1_WBP, k2_WBP = self.keys.chunk(2, dim=1)
        return k1_WBP.flatten(0, 1), k2_WBP.flatten(0, 1)
