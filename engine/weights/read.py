"""Files and folders of weights, ours and others', as `Weights`."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError, listed, one_line
from engine.weights.config import Config, read_config
from engine.weights.families import DINOV2_SIGN, KNOWN, dinov2, trunk_prefix, unwrapped
from engine.weights.formats.table import NAMES, format_page
from engine.weights.names import TRUNK, Naming
from engine.weights.positions import is_sincos
from engine.weights.untrusted import open_file
from engine.weights.weights import BASE, IMAGENET, MARK, REFERENCE_LICENCE, About, Weights, base_shapes, check_names
from models.architecture import Architecture, bounded, moco_shapes, of_shapes, trunk_shapes

REFERENCE_HEADS = 12  # of every ViT in the reference's files, whatever its width
RESNET_IMAGE_SIZE = 224  # a published ResNet takes any; it was trained on this
# Where a pickle keeps its tensors; the first counts.
WRAPPERS = ("state_dict", "model", "teacher", "student", "module", "online_encoder", "model_ema", "state_dict_ema")
BIN = "pytorch_model.bin"  # in folders of others
COUNTS = ("num_batches_tracked", "_index")  # how names of integers end
HEADS = (
    "how many heads the attention of their ViT has, which no tensor shows; pass --heads 12 (ViT-B, and MoCo v3's "
    "ViT-S), --heads 6 (ViT-S of timm, DeiT and DINO) or --heads 16 (ViT-L)"
)


@dataclass(frozen=True)
class Found:
    """Tensors of a file under its own names.

    said: what stands around them, under `key` in a pickle. config: what stands beside them in a folder. heads: of a
    ViT, where the user says it.
    """

    origin: str
    said: Mapping[str, Any]
    get: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, torch.Size]
    config: Config | None = None
    heads: int | None = None
    key: str = ""

    def note_on_parts(self, place: str, names: Iterable[str]) -> tuple[str, ...]:
        """A line on what was taken of the file, at `place` below the key, and left: other tables, tensors by name."""
        beside = [key for key, value in self.said.items() if isinstance(value, Mapping | list) and value]
        parts = Counter(name.removeprefix("module.").split(".")[0] for name in names)
        left = [one_line(key)[:40] for key in beside if key != "model_args"]
        left += (f"{part} ({count} tensors)" if count > 1 else part for part, count in parts.items())
        if not left:
            return ()
        taken = ".".join(filter(None, (self.key, place.strip("."))))
        return (f"taken from {self.origin}: {taken or 'the trunk'}; left: {listed(left, most=8)}",)

    def only(self, names: Mapping[str, str]) -> "Found":
        """Some of the tensors under other names, {theirs: new}."""
        get, shapes = ({new: table[name] for name, new in names.items()} for table in (self.get, self.shapes))
        return dataclasses.replace(self, get=get, shapes=shapes)


def read_weights(path: Path, heads: int | None = None) -> Weights:
    """The weights of an exported file or folder, a published file, or a trunk of the families of others.

    Every name must be known, present and of the right shape. heads: of a ViT whose file does not tell.
    Raises UserError.
    """
    config = read_config(path) if path.is_dir() else None
    path = _file(path)
    found = dataclasses.replace(_open(path), config=config, heads=heads)
    plain = {name: unwrapped(name) for name in found.shapes}
    try:
        return _interpret(found.only(plain) if len({*plain.values()}) == len(plain) else found)
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
    files = [*dict.fromkeys(format_page(name).file for name in NAMES if format_page(name).namings), BIN]
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
    keys, inner, said = _keys(content, set()), content, {}
    if keys is None:
        keys = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)][:1]
    for key in keys:
        said |= {other: value for other, value in inner.items() if value is not inner[key]}
        inner = inner[key]
    odd = [
        one_line(key)[:80] for key, value in inner.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if odd or not inner:
        raise UserError(
            f"weights ({path}) must be a table of tensors by name; found {listed(odd, most=5) or 'nothing'}"
        )
    get = {name: tensor.detach for name, tensor in inner.items()}
    return Found(str(path), said, get, {name: tensor.shape for name, tensor in inner.items()}, key=".".join(keys))


def _keys(content: Mapping[Any, Any], seen: set[int], most: int = 3) -> list[str] | None:
    """Those that lead to a pickle's table of tensors by name, at most so many: the usual ones, else the only ones.

    seen: tables that were looked at, as one may hold itself.
    """
    seen.add(id(content))
    if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return []
    leading = {}
    for key, value in content.items() if most else ():
        is_new = isinstance(value, Mapping) and id(value) not in seen
        if is_new and (keys := _keys(value, seen, most - 1)) is not None:
            leading[key] = keys
    first = next((key for key in WRAPPERS if key in leading), None)
    if first is None and len(leading) == 1:
        (first,) = leading
    return [first, *leading[first]] if isinstance(first, str) else None


def _interpret(found: Found) -> Weights:
    about = own_words(found.said.get(MARK))
    naming = _naming_of(found, whole=True)
    if naming is None or (about is None and not any("predictor." in name for name in found.shapes)):
        return _trunk(found, about)
    if naming in format_page("moco_v3").namings:
        return _reference(found, naming, about)
    if about is None:
        raise UserError("its metadata must say what network it is of; it has none")
    return _whole(_renamed(naming, found, about), about.architecture)


def _naming_of(found: Found, whole: bool) -> Naming | None:
    """The naming of a file of all networks, or of one trunk alone: of several that fit, the one with most to show."""
    known = [naming for name in NAMES if format_page(name).whole == whole for naming in format_page(name).namings]
    fitting = [naming for naming in known if any(name.startswith(naming.sign) for name in found.shapes)]
    return max(fitting, key=lambda naming: len(naming.sign), default=None)


def _reference(found: Found, naming: Naming, about: About | None) -> Weights:
    """A published checkpoint, or ours in its form, which says more of itself."""
    weights, said = _renamed(naming, found, about), found.said
    if about is not None:
        return _whole(weights, about.architecture)
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
    notes = found.note_on_parts("", ())
    return dataclasses.replace(
        weights, about=about, notes=notes if stated is None else (*notes, *_notes_on_images(found, about))
    )


def _whole(weights: Weights, architecture: Architecture) -> Weights:
    """The same in the network's own order; base, momentum and heads of this trunk must be there, and nothing else."""
    hidden = weights.shapes.get("predictor.0.weight", torch.Size())
    if len(hidden) != 2 or not all(0 < extent < 2**20 for extent in hidden):
        raise UserError("it must hold the predictor's first weight, a matrix")
    expected = moco_shapes(architecture, *weights.head_dims)
    check_names(weights.shapes, expected, weights.origin)
    return dataclasses.replace(weights, shapes=expected)


def _trunk(found: Found, about: About | None) -> Weights:
    """One trunk alone: an export of ours, or a file or folder of others."""
    if about is None and found.config is not None and found.config.architecture is not None:
        about = _about_others(found.config.architecture, found.config)
    prefix = trunk_prefix(found.shapes)
    left = [name for name in found.shapes if not name.startswith(prefix)]
    inner = found.only({n: n.removeprefix(prefix) for n in found.shapes if n.startswith(prefix)})
    naming = _naming_of(inner, whole=False) or TRUNK
    expected = trunk_shapes(about.architecture) if about else {}
    classifier = found.config.classifier if found.config else ()
    dropped = [n for n in inner.shapes if (naming.drops(n) or n.startswith(classifier)) and n not in expected]
    weights = _renamed(naming, inner.only({n: n for n in inner.shapes if n not in dropped}), about)
    if about is None:
        about, lacks = _shown(weights, found)
        weights = dataclasses.replace(weights, lacks=lacks)
    if about is not None:
        expected = base_shapes(about.architecture)
        check_names(weights.shapes, expected, found.origin)
        weights = dataclasses.replace(weights, about=about, shapes=expected)
    notes = found.note_on_parts(prefix, left + dropped)
    return dataclasses.replace(weights, notes=(*notes, *_notes_on_images(found, weights.about)))


def _shown(weights: Weights, found: Found) -> tuple[About | None, str]:
    """What names, shapes and positions of a bare trunk show, with the folder's or the file's words; or what they lack,
    for messages."""
    shapes, config = _of_base_trunk(weights), found.config
    if DINOV2_SIGN in shapes:
        return _about_others(Architecture("timm", dinov2(shapes)), config), ""
    if "cls_token" not in shapes and "layer1.0.conv3.weight" not in shapes:
        first = listed([one_line(name)[:80] for name in found.shapes], most=3)
        return None, f"which network they are of: {first}. Families that are known: {KNOWN}"
    stated, heads = found.said.get("model_args"), None
    if config is not None:
        stated, heads = config.model_args or stated, config.heads
    if "cls_token" in shapes and stated is None and heads is None:
        heads = found.heads or _heads_of_positions(weights, shapes)
    architecture = of_shapes(shapes, stated, heads)
    if architecture is None:
        return None, HEADS
    about = _about_others(architecture, config)
    if (
        "best_acc1" in found.said and stated is None
    ):  # only the reference's classifiers have both this and its positions
        about = dataclasses.replace(about, licence=REFERENCE_LICENCE)
    return about, ""


def _heads_of_positions(weights: Weights, shapes: Mapping[str, torch.Size]) -> int | None:
    """Those of the reference, if the positions are its own; None where they tell nothing."""
    plain = of_shapes(shapes, None, 1)  # refuses shapes that no ViT has
    if plain is None or plain.arguments["dim"] % REFERENCE_HEADS:
        return None
    ((_, position),) = weights.read([f"{BASE}pos_embed"])
    return REFERENCE_HEADS if is_sincos(position) else None


def _notes_on_images(found: Found, about: About | None) -> tuple[str, ...]:
    """Files of others, and bare ones of ours, cannot say what images they take."""
    config = found.config
    if MARK in found.said or about is None:
        return ()
    if config is not None and config.mean is not None and config.std is not None:
        return config.cut.notes(found.origin)
    if about.architecture.kind == "resnet" and config is None:  # a ViT's positions show the size
        assumed = f"the size, mean and std of its images: {about.image_size} pixels and ImageNet's are assumed"
    else:
        assumed = "the mean and std of its images: ImageNet's are assumed"
    return (f"{found.origin} does not say {assumed}",)


def _about_published(architecture: Architecture) -> About:
    return About(architecture, architecture.arguments.get("image_size", RESNET_IMAGE_SIZE), *IMAGENET)


def _about_others(architecture: Architecture, config: Config | None) -> About:
    about = _about_published(architecture)
    if config is None:
        return about
    size = architecture.arguments.get("image_size", config.image_size) or RESNET_IMAGE_SIZE
    said = {"stated_crop": config.cut.fraction, "interpolation": config.cut.interpolation, "norm_eps": config.norm_eps}
    return About(architecture, size, config.mean or about.mean, config.std or about.std, **said)


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
            if not all(part.is_floating_point() or name.endswith(COUNTS) for part in parts):
                raise UserError(f"weights ({found.origin}) must be real numbers; {name} is of {parts[0].dtype}")
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    return Weights(about, shapes, read, found.origin)


def _joined(parts: list[torch.Size]) -> torch.Size:
    if len(parts) == 1:
        return parts[0]
    if any(part[1:] != parts[0][1:] or not part for part in parts):
        raise UserError("slices of one tensor must have equal shapes")
    return torch.Size([sum(part[0] for part in parts), *parts[0][1:]])
