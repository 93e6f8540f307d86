"""What is measured: a network and the form of the images that it takes, from any CHECKPOINT."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.distributed.world import World, in_turn
from engine.evaluation.readout import readout
from engine.recipe.sections import Interpolation
from engine.weights.opening import open_trunk, open_weights
from engine.weights.weights import EncoderName, fill_trunk

Baseline = Literal["initial", "pixels"]


@dataclass(frozen=True)
class Subject:
    """network: images [B, 3, S, S], normalised by mean and std, -> features or logits [B, D]; on the device.

    crop_fraction: side of the centre crop over the shorter side of the resized image, resized by `interpolation`.
    dtype: of the images that the network takes.
    """

    network: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    interpolation: Interpolation = "bilinear"
    dtype: torch.dtype = torch.float32

    def width(self, device: torch.device) -> int:
        """D."""
        with torch.no_grad():
            return self.network(torch.zeros(1, 3, self.image_size, self.image_size, device=device)).shape[1]


def open_subject(
    checkpoint: str,
    world: World,
    *,
    encoder: EncoderName = "base",
    features: str = "own",
    baseline: Baseline | None = None,
    crop_fraction: float | None = None,
) -> Subject:
    """The frozen network of a CHECKPOINT, copied to every rank, or one to compare it with on the same images.

    Args:
        features: which numbers of the trunk (engine.evaluation.readout).
        baseline: `initial` for the same network before training (with the seed of its recipe, 0 where it has none),
            `pixels` for the images themselves.
        crop_fraction: None for that of the checkpoint's recipe.

    Raises:
        UserError: on every rank.
    """
    return in_turn(world, lambda: _open(checkpoint, world, encoder, features, baseline, crop_fraction))


def _open(
    checkpoint: str,
    world: World,
    encoder: EncoderName,
    features: str,
    baseline: Baseline | None,
    crop_fraction: float | None,
) -> Subject:
    if baseline == "pixels":
        weights, network = open_weights(checkpoint), nn.Flatten()
    else:
        weights = open_trunk(checkpoint, encoder, untrained=baseline == "initial")
        network = readout(fill_trunk(weights), features)
    about = weights.known()
    network = network.to(world.device).eval().requires_grad_(False)
    return Subject(network, about.image_size, about.mean, about.std, crop_fraction or about.crop_fraction)
