"""Stochastic depth (Huang et al. 2016) that no rank and no batch decides.

Shapes: B images of this rank, S side of an image.
"""

from collections import Counter
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn

BATCH = 2  # images of the forward that shows how a network uses its drop paths


class ChosenDropPath(nn.Module):
    """Stochastic depth of a residual branch [B, ...]: dropped, or divided by the share kept.

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


def drop_path_places(make: Callable[[float], nn.Module], image_size: int, highest: float) -> dict[str, float]:
    """Where the network that `make` builds with this highest probability has timm's stochastic depth: by path, the
    probability of each.

    Raises:
        ValueError: one of them serves several branches, or a branch whose first dimension is not the batch.
    """
    with torch.device("meta"):
        twin = make(highest)
    found = {path: module for path, module in twin.named_modules() if isinstance(module, DropPath)}
    found = {path: module for path, module in found.items() if module.drop_prob > 0}
    calls: Counter[nn.Module] = Counter()
    for module in found.values():
        module.register_forward_hook(
            lambda module, inputs, _: calls.update([module] if len(inputs[0]) == BATCH else [])
        )
    with torch.device("meta"), torch.no_grad():
        twin.train()(torch.empty(BATCH, 3, image_size, image_size))
    odd = [path for path, module in found.items() if calls[module] != 1]
    if odd:
        raise ValueError(
            f"model.drop_path must be 0 for this trunk, whose stochastic depth ({odd[0]}) is not of one branch"
        )
    return {path: module.drop_prob for path, module in found.items()}
