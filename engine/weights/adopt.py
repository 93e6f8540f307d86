"""Fit weights to a recipe's network, to pre-train on from: other grids, fresh parts."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from engine.errors import UserError
from engine.logger import note
from engine.weights.positions import is_sincos, side
from engine.weights.weights import Weights, base_shapes, check_names
from models.architecture import Architecture, by_shape, moco_shapes
from models.vit import NORM_EPS, sincos_position

POSITIONS = ("base.trunk.pos_embed", "momentum.trunk.pos_embed")


def adopt(weights: Weights, architecture: Architecture, head_dims: tuple[int, int], *, interpolate: bool) -> Weights:
    """`weights` for the network that a recipe declares; one trunk alone stays one.

    Position embeddings of another grid are computed anew where they are MoCo v3's sines; learned ones are interpolated
    where `interpolate` allows it.

    Args:
        architecture: one that can be built. head_dims: (hidden, output) of projector and predictor.

    Raises:
        UserError: the weights are of another network.
    """
    wanted = _untagged(by_shape(architecture))
    found = weights.about and _untagged(by_shape(weights.about.architecture))
    if found and (difference := found.differs_from(wanted)):
        raise UserError(
            f"weights ({weights.origin}) must fit the recipe's model: {difference}; use its own recipe or "
            "other model.* keys"
        )
    expected = moco_shapes(architecture, *head_dims) if weights.is_whole else base_shapes(architecture)
    moved = [name for name in POSITIONS if _is_other_grid(name, weights, expected)]
    check_names(weights.shapes | {name: expected[name] for name in moved}, expected, weights.origin)
    regridded = {
        name: _regrid(tensor, expected[name], weights.origin, interpolate) for name, tensor in weights.read(moved)
    }

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.read(names):
            yield name, regridded.get(name, tensor)

    return dataclasses.replace(weights, shapes=expected, read=read)


def with_usual_norms(weights: Weights) -> Weights:
    """The same for a network that is trained on, whose LayerNorms have the usual eps; says so where theirs have not."""
    about = weights.about
    if about is None or about.norm_eps is None:
        return weights
    note(f"{weights.origin} has LayerNorms with an eps of {about.norm_eps:g}; those that are trained have {NORM_EPS:g}")
    return dataclasses.replace(weights, about=dataclasses.replace(about, norm_eps=None))


def _untagged(architecture: Architecture) -> Architecture:
    """Without the tag that timm gives to weights of one network by what they were trained on."""
    if architecture.kind != "timm":
        return architecture
    name = architecture.arguments["name"].partition(".")[0]
    return Architecture("timm", architecture.arguments | {"name": name})


def _is_other_grid(name: str, weights: Weights, expected: dict[str, torch.Size]) -> bool:
    there, here = weights.shapes.get(name), expected.get(name)
    if there is None or here is None or there == here:
        return False
    return len(there) == len(here) == 3 and there[2] == here[2] and side(there) > 0 and side(here) > 0


def _regrid(position: Tensor, shape: torch.Size, origin: str, interpolate: bool) -> Tensor:
    old, new = side(position.shape), side(shape)
    if is_sincos(position):
        return sincos_position(new, new, shape[2]).to(position.dtype)
    if not interpolate:
        raise UserError(
            f"weights ({origin}) must have positions of a {new} x {new} grid for this recipe; theirs are learned for "
            f"{old} x {old}: pass --interpolate-positions, or another model.image_size"
        )
    return resample_abs_pos_embed(position, [new, new], num_prefix_tokens=1)
