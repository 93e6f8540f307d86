"""The proof of an export: its own library loads it, and its features are those of the original."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from engine.errors import RunFailed, one_line
from engine.weights.formats.table import format_page
from engine.weights.read import read_weights
from engine.weights.weights import EncoderName, Weights, fill_trunk
from models.architecture import Architecture

TOLERANCE = 1e-4  # of the largest feature; another head count or position order differs by a tenth and more
BATCH = 3


@torch.no_grad()
def prove(
    open_original: Callable[[], Weights], encoder: EncoderName, name: str, path: Path, architecture: Architecture
) -> float:
    """Compare the export at `path`, of this architecture, with its original, by logits where that has a head.

    Returns the largest difference over the largest feature. Raises RunFailed where they differ or the library refuses
    the export.
    """
    original = open_original()
    trunk = original.trunk(encoder)
    size = trunk.known().image_size
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours_ND = fill_trunk(trunk)(images)
    if not (ours_ND[0] - ours_ND[1]).abs().max() > 0:
        raise RunFailed("the original's features are the same for every image, or not finite: an export proves nothing")
    if original.head is not None:
        ours_ND = linear(ours_ND, original.head.weight.float(), original.head.bias.float())
    try:
        theirs_ND = format_page(name).features(path, architecture, images)
        if theirs_ND is None:
            theirs_ND = fill_trunk(read_weights(path).trunk("base"))(images)
        if format_page(name).whole:
            _check_bits(original, read_weights(path), keep_dtype=name == "safetensors")
    except Exception as error:  # whatever a library has to say against a file
        raise RunFailed(f"the export to {name} was refused by its own reader: {one_line(error)[:500]}") from error
    difference = ((theirs_ND - ours_ND).abs().max() / ours_ND.abs().max()).item()
    if not difference <= TOLERANCE:  # not-a-number too
        raise RunFailed(
            f"the export to {name} has other features than its original: the largest difference is {difference:.1e} "
            f"of the largest feature, where {TOLERANCE} is allowed; nothing was written"
        )
    return difference


def _check_bits(original: Weights, written: Weights, keep_dtype: bool) -> None:
    """Formats of all weights give back every tensor as it was."""
    if original.shapes.keys() != written.shapes.keys():
        raise ValueError("it holds other tensors than its original")
    names = list(original.shapes)
    for (name, one), (_, two) in zip(original.read(names), written.read(names), strict=True):
        expected = one if keep_dtype or one.dtype != torch.float64 else one.float()
        if expected.dtype != two.dtype or not torch.equal(expected, two):
            raise ValueError(f"{name} is not as in its original")
