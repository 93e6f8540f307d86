"""MoCo v3's three networks: base encoder, momentum encoder, predictor (paper section 3, Algorithm 1).

Shapes: V views, B images of this rank, D feature width, P output width of the heads.
"""

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor, nn

from models import heads
from models.initial import seeded
from models.norm import set_views
from models.parts import Network, Part
from models.trunk import Trunk


class Encoder(nn.Module):
    """A trunk and its projector: images [V*B, 3, H, W] -> features [V*B, D] -> projections [V*B, P]."""

    def __init__(self, trunk: Trunk, hidden_dim: int, output_dim: int):
        super().__init__()
        self.trunk = trunk.module
        layers = 3 if trunk.is_vit else 2
        self.projector = heads.head(trunk.width, hidden_dim, output_dim, layers=layers, last_norm=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return features, self.projector(features)


class MoCo(Network):
    """Base encoder, momentum encoder and predictor. The momentum encoder takes no gradients.

    Args:
        build_trunk: makes a fresh trunk (models.architecture); called once for each encoder.
        hidden_dim: width of the heads' hidden layers.
        output_dim: P.

    Attributes:
        views: V, the crop batches that lie one after another in a training input.
        width: D.
    """

    views = 2

    def __init__(self, build_trunk: Callable[[], Trunk], hidden_dim: int, output_dim: int):
        super().__init__()
        trunk = build_trunk()
        self.width, self._draw_trunk = trunk.width, trunk.initial_values
        self.base = Encoder(trunk, hidden_dim, output_dim)
        self.momentum = Encoder(build_trunk(), hidden_dim, output_dim).requires_grad_(False)
        # Only the ViT's predictor ends in BatchNorm (appendix A).
        self.predictor = heads.head(output_dim, hidden_dim, output_dim, layers=2, last_norm=trunk.is_vit)
        set_views(self, self.views)

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Base features [V*B, D] and queries [V*B, P] of the images [V*B, 3, H, W] of V crop batches."""
        features, projections = self.base(images)
        return features, self.predictor(projections)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Keys [V*B, P] of the images [V*B, 3, H, W] of V crop batches, without gradient."""
        return self.momentum(images)[1]

    def parts(self) -> list[Part]:
        """Every trunk and head, in the order in which they are made FSDP's roots."""
        return [
            Part(self.base.trunk, is_trunk=True, is_trained=True),
            Part(self.base.projector, is_trunk=False, is_trained=True),
            Part(self.momentum.trunk, is_trunk=True, is_trained=False),
            Part(self.momentum.projector, is_trunk=False, is_trained=False),
            Part(self.predictor, is_trunk=False, is_trained=True),
        ]

    def initial_values(self, seed: int, held: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer before training but those `held`, as (name, value on the CPU), one at a time.

        The momentum encoder starts as a copy of the base encoder: its values follow theirs, and are the same tensors.
        Values depend on the seed alone.

        Args:
            held: names whose values come from elsewhere, as from a checkpoint; nothing is drawn for them.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        drawn = {name: t for name, t in tensors.items() if not (name.startswith("momentum.") or name in held)}
        if not drawn:
            return
        draw_trunk, draw_head = self._draw_trunk(seed), seeded(heads.initial_value)(seed)
        for name, tensor in drawn.items():
            inner = name.removeprefix("base.trunk.")
            value = draw_head(name, tensor.shape) if inner == name else draw_trunk(inner, tensor.shape)
            yield name, value
            if name.startswith("base."):
                yield name.replace("base.", "momentum.", 1), value
