"""What is measured: a network and the form of the images that it takes, from any CHECKPOINT.

Shapes: B images, S their side, D features.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.data.decode import AS_IT_IS, CenterCrop, Reading
from engine.distributed.world import World, in_turn
from engine.evaluation.readout import readout
from engine.logger import note
from engine.recipe.sections import Interpolation
from engine.weights.opening import open_trunk, open_weights
from engine.weights.weights import EncoderName, fill_trunk


@dataclass(frozen=True)
class Subject:
    """network: images [B, 3, S, S], normalised by mean and std, -> features or logits [B, D]; on the device.

    crop_fraction: side of the centre crop over the shorter side of the resized image, resized by `interpolation`.
    reading: what the pixels of files stand for.
    dtype: of the images that the network takes.
    """

    network: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    interpolation: Interpolation = "bilinear"
    dtype: torch.dtype = torch.float32
    reading: Reading = AS_IT_IS

    @property
    def crop(self) -> CenterCrop:
        return CenterCrop(self.image_size, self.crop_fraction, self.interpolation, self.reading)

    def normalised(self, image_B3SS: Tensor, device: torch.device | str) -> Tensor:
        """Pixels from 0 to 255 as the network takes them: (pixels / 255 - mean) / std in `dtype` on the device."""
        mean_311, std_311 = (
            torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (self.mean, self.std)
        )
        # Convolutions compute by the layout of what they get, and round accordingly.
        pixels = image_B3SS.to(device, non_blocking=True).contiguous().float().div_(255)
        return pixels.sub_(mean_311).div_(std_311).to(self.dtype)

    @torch.no_grad()
    def width(self, device: torch.device | str) -> int:
        """D."""
        return self.network(torch.zeros(1, 3, self.image_size, self.image_size, device=device)).shape[1]


def open_subject(
    checkpoint: str,
    device: torch.device | str,
    *,
    encoder: EncoderName = "base",
    features: str = "own",
    baseline: Literal["initial", "pixels"] | None = None,
    crop_fraction: float | None = None,
    interpolation: Interpolation | None = None,
    reading: Reading | None = None,
    heads: int | None = None,
) -> Subject:
    """The frozen network of a CHECKPOINT, float32, in eval mode on the device; for this process alone.

    Args:
        features: which of the network's numbers; engine.evaluation.readout tells them apart.
        baseline: a network to compare it with on the same images: `initial` is the same one before training (with the
            seed of its recipe, 0 where it has none), `pixels` the images themselves.
        crop_fraction, interpolation, reading: None for those of the checkpoint's recipe, or of who published it.
        heads: of a ViT whose file does not tell its number of them.

    Raises:
        UserError: there is no such CHECKPOINT or choice.
    """
    if baseline == "pixels":
        weights, network = open_weights(checkpoint, heads), nn.Flatten()
    else:
        weights = open_trunk(checkpoint, encoder, untrained=baseline == "initial", heads=heads)
        network = readout(fill_trunk(weights), features)
    about = weights.known()
    network = network.to(device).eval().requires_grad_(False)
    fraction, by = crop_fraction or about.crop_fraction, interpolation or about.interpolation or "bilinear"
    form = about.image_size, about.mean, about.std, fraction, by
    subject = Subject(network, *form, reading=reading or about.reading)
    is_ours = about.recipe is not None or (crop_fraction, interpolation) != (None, None)
    if not is_ours and (about.stated_crop, about.interpolation) != (None, None):
        note(f"images are prepared as {weights.origin} says: {_in_words(subject.crop)}")
    return subject


def _in_words(crop: CenterCrop) -> str:
    return f"the shorter side {crop.resized_side} pixels ({crop.interpolation}), of which the centre's {crop.size}"


def open_subject_together(checkpoint: str, world: World, **choice: Any) -> Subject:
    """`open_subject`, with its keywords, on every rank's device; rank 0 first, so that it alone fetches what is not
    there yet.

    Raises:
        UserError: on every rank, where it was raised on any.
    """
    return in_turn(world, lambda: open_subject(checkpoint, world.device, **choice))
