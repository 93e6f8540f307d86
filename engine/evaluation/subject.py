"""What is measured: a frozen network and the form of the images that it takes, from any CHECKPOINT."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engine.agree import agreement
from engine.distributed import World
from engine.encoders import open_weights
from engine.evaluation.readout import readout
from engine.front_door import say_once
from engine.recipe import loads
from engine.weights.weights import About, EncoderName, Weights, fill_trunk
from models.moco import MoCo, initial_values

Baseline = Literal["initial", "pixels"]


@dataclass(frozen=True)
class Subject:
    """network: images [B, 3, S, S], normalised by mean and std, -> features [B, D]; frozen, float32, on the device.

    crop_fraction: side of the centre crop over the shorter side of the resized image.
    """

    network: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float

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
    """The network of a CHECKPOINT, copied to every rank, or one to compare it with on the same images.

    Args:
        features: which numbers of the trunk (engine.evaluation.readout).
        baseline: `initial` for the same network before training (with the seed of its recipe, 0 where it has none),
            `pixels` for the images themselves.
        crop_fraction: None for that of the checkpoint's recipe.

    Raises:
        UserError: on every rank.
    """
    subject = None
    for turn in (world.is_first, not world.is_first):  # rank 0 first: it alone fetches published weights
        with agreement(world.host_group):
            if turn:
                subject = _open(checkpoint, world, encoder, features, baseline, crop_fraction)
    return subject


def _open(
    checkpoint: str,
    world: World,
    encoder: EncoderName,
    features: str,
    baseline: Baseline | None,
    crop_fraction: float | None,
) -> Subject:
    weights = open_weights(checkpoint)
    about = weights.known()
    if baseline == "pixels":
        network = nn.Flatten()
    else:
        trunk = _initial(about) if baseline == "initial" else weights.trunk(encoder)
        network = readout(fill_trunk(trunk), features)
    for note in weights.notes:
        say_once(note)
    network = network.to(world.device).eval().requires_grad_(False)
    return Subject(network, about.image_size, about.mean, about.std, crop_fraction or about.crop_fraction)


def _initial(about: About) -> Weights:
    """The trunk before training, as a run of its recipe begins."""
    seed = loads(about.recipe, "recipe of the checkpoint").run.seed if about.recipe else 0
    with torch.device("meta"):
        moco = MoCo(about.architecture.build, 1, 1)  # its heads are not drawn
    shapes = {n: t.shape for n, t in moco.state_dict().items() if n.startswith("base.trunk.")}

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        return ((name, value) for name, value in initial_values(moco, seed) if name in wanted)

    return Weights(about, shapes, read, "the initial network")
