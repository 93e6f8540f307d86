"""Named tensors of a MoCo, or of one trunk, and all that is known about them, wherever they lie."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from engine.data.decode import AS_IT_IS, CenterCrop, Reading
from engine.errors import UserError, listed
from engine.recipe.load import loads, shape
from engine.recipe.sections import Finetune, Interpolation, Model
from models.architecture import Architecture, of_name, trunk_shapes

LARGEST = 16_384  # side of images that a file may ask for
MARK = "moco_v3_engine"  # metadata of every safetensors file that is written here
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of published files
REFERENCE_LICENCE = "CC-BY-NC-4.0"
BASE = "base.trunk."  # how the tensors of one trunk alone begin

EncoderName = Literal["base", "momentum"]
Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class About:
    """What a file or a checkpoint says of its tensors, as JSON holds it.

    image_size, mean, std: of the images that the trunk takes. recipe: YAML. arch, epoch: as a published file has them.
    knn_top1: the run's newest at or before the step. licence: of the weights, where it is known.
    finetuned: YAML of the recipe by which labels have changed the weights since; None where they have not.
    stated_crop, interpolation: of images in evaluation, as others say of weights of theirs; None where nobody does.
    norm_eps: of a ViT's LayerNorms, where it is not the usual one.
    """

    architecture: Architecture
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: str | None = None
    step: int | None = None
    epoch: int | None = None
    arch: str | None = None
    knn_top1: float | None = None
    licence: str | None = None
    finetuned: str | None = None
    stated_crop: float | None = None
    interpolation: Interpolation | None = None
    norm_eps: float | None = None

    @property
    def crop_fraction(self) -> float:
        """Of the recipe's evaluation (side of the centre crop over the resized shorter side); without one what is
        stated, else the usual 224 of 256."""
        if self.recipe:
            return loads(self.recipe, "recipe of CHECKPOINT").evaluate.crop_fraction
        return self.stated_crop or 224 / 256

    @property
    def reading(self) -> Reading:
        """What the pixels of files stood for in the last training; where none is known, what they are."""
        if self.finetuned is not None:
            return Reading.of(loads(self.finetuned, "recipe of fine-tuning", kind=Finetune).data)
        return Reading.of(loads(self.recipe, "recipe of CHECKPOINT").data) if self.recipe else AS_IT_IS

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "About":
        """Raises ValueError, TypeError or KeyError for anything that `to_json` did not write."""
        content = json.loads(text)
        content["architecture"] = Architecture(**content["architecture"])
        about = cls(**content | {key: tuple(map(float, content[key])) for key in ("mean", "std")})
        if type(about.image_size) is not int or len(about.mean) != 3 or len(about.std) != 3:
            raise ValueError("image_size, mean and std must be an integer and three numbers each")
        if not all(map(math.isfinite, about.mean + about.std)) or min(about.std) <= 0:
            raise ValueError("mean must be finite and std above 0")
        own = about.architecture.arguments.get("image_size", about.image_size)
        if own != about.image_size or not 1 <= own <= LARGEST:
            raise ValueError(f"image_size must be the architecture's, from 1 to {LARGEST:,}")
        texts = (about.recipe, about.arch, about.licence, about.finetuned)
        counts = (about.step, about.epoch)
        if any(not isinstance(t, str | None) for t in texts) or any(type(c) not in (int, NoneType) for c in counts):
            raise ValueError("recipe, arch, licence and finetuned must be text, step and epoch integers")
        if not isinstance(about.knn_top1, float | None) or not (about.licence or "-").isprintable():
            raise ValueError("knn_top1 must be a number and licence a name")
        if about.interpolation not in (None, *get_args(Interpolation)):
            raise ValueError("interpolation must be known")
        if about.stated_crop is not None and not 0 < float(about.stated_crop) <= 1:
            raise ValueError("stated_crop must be a fraction")
        if about.norm_eps is not None and not 0 <= float(about.norm_eps) < 1:
            raise ValueError("norm_eps must be a small number")
        return about


class Head(NamedTuple):
    """A linear classifier on a trunk's features.

    weight [C, D], bias [C]; classes: C names. interpolation, crop_fraction: how its images are resized and cropped.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    interpolation: Interpolation
    crop_fraction: float


@dataclass(frozen=True)
class Weights:
    """Tensors under our names (engine.weights.names), read when they are asked for.

    about: None where it is not known, and `lacks` says why: a bare trunk of others does not tell its number of heads.
    shapes: of every tensor that `read` can give.
    read: the named tensors on the CPU, one at a time or a few small ones.
    origin: where they lie, for messages. notes: lines for the user on what is ignored.
    head: of a trunk that has a classifier, to export both.
    """

    about: About | None
    shapes: dict[str, torch.Size]
    read: Read
    origin: str
    notes: tuple[str, ...] = ()
    head: Head | None = None
    lacks: str = "which network they are of; import them with `mocov3 import` and a recipe that does"

    @property
    def is_whole(self) -> bool:
        """Both encoders, projectors and the predictor, not one trunk alone."""
        return "predictor.0.weight" in self.shapes

    def known(self) -> About:
        """`about`; raises UserError where it is not known."""
        if self.about is None:
            raise UserError(f"weights ({self.origin}) do not say {self.lacks}")
        return self.about

    @property
    def crop(self) -> CenterCrop:
        """How evaluation cuts the images of this network out of photographs."""
        about, head = self.known(), self.head
        if head is not None:
            return CenterCrop(about.image_size, head.crop_fraction, head.interpolation, about.reading)
        return CenterCrop(about.image_size, about.crop_fraction, about.interpolation or "bilinear", about.reading)

    @property
    def head_dims(self) -> tuple[int, int]:
        """(hidden, output) of projector and predictor."""
        return self.shapes["predictor.0.weight"][0], self.shapes["predictor.0.weight"][1]

    def trunk(self, encoder: EncoderName) -> "Weights":
        """One encoder's trunk alone, as base.trunk.*. Raises UserError where it is not there."""
        prefix = f"{encoder}.trunk."
        names = {BASE + n.removeprefix(prefix): n for n in self.shapes if n.startswith(prefix)}
        if not names:
            raise UserError(f"--encoder ({encoder}) must be base for {self.origin}, which holds one trunk alone")
        shapes = {ours: self.shapes[theirs] for ours, theirs in names.items()}
        return dataclasses.replace(self, shapes=shapes, read=renaming(self.read, names))


def renaming(read: Read, names: Mapping[str, str]) -> Read:
    """`read` for other names: names[new] is what it knows a tensor by."""

    def renamed(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        new = {names[name]: name for name in wanted}
        return ((new[name], tensor) for name, tensor in read(new))

    return renamed


def declared(model: Model) -> Architecture:
    """The trunk that a recipe declares. Raises ValueError where there is no such trunk."""
    return of_name(model.name, model.image_size, shape(model))


def base_shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """Every tensor of one trunk alone, in order. Raises ValueError for arguments that no trunk has."""
    return {BASE + name: shape for name, shape in trunk_shapes(architecture).items()}


def check_names(found: dict[str, torch.Size], expected: dict[str, torch.Size], origin: str) -> None:
    """Raises UserError that lists every name that is unknown, missing or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        raise UserError(f"weights ({origin}) must be those of the network: {listed(problems, between='; ')}")


def fill_trunk(weights: Weights) -> nn.Module:
    """The trunk of `weights` (one trunk alone) in eval mode on the CPU, float32, one tensor read at a time."""
    architecture = weights.known().architecture
    # timm's networks may have buffers that no file holds, so those are built with values.
    with torch.device("cpu" if architecture.kind == "timm" else "meta"):
        trunk = architecture.build().module
    # Reals in float32, counters as they are.
    tensors = {
        name.removeprefix(BASE): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.read(list(weights.shapes))
    }
    trunk.load_state_dict(tensors, strict=True, assign=True)
    if (eps := weights.known().norm_eps) is not None:
        for layer in (module for module in trunk.modules() if isinstance(module, nn.LayerNorm)):
            layer.eps = eps
    return trunk.eval().requires_grad_(False)


def digest(values: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of tensors in their order: name, shape, type and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in values:
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()
