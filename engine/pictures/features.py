"""Images with the features that a network gives them: what neighbours and maps show.

Shapes: N images, D features, S side of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.decode import CenterCrop, decode
from engine.data.opening import open_source
from engine.data.outputs import check_picture
from engine.data.source import Root, Source
from engine.data.workers import Workers
from engine.errors import UserError, reason
from engine.evaluation.features import batches_for, extract
from engine.evaluation.subject import Subject, open_subject

CONSEQUENCE = "it is left out of the picture"


@dataclass(frozen=True)
class Featured:
    """Images of a source that could be read: features [N, D], numbers in the source [N], labels [N] (-1: none).

    name: what the picture calls the network.
    """

    name: str
    source: Source
    subject: Subject
    feature_ND: Tensor
    id_N: Tensor
    label_N: Tensor

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes or ()

    @property
    def number(self) -> str:
        """How many images there are, in words."""
        of = f" of {len(self.source):,}" if len(self.id_N) < len(self.source) else ""
        return f"{len(self.id_N):,}{of} images" + (f" of {len(self.classes)} classes" if self.classes else "")

    def caption(self, row: int) -> str:
        """What is written beside the image of this row: its class, else the name of its file."""
        if self.classes:
            return self.classes[int(self.label_N[row])]
        return self.source.name(int(self.id_N[row])).rpartition("/")[2]

    @torch.no_grad()
    def of_file(self, key: str, file: Path) -> tuple[Tensor, Tensor]:
        """(uint8 [S, S, 3], [D]): what the network sees of another image, and its features. Raises as `read_view`."""
        image_3SS = read_view(key, file, self.subject.crop)
        device = next((p.device for p in self.subject.network.parameters()), "cpu")
        feature_1D = self.subject.network(self.subject.normalised(image_3SS[None], device))
        return image_3SS.permute(1, 2, 0), feature_1D[0].float().cpu()

    def pixels(self, row_N: Tensor) -> Tensor:
        """uint8 [N, S, S, 3]: what the network sees of the images in these rows."""
        found = batches_for(self.subject, self.source, self.id_N[row_N].numpy(), Workers(()), CONSEQUENCE)
        return torch.cat([batch.images[: batch.valid] for batch in found]).permute(0, 2, 3, 1)


def open_featured(checkpoint: str, root: Root, out: Path, *, at_most: int, workers: int, **choice: Any) -> Featured:
    """Validation images of `root`, or all where it tells none apart, as a CHECKPOINT sees them.

    out: where a picture of them will be. at_most: how many images at most, evenly spread. workers: processes that read.
    choice: of `open_subject`.
    Raises UserError.
    """
    source = open_source(root, "val") or open_source(root, "train")
    assert source is not None  # of val alone there may be none
    check_picture(out, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = np.linspace(0, len(source) - 1, min(at_most, len(source))).round().astype(np.int64)
    with Workers([source], workers) as readers:
        subject = open_subject(checkpoint, device, **choice)
        rows = extract(subject, batches_for(subject, source, ids, readers, CONSEQUENCE), device)
    if not len(rows.id_N):
        raise UserError(f"{root} must hold images that can be read, and none of {len(ids):,} can; mend them")
    name = checkpoint if checkpoint.startswith("timm/") else Path(checkpoint).resolve().name
    return Featured(name, source, subject, *rows)


def read_view(key: str, file: Path, crop: CenterCrop) -> Tensor:
    """What evaluation sees of a file, uint8 [3, S, S]; `key` is what its error calls it. Raises UserError."""
    try:
        return crop(decode(file.read_bytes()))
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise UserError(f"{key} ({file}) must be a readable image: {reason(error)}; pass another") from error


def unit(feature_ND: Tensor) -> Tensor:
    """Every row at length 1, in float64: only its direction counts, as in kNN. Raises UserError if not finite."""
    if not feature_ND.isfinite().all():
        raise UserError("CHECKPOINT must give finite features, and does not: its weights have diverged; pass another")
    return F.normalize(feature_ND.double(), dim=1)
