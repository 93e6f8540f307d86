"""Files and folders of weights, ours and others', as `Weights`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError, listed, one_line
from engine.weights.formats.table import NAMES, format_page
from engine.weights.names import TRUNK, Naming
from engine.weights.untrusted import open_file
from engine.weights.weights import BASE, IMAGENET, MARK, REFERENCE_LICENCE, About, Weights, base_shapes, check_names
from models.architecture import Architecture, bounded, moco_shapes, of_shapes, trunk_shapes

REFERENCE_HEADS = 12  # of every ViT in the reference's files, whatever its width
RESNET_IMAGE_SIZE = 224  # a published ResNet takes any; it was trained on this
# Where a pickle keeps its tensors, and what stands before a trunk's names there; the first that fits counts.
WRAPPERS = ("state_dict", "model", "teacher", "student")
PREFIXES = ("module.backbone.", "backbone.", "module.", "vit.")


@dataclass(frozen=True)
class Found:
    """Tensors of a file under its own names. said: what stands around them. heads: of a ViT, where the file's form
    tells it."""

    origin: str
    said: Mapping[str, Any]
    get: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, torch.Size]
    heads: int | None = None

    def only(self, names: Mapping[str, str]) -> "Found":
        """Some of the tensors under other names, {theirs: new}."""
        get, shapes = ({new: table[name] for name, new in names.items()} for table in (self.get, self.shapes))
        return dataclasses.replace(self, get=get, shapes=shapes)


def read_weights(path: Path) -> Weights:
    """The weights of an exported file or folder, a published file, or a trunk of timm, torchvision, DeiT, DINO or MAE.

    Every name must be known, present and of the right shape. Raises UserError.
    """
    path = _file(path)
    found = _open(path)
    try:
        return _interpret(found)
    except (UserError, ValueError) as error:  # models' refusals of a network are ValueErrors
        text = str(error)
        raise UserError(text if str(path) in text else f"weights ({path}): {text}; pass another file") from None


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


def _file(path: Path) -> Path:
    if path.suffix == ".onnx" or (path / "model.onnx").exists():
        raise UserError(f"weights ({path}) must not be ONNX, which holds a program; pass what it was exported from")
    if not path.is_dir():
        return path
    files = list(dict.fromkeys(format_page(name).file for name in NAMES if format_page(name).namings))
    found = [path / name for name in files if (path / name).exists()]
    if not found:
        raise UserError(
            f"weights ({path}) must be a folder with one of {', '.join(files)}; pass such a folder or a file"
        )
    return found[0]


def _open(path: Path) -> Found:
    opened = open_file(path)
    if opened.tensors is not None:
        return Found(str(path), opened.content, opened.tensors, opened.shapes)
    content = opened.content
    if not isinstance(content, Mapping):
        raise UserError(f"weights ({path}) must be a table of tensors; it holds a {type(content).__name__}")
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    odd = [
        one_line(key)[:80] for key, value in inner.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if odd or not inner:
        raise UserError(
            f"weights ({path}) must be a table of tensors by name; found {listed(odd, most=5) or 'nothing'}"
        )
    said = {} if inner is content else {k: v for k, v in content.items() if v is not inner}
    get = {name: tensor.detach for name, tensor in inner.items()}
    # The reference's DeiT form says nothing, and its heads are 12 like those of the whole file.
    heads = REFERENCE_HEADS if isinstance(content.get("model"), Mapping) else None
    return Found(str(path), said, get, {name: tensor.shape for name, tensor in inner.items()}, heads)


def _interpret(found: Found) -> Weights:
    about = own_words(found.said.get(MARK))
    naming = _naming_of(found, whole=True)
    if naming is None:
        return _trunk(found, about)
    if naming in format_page("moco_v3").namings:
        return _reference(found, naming)
    if about is None:
        raise UserError("its metadata must say what network it is of; it has none")
    return _whole(_renamed(naming, found, about), about.architecture)


def _naming_of(found: Found, whole: bool) -> Naming | None:
    """The naming of a file of all networks, or of one trunk alone: of several that fit, the one with most to show."""
    known = [naming for name in NAMES if format_page(name).whole == whole for naming in format_page(name).namings]
    fitting = [naming for naming in known if any(name.startswith(naming.sign) for name in found.shapes)]
    return max(fitting, key=lambda naming: len(naming.sign), default=None)


def _reference(found: Found, naming: Naming) -> Weights:
    """A published checkpoint, or ours in its form."""
    weights, said = _renamed(naming, found, None), found.said
    is_resnet = "base.trunk.conv1.weight" in weights.shapes
    stated = said.get("model_args")
    architecture = of_shapes(_of_base_trunk(weights), None if is_resnet else stated, REFERENCE_HEADS)
    epoch, arch = said.get("epoch"), said.get("arch")
    about = dataclasses.replace(
        _about_published(architecture),
        epoch=epoch if type(epoch) is int else None,
        arch=arch if isinstance(arch, str) and arch.isprintable() else None,
        licence=None if stated is not None else REFERENCE_LICENCE,
    )
    weights = _whole(weights, architecture)
    left = [key for key in ("optimizer", "scaler") if said.get(key) is not None]
    notes = (f"ignored in {found.origin}: {listed(left)}",) if left else ()
    return dataclasses.replace(weights, about=about, notes=(*notes, *_notes_on_images(found)))


def _whole(weights: Weights, architecture: Architecture) -> Weights:
    """The same in the network's own order; base, momentum and heads of this trunk must be there, and nothing else."""
    hidden = weights.shapes.get("predictor.0.weight", torch.Size())
    if len(hidden) != 2 or not all(0 < extent < 2**20 for extent in hidden):
        raise UserError("it must hold the predictor's first weight, a matrix")
    expected = moco_shapes(architecture, *weights.head_dims)
    check_names(weights.shapes, expected, weights.origin)
    return dataclasses.replace(weights, shapes=expected)


def _trunk(found: Found, about: About | None) -> Weights:
    """One trunk alone: an export of ours, or a file of timm, torchvision, DeiT, DINO, MAE or transformers."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in found.shapes)), "")
    left = [name for name in found.shapes if not name.startswith(prefix)]
    inner = found.only({n: n.removeprefix(prefix) for n in found.shapes if n.startswith(prefix)})
    naming = _naming_of(inner, whole=False) or TRUNK
    expected = trunk_shapes(about.architecture) if about else {}
    dropped = [name for name in inner.shapes if naming.drops(name) and name not in expected]
    weights = _renamed(naming, inner.only({n: n for n in inner.shapes if n not in dropped}), about)
    if about is None:
        about = _about_bare(weights, found, None if dropped or prefix else found.heads)
    if about is not None:
        expected = base_shapes(about.architecture)
        check_names(weights.shapes, expected, found.origin)
        weights = dataclasses.replace(weights, about=about, shapes=expected)
    left += dropped
    notes = (f"ignored in {found.origin}, for no trunk has it: {listed(left, most=5)}",) if left else ()
    return dataclasses.replace(weights, notes=(*notes, *_notes_on_images(found)))


def _notes_on_images(found: Found) -> tuple[str, ...]:
    """Published weights are of ImageNet; our own files in their forms may be of anything, and cannot say it."""
    if "model_args" not in found.said or MARK in found.said:
        return ()
    return (f"{found.origin} does not say the mean and std of its images: ImageNet's are assumed",)


def _about_published(architecture: Architecture) -> About:
    return About(architecture, architecture.arguments.get("image_size", RESNET_IMAGE_SIZE), *IMAGENET)


def _about_bare(weights: Weights, found: Found, heads: int | None) -> About | None:
    """What the file of a bare trunk shows; None where its number of heads, or its whole network, stays unknown."""
    shapes = _of_base_trunk(weights)
    if "cls_token" not in shapes and "conv1.weight" not in shapes:
        return None
    if heads is not None and shapes["cls_token"][-1] % heads:
        heads = None
    architecture = of_shapes(shapes, found.said.get("model_args"), heads)
    return None if architecture is None else _about_published(architecture)


def _of_base_trunk(weights: Weights) -> dict[str, torch.Size]:
    return {n.removeprefix(BASE): shape for n, shape in weights.shapes.items() if n.startswith(BASE)}


def _renamed(naming: Naming, found: Found, about: About | None) -> Weights:
    """The tensors of a file under our names; several slices become one again."""
    names = {name: naming.ours(name) for name in found.shapes}
    unknown = [name for name, ours in names.items() if ours is None]
    slices = {ours: naming.theirs(ours) for ours in names.values() if ours is not None}
    missing = [other for theirs in slices.values() for other in theirs if other not in found.shapes]
    if unknown or missing:
        check_names(dict.fromkeys(unknown, torch.Size()), dict.fromkeys(missing, torch.Size()), found.origin)
    shapes = {name: _joined([found.shapes[other] for other in theirs]) for name, theirs in slices.items()}

    def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in wanted:
            parts = [found.get[other]() for other in slices[name]]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    return Weights(about, shapes, read, found.origin)


def _joined(parts: list[torch.Size]) -> torch.Size:
    if len(parts) == 1:
        return parts[0]
    if any(part[1:] != parts[0][1:] or not part for part in parts):
        raise UserError("slices of one tensor must have equal shapes")
    return torch.Size([sum(part[0] for part in parts), *parts[0][1:]])
