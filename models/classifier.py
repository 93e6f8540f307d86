"""A trunk and a linear classifier that are trained together, with stochastic depth that no rank and no batch decides.

Shapes: B images of this rank, C classes, K paths that may be dropped.
"""

from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor, nn

from models.drop_path import ChosenDropPath
from models.initial import generator_for
from models.parts import Network, Part
from models.trunk import Trunk

INITIAL_STD = 0.02  # of the classifier's weight


class Classifier(Network):
    """Images [B, 3, H, W] -> logits [B, C]. What pre-training froze is trained too.

    Args:
        trunk: a fresh one (models.architecture).
        drop_path: the highest share of samples for which a residual branch is left out; mostly it grows with the depth
            from 0.

    Attributes:
        drop_paths: the K places, in order.
        layers, no_weight_decay: the trunk's, for rates and weight decay by layer.

    Raises:
        ValueError: the trunk has no stochastic depth, or one of another kind, and `drop_path` is not 0.
    """

    def __init__(self, trunk: Trunk, classes: int, drop_path: float = 0.0):
        super().__init__()
        self.trunk = trunk.module.requires_grad_(True)
        for name in trunk.never_trained:
            self.trunk.get_parameter(name).requires_grad_(False)
        self.head = nn.Linear(trunk.width, classes)
        self.drop_paths = _put_drop_paths(trunk, drop_path)
        self.layers, self.no_weight_decay = trunk.layers, trunk.no_weight_decay
        self._draw_trunk = trunk.initial_values

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def choose_paths(self, uniform_BK: Tensor) -> None:
        """Which branches the next forward in training leaves out, from K uniform numbers in [0, 1) per sample."""
        for path, uniform_B in zip(self.drop_paths, uniform_BK.unbind(1), strict=True):
            path.scale_B = (uniform_B >= path.probability).float() / (1 - path.probability)

    def parts(self) -> list[Part]:
        """Trunk and head; neither is trained in a classifier that takes no gradients, as a moving average."""
        is_trained = self.head.weight.requires_grad
        return [Part(self.trunk, True, is_trained), Part(self.head, False, is_trained)]

    def initial_values(
        self, trunk_values: Iterable[tuple[str, Tensor]], seed: int, held: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer at the start but those `held`, as (name, value on the CPU), one at a time.

        The trunk's are `trunk_values`; what these lack (buffers that no file holds) is as in a fresh trunk. The weight
        of the classifier is drawn by `seed` and its bias is 0, as DeiT has them.

        Args:
            held: names whose values come from elsewhere, as from a checkpoint; with them goes the whole head.
        """
        tensors = {**dict(self.trunk.named_parameters()), **dict(self.trunk.named_buffers())}
        missing = {name: tensor for name, tensor in tensors.items() if f"trunk.{name}" not in held}
        for name, value in trunk_values:
            del missing[name]
            yield f"trunk.{name}", value
        if missing:
            fresh = self._draw_trunk(seed)
            yield from ((f"trunk.{name}", fresh(name, tensor.shape)) for name, tensor in missing.items())
        if "head.weight" in held:
            return
        weight_CD = torch.empty(self.head.weight.shape)
        generator = generator_for(seed, "head.weight")
        yield "head.weight", nn.init.trunc_normal_(weight_CD, std=INITIAL_STD, generator=generator)
        yield "head.bias", torch.zeros(self.head.bias.shape)


def _put_drop_paths(trunk: Trunk, highest: float) -> list[ChosenDropPath]:
    """Put one into every place where the trunk's library has stochastic depth of this highest probability."""
    probabilities = trunk.drop_paths(highest) if highest > 0 else {}
    if highest > 0 and not probabilities:
        raise ValueError(f"model.drop_path ({highest}) must be 0 for this trunk, which has no stochastic depth")
    found = []
    for path, probability in probabilities.items():
        found.append(ChosenDropPath(probability))
        parent, _, name = path.rpartition(".")
        setattr(trunk.module.get_submodule(parent), name, found[-1])
    return found
