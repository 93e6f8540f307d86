"""What config.json says beside weights of timm or transformers: the network, and how its images are made ready."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from engine.data.decode import RESAMPLING
from engine.errors import UserError, listed, one_line, reason
from engine.recipe.sections import Interpolation
from engine.weights.weights import LARGEST
from models.architecture import MODEL_ARGS, Architecture
from models.vit import NORM_EPS

BESIDE = ("num_classes", "global_pool", "dynamic_img_size")  # of timm's model_args, as `drop_path_rate`: no trunk's
RESNET_ARGS = {"layers", "base_width"}  # which shapes of tensors show
PROCESSOR = "preprocessor_config.json"


class Cut(NamedTuple):
    """How images of any shape become squares, in the words of who published a network.

    fraction: side of the square over the resized shorter side; None, as interpolation, where it is not said.
    otherwise: what of it cannot be done here, in words.
    """

    fraction: float | None = None
    interpolation: Interpolation | None = None
    otherwise: tuple[str, ...] = ()

    def notes(self, origin: str) -> tuple[str, ...]:
        """A line for the user on what is not done as `origin` says."""
        left = listed(self.otherwise)
        return (f"not taken over from {origin}: {left}; the centre of an image is cut out",) if left else ()


UNSAID = Cut()


@dataclass(frozen=True)
class Config:
    """architecture: where the folder names one of timm's; else shapes tell it, with model_args or heads of a ViT.

    norm_eps: of a ViT's LayerNorms, where it is not the usual one.
    image_size, mean, std: None where they are not said.
    classifier: how the names of its tensors begin.
    """

    image_size: int | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    architecture: Architecture | None = None
    model_args: Mapping[str, Any] | None = None
    heads: int | None = None
    norm_eps: float | None = None
    classifier: tuple[str, ...] = ()
    cut: Cut = UNSAID


def read_config(folder: Path) -> Config | None:
    """Of a folder of timm or of a transformers' ViT; None without config.json. Raises UserError for any other."""
    file = folder / "config.json"
    if not file.exists():
        return None
    content = _read(file)
    try:
        if "architecture" in content:
            return _of_timm(content)
        if content.get("model_type") == "vit":
            processor = folder / PROCESSOR
            return _of_transformers(content, _read(processor) if processor.exists() else {})
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        text = (
            one_line(error)
            if isinstance(error, ValueError | OverflowError)
            else f"{one_line(error)} is missing or of another type"
        )
        raise UserError(f"config ({file}) must be as timm or transformers write it: {text}") from None
    kind = one_line(content.get("model_type", "none"))[:80]
    raise UserError(f"config ({file}) must be timm's or of transformers' model_type vit; its model_type is {kind}")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"config ({file}) must be readable JSON: {reason(error)[:200]}; mend it") from None
    if not isinstance(content, dict):
        raise UserError(f"config ({file}) must be a table of keys; mend it")
    return content


def _of_timm(content: dict[str, Any]) -> Config:
    said = content.get("pretrained_cfg", content)
    stated = content.get("model_args") or {}
    arguments = {k: v for k, v in stated.items() if not (k in BESIDE or k.endswith(("drop_rate", "drop_path_rate")))}
    width = _side(arguments.get("img_size") or said["input_size"][-2:])
    if arguments.pop("in_chans", 3) != 3:
        raise ValueError("its images must have three channels")
    if "img_size" in arguments:
        arguments["img_size"] = width
    layers = said.get("classifier") or ()
    classifier = tuple(f"{layer}." for layer in ([layers] if isinstance(layers, str) else layers))
    cut = cut_of_timm(said, width)
    prepared = Config(width, _three(said["mean"]), _std(said["std"]), classifier=classifier, cut=cut)
    architecture = Architecture("timm", {"name": str(content["architecture"]), "image_size": width})
    if pool := stated.get("global_pool") or content.get("global_pool"):
        _check_pool(pool, architecture)
    if set(arguments) == set(MODEL_ARGS):
        return replace(prepared, model_args=arguments)
    if set(arguments) == RESNET_ARGS:
        return prepared
    known = {*MODEL_ARGS} if len({*arguments} & {*MODEL_ARGS}) == len(MODEL_ARGS) else {"img_size"}
    if unknown := [one_line(key)[:40] for key in arguments if key not in known]:
        raise ValueError(f"its model_args must be known; {listed(unknown)} {'is' if len(unknown) == 1 else 'are'} not")
    return replace(prepared, architecture=architecture)


def _check_pool(pool: Any, architecture: Architecture) -> None:
    """Raises ValueError where features are pooled otherwise than by the network of this name alone."""
    with torch.device("meta"):
        network = architecture.build().module
    head = getattr(network, "head", None)
    places = [(head, "global_pool"), (head, "pool_type"), (network, "global_pool")]
    found = [getattr(getattr(place, key, None), "pool_type", getattr(place, key, None)) for place, key in places]
    own = next((kind for kind in found if isinstance(kind, str)), None)
    if own and pool != own:
        raise ValueError(
            f"its global_pool must be {own}, the network's own; {one_line(pool)[:40]} makes other features"
        )


def _side(size: Any) -> int:
    """Of images, which `size` gives as one number or two."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if type(width) is not int or height != width or width < 1:
        raise ValueError("its images must be squares")
    if width > LARGEST:
        raise ValueError(f"its images are too large: more than {LARGEST:,} pixels a side")
    return width


def cut_of_timm(said: Mapping[str, Any], size: int) -> Cut:
    """What a `pretrained_cfg` says, for images of this size. Raises ValueError and TypeError."""
    fraction, otherwise = said.get("crop_pct"), []
    if fraction is not None:
        side = math.floor(size / _crop_pct(fraction))  # timm rounds down
        fraction, otherwise = _fraction(size, side), _border(size, side)
    if (mode := said.get("crop_mode") or "center") != "center":
        otherwise.append(f"crop_mode {one_line(mode)[:40]}")
    return _cut(fraction, said.get("interpolation"), otherwise)


def _cut_of_processor(said: Mapping[str, Any], size: int | None) -> Cut:
    """What a transformers' image processor says: one with a centre crop keeps the shape of what it resizes."""
    edge, fraction, otherwise = said.get("size"), None, []
    edge = edge if edge is None or isinstance(edge, Mapping) else {"shortest_edge": edge}
    shortest = edge and edge.get("shortest_edge")
    cropped = said.get("crop_size", size)
    if not said.get("do_resize", True):
        otherwise.append("that it does not resize images")
    elif said.get("do_center_crop") and shortest is not None and size is not None:
        fraction, otherwise = _fraction(size, shortest), _border(size, shortest)
        if cropped not in (size, {"height": size, "width": size}):
            otherwise.append(f"its crop_size of {one_line(cropped)[:60]}")
    elif edge:
        otherwise.append("its resizing without a crop" if "shortest_edge" in edge else "its resizing to a square")
    names = {int(number): name for name, number in RESAMPLING.items()}
    number = said.get("resample")
    return _cut(fraction, None if number is None else names.get(number, f"resample {number}"), otherwise)


def _cut(fraction: float | None, by: Any, otherwise: list[str]) -> Cut:
    if by is not None and by not in get_args(Interpolation):
        return Cut(fraction, None, (*otherwise, f"interpolation {one_line(by)[:40]}"))
    return Cut(fraction, by, tuple(otherwise))


def _fraction(size: int, side: Any) -> float:
    if type(side) is not int or not 1 <= side <= 100 * LARGEST:
        raise ValueError("its images must be resized to a number of pixels")
    return size / max(size, side)


def _border(size: int, side: int) -> list[str]:
    return [f"a border around images of {side} pixels"] if side < size else []


def _crop_pct(number: Any) -> float:
    if not 0.01 <= float(number) <= 100:
        raise ValueError("its crop_pct must be from 0.01 to 100")
    return float(number)


def _of_transformers(content: dict[str, Any], processor: dict[str, Any]) -> Config:
    usual = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
    for key, value in usual.items():
        if content.get(key, value) != value:
            raise ValueError(f"its {key} must be {value}")
    heads = content["num_attention_heads"]
    if type(heads) is not int or heads < 1:
        raise ValueError("its num_attention_heads must be an integer >= 1")
    size = None if content.get("image_size") is None else _side(content["image_size"])
    mean, std = _normalisation(processor)
    eps = float(content.get("layer_norm_eps", 1e-12))  # the library's own default
    if not 0 <= eps < 1:
        raise ValueError("its layer_norm_eps must be a small number")
    cut = _cut_of_processor(processor, size)
    return Config(size, mean, std, heads=heads, norm_eps=None if eps == NORM_EPS else eps, cut=cut)


def _normalisation(processor: dict[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of pixels from 0 to 1; what multiplies pixels from 0 to 255 there divides both."""
    mean, std = (processor.get(key) for key in ("image_mean", "image_std"))
    if not processor.get("do_normalize", True):
        mean, std = (0, 0, 0), (1, 1, 1)
    if mean is None or std is None:
        return None, None
    scale = 255 * float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 255.0
    if not 0 < scale < math.inf:
        raise ValueError("its rescale_factor must be above 0")
    mean, std = _three(mean), _std(std)
    if math.isclose(scale, 1):
        return mean, std
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _three(values: Any) -> tuple[float, ...]:
    three = tuple(map(float, values))
    if len(three) != 3 or not all(map(math.isfinite, three)):
        raise ValueError("mean and std must be three numbers each")
    return three


def _std(values: Any) -> tuple[float, ...]:
    if min(three := _three(values)) <= 0:
        raise ValueError("std must be above 0")
    return three
