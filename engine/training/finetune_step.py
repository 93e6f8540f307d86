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

from engine.recipe.sections import FinetuneOptimizer
from engine.torch_internals import lerp_each_
from engine.training.optim import AdamW
from engine.training.parallelize import local, own_gradients, saved
from engine.training.schedule import Schedule
from engine.training.update import Applied, Update
from models.classifier import Classifier

NO_DECAY = ("pos_embed", "cls_token")  # beside biases and norms


class FinetuneOutput(NamedTuple):
    """What a step saw, on the device. The loss is of all ranks, before the update."""

    loss: Tensor
    applied: Applied


class FinetuneState:
    """Classifier, its moving average (EMA) where there is one, optimizer and counters: all that a checkpoint must hold.

    Args:
        classifier, ema: parallelized and materialized (engine.training.parallelize).
        ema_decay: what the moving average keeps of itself in a step.
        group: the ranks of the global batch.
    """

    def __init__(
        self,
        classifier: Classifier,
        ema: Classifier | None,
        schedule: Schedule,
        optimizer: FinetuneOptimizer,
        *,
        ema_decay: float,
        group: dist.ProcessGroup,
    ):
        self.classifier, self.ema, self.schedule, self.group = classifier, ema, schedule, group
        self.ema_decay = ema_decay
        self.saved = {f"model.{name}": tensor for name, tensor in saved(classifier).items()}
        self.shards, self.ema_shards = floating(classifier), []
        if ema is not None:
            self.saved |= {f"ema.{name}": tensor for name, tensor in saved(ema).items()}
            self.ema_shards = floating(ema)
        self.update = Update(
            AdamW(decaying_groups(classifier, optimizer)),
            {name: p for name, p in classifier.named_parameters() if p.requires_grad},
            list(classifier.buffers()),
            own_gradients(classifier, group),
            group=group,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        return self.saved | self.update.tensors()


def decaying_groups(classifier: Classifier, optimizer: FinetuneOptimizer) -> list[dict]:
    """Parameters by rate and weight decay, as timm groups a whole network.

    A group has `lr_scale`, its share of the rate: 1 for the classifier, layer_decay for the trunk's last layer, and so
    on down. Biases, norms, positions and CLS have no weight decay, as in DeiT.
    """
    return param_groups_layer_decay(
        _Whole(classifier),
        optimizer.weight_decay,
        no_weight_decay_list={*NO_DECAY, *classifier.no_weight_decay},
        layer_decay=optimizer.layer_decay,
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


def finetune_step(state: FinetuneState, images: Tensor, target_BC: Tensor, uniform_BK: Tensor) -> FinetuneOutput:
    """Update the classifier once on this rank's images [B, 3, S, S] and their (soft) targets.

    Every rank has as many images. Where a gradient on any rank is not finite, nothing changes but the counters
    and the moving average, which takes its step.

    Args:
        uniform_BK: numbers in [0, 1) that decide which residual branches each sample drops.
    """
    state.update.begin()
    state.classifier.choose_paths(uniform_BK)
    loss = F.cross_entropy(state.classifier(images), target_BC)
    loss.backward()
    applied = state.update.apply(state.schedule.learning_rate_at(state.update.step))
    if state.ema is not None:
        lerp_each_(state.ema_shards, state.shards, 1 - state.ema_decay)
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss, group=state.group)
    return FinetuneOutput(mean_loss / state.group.size(), applied)
