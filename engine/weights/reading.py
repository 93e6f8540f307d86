"""Files and folders of weights, ours and others', as `Weights`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError, one_line
from engine.weights import tables
from engine.weights.safely import open_file
from engine.weights.weights import IMAGENET, REFERENCE_LICENCE, About, Weights, check_names
from models.architecture import Architecture, bounded, moco_shapes, of_shapes, trunk_shapes

REFERENCE_HEADS = 12  # of every ViT in the reference's files, whatever its width
MARK = "moco_v3_engine"  # metadata of every safetensors file that is written here
FILES = ("model.safetensors", "checkpoint.pth.tar", "model.pt")  # where a folder keeps its weights
RESNET_IMAGE_SIZE = 224  # a published ResNet takes any; it was trained on this

Get = Mapping[str, Callable[[], Tensor]]


def read_weights(path: Path) -> Weights:
    """The weights of an exported file or folder, a published file, or a trunk of timm, torchvision, DeiT, DINO or MAE.

    Every name must be known, present and of the right shape. Raises UserError.
    """
    path = _file(path)
    opened = open_file(path)
    heads = None
    if opened.tensors is None:
        content, get, shapes = _unwrap(path, opened.content)
        # The reference's DeiT form says nothing, and its heads are 12 like those of the whole file.
        heads = REFERENCE_HEADS if isinstance(opened.content.get("model"), Mapping) else None
    else:
        content, get, shapes = opened.content, opened.tensors, opened.shapes
    try:
        return _interpret(str(path), content, get, shapes, heads)
    except (UserError, ValueError) as error:  # models' refusals of a network are ValueErrors
        text = str(error)
        raise UserError(text if str(path) in text else f"weights ({path}): {text}; pass another file") from None


def _file(path: Path) -> Path:
    if path.suffix == ".onnx" or (path / "model.onnx").exists():
        raise UserError(f"weights ({path}) must not be ONNX, which holds a program; pass what it was exported from")
    if not path.is_dir():
        return path
    found = [path / name for name in FILES if (path / name).exists()]
    if not found:
        raise UserError(
            f"weights ({path}) must be a folder with one of {', '.join(FILES)}; pass such a folder or a file"
        )
    return found[0]


def _unwrap(path: Path, content: Any) -> tuple[Mapping, Get, dict[str, torch.Size]]:
    """What stands around the tensors of a pickle, and the tensors by name."""
    if not isinstance(content, Mapping):
        raise UserError(f"weights ({path}) must be a table of tensors; it holds a {type(content).__name__}")
    inner = next((content[key] for key in tables.WRAPPERS if isinstance(content.get(key), Mapping)), content)
    odd = [
        one_line(key)[:80] for key, value in inner.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if odd or not inner:
        raise UserError(f"weights ({path}) must be a table of tensors by name; found {', '.join(odd[:5]) or 'nothing'}")
    around = {} if inner is content else {k: v for k, v in content.items() if v is not inner}
    get = {name: (lambda tensor=tensor: tensor.detach()) for name, tensor in inner.items()}
    return around, get, {name: tensor.shape for name, tensor in inner.items()}


def _interpret(origin: str, content: Mapping, get: Get, shapes: Mapping[str, torch.Size], heads: int | None) -> Weights:
    about = own_words(content.get(MARK))
    if any(name.startswith("module.base_encoder.") for name in shapes):
        return _reference(origin, content, get, shapes)
    if any(name.startswith("base.trunk.") for name in shapes):
        if about is None:
            raise UserError("its metadata must say what network it is of; it has none")
        weights = _renamed(tables.OURS, origin, get, shapes, about)
        return _whole(weights, about.architecture)
    return _trunk(origin, content, get, shapes, about, heads)


def own_words(text: object) -> About | None:
    """What a file of this project says of itself; None where it says nothing."""
    if not isinstance(text, str):
        return None
    try:
        about = About.from_json(text)
        bounded(about.architecture)
        return about
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"its metadata {MARK} cannot be understood ({one_line(error)[:200]})") from None


def _reference(origin: str, content: Mapping, get: Get, shapes: Mapping[str, torch.Size]) -> Weights:
    """A published checkpoint, or ours in its form."""
    is_resnet = "module.base_encoder.conv1.weight" in shapes
    form = tables.REFERENCE_RESNET if is_resnet else tables.REFERENCE_VIT
    weights = _renamed(form, origin, get, shapes, None)
    stated = content.get("model_args")
    inner = {n.removeprefix("base.trunk."): s for n, s in weights.shapes.items() if n.startswith("base.trunk.")}
    architecture = of_shapes(inner, None if is_resnet else stated, REFERENCE_HEADS)
    about = _about_published(architecture)
    epoch, arch = content.get("epoch"), content.get("arch")
    about = dataclasses.replace(
        about,
        epoch=epoch if type(epoch) is int else None,
        arch=arch if isinstance(arch, str) and arch.isprintable() else None,
        licence=None if stated is not None else REFERENCE_LICENCE,
    )
    weights = _whole(weights, architecture)
    left = [key for key in ("optimizer", "scaler") if content.get(key) is not None]
    notes = (f"not taken over from {origin}: {', '.join(left)}",) if left else ()
    return dataclasses.replace(weights, about=about, notes=(*notes, *_notes_on_images(origin, content)))


def _whole(weights: Weights, architecture: Architecture) -> Weights:
    """The same in the network's own order; base, momentum and heads of this trunk must be there, and nothing else."""
    hidden = weights.shapes.get("predictor.0.weight", torch.Size())
    if len(hidden) != 2 or not all(0 < extent < 2**20 for extent in hidden):
        raise UserError("it must hold the predictor's first weight, a matrix")
    expected = moco_shapes(architecture, *weights.head_dims)
    check_names(weights.shapes, expected, weights.origin)
    return dataclasses.replace(weights, shapes=expected)


def _about_published(architecture: Architecture) -> About:
    image_size = architecture.arguments.get("image_size", RESNET_IMAGE_SIZE)
    return About(architecture, image_size, *IMAGENET)


def _trunk(
    origin: str,
    content: Mapping,
    get: Get,
    shapes: Mapping[str, torch.Size],
    about: About | None,
    heads: int | None,
) -> Weights:
    """One trunk alone: an export of ours, or a file of timm, torchvision, DeiT, DINO, MAE or transformers."""
    prefix = next((p for p in tables.PREFIXES if any(n.startswith(p) for n in shapes)), "")
    left = [name for name in shapes if not name.startswith(prefix)]
    get, shapes = ({n.removeprefix(prefix): v for n, v in d.items() if n.startswith(prefix)} for d in (get, shapes))
    form = tables.TRANSFORMERS if "embeddings.cls_token" in shapes else tables.TRUNK
    expected = trunk_shapes(about.architecture) if about else {}
    dropped = [name for name in shapes if form.drops(name) and name not in expected]
    weights = _renamed(form, origin, get, {n: s for n, s in shapes.items() if n not in dropped}, about)
    if about is None:
        about = _about_bare(weights, content, None if dropped or prefix else heads)
    if about is not None:
        expected = {f"base.trunk.{name}": shape for name, shape in trunk_shapes(about.architecture).items()}
        check_names(weights.shapes, expected, origin)
        weights = dataclasses.replace(weights, about=about, shapes=expected)
    left += dropped
    more = " and others" if len(left) > 5 else ""
    notes = (f"not taken over from {origin}, for no trunk has it: {', '.join(left[:5])}{more}",) if left else ()
    return dataclasses.replace(weights, notes=(*notes, *_notes_on_images(origin, content)))


def _notes_on_images(origin: str, content: Mapping) -> tuple[str, ...]:
    """Published weights are of ImageNet; our own files in their forms may be of anything, and cannot say it."""
    if "model_args" not in content or MARK in content:
        return ()
    return (f"{origin} does not say the mean and std of its images: ImageNet's are taken",)


def _about_bare(weights: Weights, content: Mapping, heads: int | None) -> About | None:
    """What the file of a bare trunk shows; None where its number of heads, or its whole network, stays unknown."""
    inner = {n.removeprefix("base.trunk."): s for n, s in weights.shapes.items()}
    if "cls_token" not in inner and "conv1.weight" not in inner:
        return None
    if heads is not None and inner["cls_token"][-1] % heads:
        heads = None
    architecture = of_shapes(inner, content.get("model_args"), heads)
    return None if architecture is None else _about_published(architecture)


def _renamed(
    form: tables.Form, origin: str, get: Get, shapes: Mapping[str, torch.Size], about: About | None
) -> Weights:
    """The tensors of a file under our names; several slices become one again."""
    names = {name: form.ours(name) for name in shapes}
    unknown = [name for name, ours in names.items() if ours is None]
    sources = {ours: form.theirs(ours) for ours in names.values() if ours is not None}
    missing = [other for theirs in sources.values() for other in theirs if other not in shapes]
    if unknown or missing:
        check_names(dict.fromkeys(unknown, torch.Size()), dict.fromkeys(missing, torch.Size()), origin)
    ours = {name: _joined([shapes[other] for other in theirs]) for name, theirs in sources.items()}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in wanted:
            parts = [get[other]() for other in sources[name]]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    return Weights(about, ours, read, origin)


def _joined(parts: list[torch.Size]) -> torch.Size:
    if len(parts) == 1:
        return parts[0]
    if any(part[1:] != parts[0][1:] or not part for part in parts):
        raise UserError("slices of one tensor must have equal shapes")
    return torch.Size([sum(part[0] for part in parts), *parts[0][1:]])
