"""The proof of an export: its own library loads it, and its features are those of the source."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from engine.errors import RunFailed, one_line
from engine.weights.formats.table import page
from engine.weights.read import read_weights
from engine.weights.weights import EncoderName, Weights, fill_trunk
from models.architecture import Architecture

TOLERANCE = 1e-4  # of the largest feature; another head count or position order differs by a tenth and more
BATCH = 3


@torch.no_grad()
def prove(
    open_source: Callable[[], Weights], encoder: EncoderName, name: str, path: Path, architecture: Architecture
) -> float:
    """Compare the export at `path`, of this architecture, with its source, by logits where the source has a head.

    Returns the largest difference over the largest feature. Raises RunFailed where they differ or the library refuses
    the export.
    """
    source = open_source()
    trunk = source.trunk(encoder)
    size = trunk.known().image_size
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours_ND = fill_trunk(trunk)(images)
    if not (ours_ND[0] - ours_ND[1]).abs().max() > 0:
        raise RunFailed("the source's features are the same for every image, or not finite: an export proves nothing")
    if source.head is not None:
        ours_ND = linear(ours_ND, source.head.weight.float(), source.head.bias.float())
    try:
        theirs_ND = page(name).features(path, architecture, images)
        if theirs_ND is None:
            theirs_ND = fill_trunk(read_weights(path).trunk("base"))(images)
        if page(name).whole:
            _check_bits(source, read_weights(path), keep_dtype=name == "safetensors")
    except Exception as error:  # whatever a library has to say against a file
        raise RunFailed(f"the export to {name} was refused by its own reader: {one_line(error)[:500]}") from error
    difference = ((theirs_ND - ours_ND).abs().max() / ours_ND.abs().max()).item()
    if not difference <= TOLERANCE:  # not-a-number too
        raise RunFailed(
            f"the export to {name} has other features than its source: the largest difference is {difference:.1e} "
            f"of the largest feature, where {TOLERANCE} is allowed; nothing was written"
        )
    return difference


def _check_bits(source: Weights, written: Weights, keep_dtype: bool) -> None:
    """Formats of all weights give back every tensor as it was."""
    if source.shapes.keys() != written.shapes.keys():
        raise ValueError("it holds other tensors than its source")
    names = list(source.shapes)
    for (name, one), (_, two) in zip(source.read(names), written.read(names), strict=True):
        expected = one if keep_dtype or one.dtype != torch.float64 else one.float()
        if expected.dtype != two.dtype or not torch.equal(expected, two):
            raise ValueError(f"{name} is not as in its source")
