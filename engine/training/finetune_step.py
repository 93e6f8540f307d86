"""One step of supervised training of a whole classifier, and the state that it changes.

Shapes: B images of this rank, C classes, K paths of stochastic depth.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from engine.training.guard import BufferSnapshot, check_gradients
from engine.training.optim import adamw, local
from engine.training.schedule import FinetuneSchedule
from models.classifier import Classifier

NO_DECAY = ("pos_embed", "cls_token")  # beside biases and norms


class FinetuneOutput(NamedTuple):
    """What a step saw, on the device. The loss is of all ranks, before the update."""

    loss: Tensor
    grad_norm: Tensor
    lr: float


class FinetuneState:
    """Classifier, its moving average (EMA) where there is one, optimizer and counters: all that a checkpoint must hold.

    Args:
        classifier, ema: parallelized and materialized (engine.training.parallelize).
        layer_decay: the rate of a layer over that of the next deeper one; the classifier's is the whole rate.
        ema_decay: what the moving average keeps of itself in a step.
        group: the ranks of the global batch.
        shard_group: the ranks over which one parameter is spread.
    """

    def __init__(
        self,
        classifier: Classifier,
        ema: Classifier | None,
        schedule: FinetuneSchedule,
        *,
        weight_decay: float,
        layer_decay: float,
        ema_decay: float,
        group: dist.ProcessGroup,
        shard_group: dist.ProcessGroup,
    ):
        self.classifier, self.ema, self.schedule, self.group = classifier, ema, schedule, group
        self.ema_decay = ema_decay
        self.step = 0
        # FSDP swaps a module's parameters for gathered ones while it runs, so lists of shards are taken once, here.
        self.trained = dict(classifier.named_parameters())
        self.buffers = dict(classifier.named_buffers())
        self.saved = {f"model.{name}": tensor for name, tensor in saved(classifier).items()}
        self.shards, self.ema_shards = floating(classifier), []
        if ema is not None:
            self.saved |= {f"ema.{name}": tensor for name, tensor in saved(ema).items()}
            self.ema_shards = floating(ema)
        self.optimizer = adamw(decaying_groups(classifier, weight_decay, layer_decay))
        self.copies = group.size() // shard_group.size()  # of every shard
        device = self.shards[0].device
        self.skipped = torch.zeros((), dtype=torch.long, device=device)  # steps without update so far
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        optimizer = {
            f"optimizer.{kind}.{name}": tensor
            for name, parameter in self.trained.items()
            for kind, tensor in self.optimizer.state[parameter].items()
        }
        return self.saved | optimizer | {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}


def decaying_groups(classifier: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameters by rate and weight decay, as timm groups a whole network.

    A group has `lr_scale`, its share of the rate: 1 for the classifier, layer_decay for the trunk's last layer, and so
    on down. Biases, norms, positions and CLS have no weight decay, as in DeiT.
    """
    kept = {*NO_DECAY, *classifier.no_weight_decay}
    return param_groups_layer_decay(
        _Whole(classifier), weight_decay, no_weight_decay_list=kept, layer_decay=layer_decay
    )


class _Whole:
    """What timm asks of a network that it groups: a trunk's layers and names, with the classifier on top of them."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier

    def group_matcher(self, coarse: bool) -> Any:
        return self.classifier.layers

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.classifier.trunk.named_parameters()
        for name, parameter in self.classifier.head.named_parameters():
            yield f"head.{name}", parameter


def floating(module: nn.Module) -> list[Tensor]:
    """This rank's shards of the parameters, and the buffers: all that a moving average can follow."""
    with torch.no_grad():
        return [local(tensor) for tensor in saved(module).values() if tensor.is_floating_point()]


def saved(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that files hold, by name."""
    persistent = module.state_dict().keys()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in persistent}


def finetune_step(state: FinetuneState, images: Tensor, target_BC: Tensor, uniform_BK: Tensor) -> FinetuneOutput:
    """Update the classifier once on this rank's images [B, 3, S, S] and their (soft) targets.

    Every rank has as many images. Where a gradient on any rank is not finite, nothing changes but the counters
    and the moving average, which takes its step.

    Args:
        uniform_BK: numbers in [0, 1) that decide which residual branches each sample drops.
    """
    lr, before = state.schedule.learning_rate_at(state.step), BufferSnapshot(list(state.buffers.values()))
    state.classifier.choose_paths(uniform_BK)
    loss = F.cross_entropy(state.classifier(images), target_BC)
    loss.backward()

    grad_norm, skip = check_gradients(state.trained, state.group, state.copies)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.found_inf = skip
    state.optimizer.step()
    state.optimizer.zero_grad()
    before.restore_where(skip > 0)
    if state.ema is not None:
        with torch.no_grad():
            torch._foreach_lerp_(state.ema_shards, state.shards, 1 - state.ema_decay)
    state.skipped += skip.long()
    state.skipped_in_a_row.add_(1).mul_(skip.long())
    state.step += 1
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss, group=state.group)
    return FinetuneOutput(mean_loss / state.group.size(), grad_norm, lr)
