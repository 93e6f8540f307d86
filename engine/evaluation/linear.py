"""The paper's linear classification of frozen features (section 5): a classifier and its step, no images, no loop.

A weight from N(0, 0.01) and a zero bias; SGD with momentum 0.9 and without weight decay; the learning rate follows half
a cosine that is stepped once per epoch. The last, partial batch of an epoch is used.

Shapes: B rows of this rank, G of all ranks, D features, C classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.knn import TOP
from engine.training.update import Update
from models.initial import generator_for

MOMENTUM = 0.9
INITIAL_STD = 0.01


class LinearClassifier:
    """The classifier and its update: all that a step changes, equal on every rank.

    Args:
        peak_lr: of the first epoch.
        epochs, steps_per_epoch: the schedule; the last step of an epoch may have a partial batch.
        group: the ranks of the global batch; None for one process alone.
        kept: what a step changes beside the classifier, and must not where gradients are bad.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        peak_lr: float,
        epochs: int,
        steps_per_epoch: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
        kept: Sequence[Tensor] = (),
    ):
        self.peak_lr, self.epochs, self.steps_per_epoch, self.group = peak_lr, epochs, steps_per_epoch, group
        weight_CD = torch.empty(classes, features, dtype=dtype)
        weight_CD.normal_(0, INITIAL_STD, generator=generator_for(seed, "classifier.weight"))
        self.weight_CD = weight_CD.to(device).requires_grad_()
        self.bias_C = torch.zeros(classes, dtype=dtype, device=device, requires_grad=True)
        optimizer = torch.optim.SGD([self.weight_CD, self.bias_C], lr=peak_lr, momentum=MOMENTUM, weight_decay=0)
        for parameter in (self.weight_CD, self.bias_C):
            # SGD would make it in its first step; so a checkpoint has it from the start. 0.9 * 0 + g is g.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        named = {"classifier.weight": self.weight_CD, "classifier.bias": self.bias_C}
        buffers = {f"optimizer.{n}": optimizer.state[p]["momentum_buffer"] for n, p in named.items()}
        self.saved = {name: parameter.detach() for name, parameter in named.items()} | buffers
        self.update = Update(optimizer, named, [*self.saved.values(), *kept], knows_found_inf=False)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        epoch = self.update.step // self.steps_per_epoch
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        return self.saved

    @torch.no_grad()
    def predict(self, feature_BD: Tensor) -> Tensor:
        """int64 [B, min(5, C)]: the likeliest classes, best first."""
        logit_BC = F.linear(feature_BD, self.weight_CD, self.bias_C)
        return logit_BC.topk(min(TOP, logit_BC.shape[1])).indices


def linear_step(classifier: LinearClassifier, feature_BD: Tensor, label_B: Tensor, batch: int) -> Tensor:
    """Update the classifier once on a global batch of `batch` rows, of which this rank has B >= 0.

    Ranks may have different numbers of rows: each takes the sum over its own, over G, and the gradients are added up.
    Gradients that are not finite change nothing. The caller has begun the update (`classifier.update.begin`).
    Returns the loss of the global batch before the update, on the device, equal on all ranks.
    """
    weight_CD, bias_C = classifier.weight_CD, classifier.bias_C
    loss = F.cross_entropy(F.linear(feature_BD, weight_CD, bias_C), label_B, reduction="sum") / batch
    gradients = torch.autograd.grad(loss, (weight_CD, bias_C))
    flat = torch.cat([*(g.flatten() for g in gradients), loss.detach()[None]])
    if classifier.group is not None:
        dist.all_reduce(flat, group=classifier.group)
    weight, bias, loss = flat.split([weight_CD.numel(), bias_C.numel(), 1])
    weight_CD.grad, bias_C.grad = weight.view_as(weight_CD), bias
    classifier.update.apply(classifier.learning_rate)
    return loss[0]
