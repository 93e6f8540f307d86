"""A frozen network for the programs of others: what `engine.load` returns.

Shapes: B images, S their side, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from PIL import Image
from torch import Tensor, nn

from engine.errors import UserError, one_line
from engine.evaluation.subject import Subject, open_subject
from engine.weights.weights import EncoderName


@dataclass(frozen=True)
class Encoder:
    """Images [B, 3, S, S] made by `transform` -> features [B, D], without gradients.

    network: what computes them, in eval mode, on the CPU until `encoder.network.to("cuda")` moves it.
    width: D. image_size: S. subject: how evaluation sees the same network.
    """

    network: nn.Module
    width: int
    image_size: int
    subject: Subject

    def transform(self, image: Image.Image) -> Tensor:
        """An image as the network takes it: float32 [3, S, S], resized, cropped and normalised as in evaluation."""
        return self.subject.normalised(self.subject.crop(image), "cpu")

    @torch.no_grad()
    def __call__(self, image_B3SS: Tensor) -> Tensor:
        """Raises ValueError for images of another shape."""
        expected = (3, self.image_size, self.image_size)
        if image_B3SS.ndim != 4 or image_B3SS.shape[1:] != expected:
            raise ValueError(f"images ({list(image_B3SS.shape)}) must be [B, {', '.join(map(str, expected))}]")
        return self.network(image_B3SS.to(next(self.network.parameters()).device))


def open_encoder(checkpoint: str | Path, encoder: EncoderName, heads: int | None) -> Encoder:
    """The encoder of a CHECKPOINT. Raises UserError."""
    if encoder not in get_args(EncoderName):
        raise UserError(f"encoder ({one_line(encoder)}) must be one of {', '.join(get_args(EncoderName))}")
    subject = open_subject(str(checkpoint), "cpu", encoder=encoder, heads=heads)
    return Encoder(subject.network, subject.width("cpu"), subject.image_size, subject)
