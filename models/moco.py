"""MoCo v3's three networks: base encoder, momentum encoder, predictor (paper section 3, Algorithm 1).

Shapes: V views, B images of this rank, D feature width, P output width of the heads.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models import heads
from models.initial import generator_for
from models.norm import GlobalBatchNorm
from models.trunk import is_vit


class Encoder(nn.Module):
    """A trunk and its projector: images [V*B, 3, H, W] -> features [V*B, D] -> projections [V*B, P]."""

    def __init__(self, trunk: nn.Module, hidden_dim: int, output_dim: int):
        super().__init__()
        self.trunk = trunk
        layers = 3 if is_vit(trunk) else 2
        self.projector = heads.head(trunk.num_features, hidden_dim, output_dim, layers=layers, last_norm=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return features, self.projector(features)


class MoCo(nn.Module):
    """Base encoder, momentum encoder and predictor. The momentum encoder takes no gradients.

    Args:
        build_trunk: makes a fresh trunk (models.trunk); called once for each encoder.
        hidden_dim: width of the heads' hidden layers.
        output_dim: P.
    """

    def __init__(self, build_trunk: Callable[[], nn.Module], hidden_dim: int, output_dim: int):
        super().__init__()
        self.base = Encoder(build_trunk(), hidden_dim, output_dim)
        self.momentum = Encoder(build_trunk(), hidden_dim, output_dim).requires_grad_(False)
        # Only the ViT's predictor ends in BatchNorm (appendix A).
        self.predictor = heads.head(output_dim, hidden_dim, output_dim, layers=2, last_norm=is_vit(self.base.trunk))

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Base features [V*B, D] and queries [V*B, P] of the images [V*B, 3, H, W] of V crop batches."""
        features, projections = self.base(images)
        return features, self.predictor(projections)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Keys [V*B, P] of the images [V*B, 3, H, W] of V crop batches, without gradient."""
        return self.momentum(images)[1]


@torch.no_grad()
def update_momentum(momentum: list[Tensor], base: list[Tensor], m: float) -> None:
    """Move the momentum encoder towards the base encoder in place: m * momentum + (1 - m) * base.

    Takes each rank's own shards, parameters only: BatchNorm's buffers follow the momentum encoder's own forward.
    """
    torch._foreach_lerp_(momentum, base, 1 - m)


def initial_values(moco: MoCo, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a fresh MoCo as (name, value on the CPU), one at a time.

    The momentum encoder starts as a copy of the base encoder. Values depend on the seed alone.
    """
    draw_trunk = moco.base.trunk.initial_values(seed)
    fresh = {id(b) for m in moco.modules() if isinstance(m, GlobalBatchNorm) for b in m.buffers(recurse=False)}
    for name, tensor in (*moco.named_parameters(), *moco.named_buffers()):
        source = name.replace("momentum.", "base.", 1) if name.startswith("momentum.") else name
        if id(tensor) in fresh:
            value = torch.ones(tensor.shape) if name.endswith("running_var") else torch.zeros(tensor.shape)
        elif source.startswith("base.trunk."):
            value = draw_trunk(source.removeprefix("base.trunk."), tensor.shape)
        else:
            value = heads.initial_value(name, tensor.shape, generator_for(seed, source))
        yield name, value
