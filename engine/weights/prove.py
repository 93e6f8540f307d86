"""The proof of an export: its own library loads it, prepares an image file, and gives the original's features."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from engine.data.decode import CenterCrop
from engine.errors import RunFailed, one_line
from engine.weights.formats.table import format_page
from engine.weights.read import read_weights
from engine.weights.weights import EncoderName, Weights, fill_trunk
from models.architecture import Architecture

TOLERANCE = 1e-4  # of the largest feature; another head count or position order differs by a tenth and more
BATCH = 3
LEAST_COSINE = 0.9999  # of an image file's features
SHADE = 0.02  # by which pixels from 0 to 1 may differ on average: libraries round them at other points of the way


class Proof(NamedTuple):
    """difference: the largest of features over the largest feature. cosine: between the features of an image file by
    the library's own transform and by evaluation's, which only another crop (`Format.crop`) makes less than the least;
    None where the export cannot say how images are made ready."""

    difference: float
    cosine: float | None


@torch.no_grad()
def prove(
    open_original: Callable[[], Weights], encoder: EncoderName, name: str, path: Path, architecture: Architecture
) -> Proof:
    """Compare the export at `path`, of this architecture, with its original, by logits where that has a head.

    Raises RunFailed where they differ or the library refuses the export.
    """
    original = open_original()
    trunk = original.trunk(encoder)
    size, network = trunk.known().image_size, fill_trunk(trunk)
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    page = format_page(name)
    crop = page.crop(trunk.crop)
    photo = _photo(crop)
    photo_13SS = _prepared(original, crop, photo)
    ours_ND, ours_1D = _outputs(original, network, images), _outputs(original, network, photo_13SS)
    if not (ours_ND[0] - ours_ND[1]).abs().max() > 0:
        raise RunFailed("the original's features are the same for every image, or not finite: an export proves nothing")
    try:
        theirs_ND = page.features(path, architecture, images)
        if theirs_ND is None:
            theirs_ND = fill_trunk(read_weights(path).trunk("base"))(images)
        theirs_13SS = _prepared_by_library(name, path, photo)
        theirs_1D = None if theirs_13SS is None else page.features(path, architecture, theirs_13SS)
        if page.whole:
            _check_bits(original, read_weights(path), keep_dtype=name == "safetensors")
    except Exception as error:  # whatever a library has to say against a file
        raise RunFailed(f"the export to {name} was refused by its own reader: {one_line(error)[:500]}") from error
    difference = ((theirs_ND - ours_ND).abs().max() / ours_ND.abs().max()).item()
    if not difference <= TOLERANCE:  # not-a-number too
        raise RunFailed(
            f"the export to {name} has other features than its original: the largest difference is {difference:.1e} "
            f"of the largest feature, where {TOLERANCE} is allowed; nothing was written"
        )
    if theirs_13SS is None or theirs_1D is None:
        return Proof(difference, None)
    _check_pixels(theirs_13SS, photo_13SS, min(trunk.known().std), name)
    cosine = _checked_cosine(theirs_1D, ours_1D, name)
    if crop != trunk.crop:
        evaluated_1D = _outputs(original, network, _prepared(original, trunk.crop, photo))
        cosine = cosine_similarity(theirs_1D.double(), evaluated_1D.double()).item()
    return Proof(difference, cosine)


def _outputs(original: Weights, network: nn.Module, images: Tensor) -> Tensor:
    """Features, or logits where the original has a head."""
    feature_ND, head = network(images), original.head
    return feature_ND if head is None else linear(feature_ND, head.weight.float(), head.bias.float())


# ---- an image file ---------------------------------------------------------------------------------------------------


def _photo(crop: CenterCrop) -> Image.Image:
    """An image that is no square and twice as large as evaluation resizes it, smooth as photographs are.

    Its width leaves whole pixels beside the centre, as libraries round halves up or down.
    """
    height = crop.resized_side
    width = crop.size + 4 * (height // 4)
    coarse = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)


def _prepared(original: Weights, crop: CenterCrop, photo: Image.Image) -> Tensor:
    """[1, 3, S, S] as evaluation makes it, but for the crop."""
    about = original.known()
    mean_311, std_311 = (torch.tensor(values).view(3, 1, 1) for values in (about.mean, about.std))
    return ((crop(photo).float() / 255 - mean_311) / std_311)[None]


def _prepared_by_library(name: str, path: Path, photo: Image.Image) -> Tensor | None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "photo.png"
        photo.save(file)
        return format_page(name).images(path, file)


def _check_pixels(theirs_13SS: Tensor, ours_13SS: Tensor, std: float, name: str) -> None:
    if theirs_13SS.shape != ours_13SS.shape or not (theirs_13SS - ours_13SS).abs().mean() <= SHADE / std:
        raise RunFailed(f"{name}'s own transform shows the network another part of an image file; nothing was written")


def _checked_cosine(theirs_1D: Tensor, ours_1D: Tensor, name: str) -> float:
    cosine = cosine_similarity(theirs_1D.double(), ours_1D.double()).item()
    if not cosine >= LEAST_COSINE:
        raise RunFailed(
            f"the export to {name} gives an image file other features by its own transform: their cosine is "
            f"{cosine:.6f}, where {LEAST_COSINE} is the least; nothing was written"
        )
    return cosine


def _check_bits(original: Weights, written: Weights, keep_dtype: bool) -> None:
    """Formats of all weights give back every tensor as it was."""
    if original.shapes.keys() != written.shapes.keys():
        raise ValueError("it holds other tensors than its original")
    names = list(original.shapes)
    for (name, one), (_, two) in zip(original.read(names), written.read(names), strict=True):
        expected = one if keep_dtype or one.dtype != torch.float64 else one.float()
        if expected.dtype != two.dtype or not torch.equal(expected, two):
            raise ValueError(f"{name} is not as in its original")
