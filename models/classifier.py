"""A trunk and a linear classifier that are trained together, with stochastic depth that no rank and no batch decides.

Shapes: B images of this rank, D feature width, C classes, K paths that may be dropped.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models.initial import generator_for
from models.norm import GlobalBatchNorm
from models.trunk import blocks

INITIAL_STD = 0.02  # of the classifier's weight


class Classifier(nn.Module):
    """Images [B, 3, H, W] -> logits [B, C]. Every parameter is trained, whatever pre-training froze.

    Args:
        trunk: a fresh one (models.trunk); in training it takes one crop batch.
        drop_path: the share of samples for which the last block's residual branches are left out; it grows with the
            depth from 0.

    Raises:
        ValueError: the trunk has no such branches, and `drop_path` is not 0.
    """

    def __init__(self, trunk: nn.Module, classes: int, drop_path: float = 0.0):
        super().__init__()
        self.trunk = trunk.requires_grad_(True)
        self.head = nn.Linear(trunk.num_features, classes)
        for module in trunk.modules():
            if isinstance(module, GlobalBatchNorm):
                module.views = 1
        self.drop_paths = _put_drop_paths(trunk, drop_path)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def choose_paths(self, uniform_BK: Tensor) -> None:
        """Which branches the next forward in training leaves out, from K uniform numbers in [0, 1) per sample."""
        for path, uniform_B in zip(self.drop_paths, uniform_BK.unbind(1), strict=True):
            path.scale_B = (uniform_B >= path.probability).float() / (1 - path.probability)


class ChosenDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) of a residual branch [B, ...]: dropped, or divided by the share kept.

    timm's draws from a global generator for the rank's batch; here `scale_B` is set from outside before each forward.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability
        self.scale_B: Tensor | None = None

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        return branch * self.scale_B.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def _put_drop_paths(trunk: nn.Module, highest: float) -> list[ChosenDropPath]:
    """Put one into every place that timm's blocks have for it, linearly more probable with depth, as timm has it."""
    found: list[ChosenDropPath] = []
    units = blocks(trunk) if highest > 0 else []
    for number, unit in enumerate(units):
        probability = highest * number / max(len(units) - 1, 1)
        for name, child in unit.named_children():
            if re.fullmatch(r"drop_path\d*", name) and isinstance(child, nn.Identity | DropPath) and probability > 0:
                found.append(ChosenDropPath(probability))
                setattr(unit, name, found[-1])
    if highest > 0 and not found:
        raise ValueError(f"model.drop_path ({highest}) must be 0 for this trunk, which has no branches to drop")
    return found


def starting_values(
    classifier: Classifier, trunk_values: Iterable[tuple[str, Tensor]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer at the start as (name, value on the CPU), one at a time.

    The trunk's are `trunk_values`; what these lack (buffers that no file holds) is as in a fresh trunk. The weight of
    the classifier is drawn by `seed` and its bias is 0, as DeiT has them.
    """
    missing = {**dict(classifier.trunk.named_parameters()), **dict(classifier.trunk.named_buffers())}
    for name, value in trunk_values:
        del missing[name]
        yield f"trunk.{name}", value
    if missing:
        fresh = classifier.trunk.initial_values(seed)
        yield from ((f"trunk.{name}", fresh(name, tensor.shape)) for name, tensor in missing.items())
    weight_CD = torch.empty(classifier.head.weight.shape)
    generator = generator_for(seed, "head.weight")
    yield "head.weight", nn.init.trunc_normal_(weight_CD, std=INITIAL_STD, generator=generator)
    yield "head.bias", torch.zeros(classifier.head.bias.shape)
