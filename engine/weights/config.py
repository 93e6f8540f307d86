"""What config.json says beside weights of timm or transformers: the network, and how its images are made ready."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError, one_line, reason
from models.architecture import MODEL_ARGS, Architecture

BESIDE = ("num_classes", "global_pool")  # of timm's model_args, nothing of a trunk
RESNET_ARGS = {"layers", "base_width"}  # which shapes of tensors show
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Config:
    """architecture: where the folder names one of timm's; else shapes tell it, with model_args or heads of a ViT.

    image_size, mean, std, crop_fraction (of the resized shorter side): None where they are not said.
    classifier: how the names of its tensors begin.
    """

    image_size: int | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    architecture: Architecture | None = None
    model_args: Mapping[str, Any] | None = None
    heads: int | None = None
    classifier: tuple[str, ...] = ()
    crop_fraction: float | None = None


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
    except (ValueError, TypeError, KeyError, IndexError) as error:
        text = error if isinstance(error, ValueError) else f"{one_line(error)} is missing or of another type"
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
    arguments = {key: value for key, value in (content.get("model_args") or {}).items() if key not in BESIDE}
    size = arguments.get("img_size", said["input_size"][-2:])
    height, width = size if isinstance(size, list) else (size, size)
    if arguments.pop("in_chans", 3) != 3 or type(width) is not int or height != width:
        raise ValueError("its images must be squares of three channels")
    if "img_size" in arguments:
        arguments["img_size"] = width
    layers = said.get("classifier") or ()
    classifier = tuple(f"{layer}." for layer in ([layers] if isinstance(layers, str) else layers))
    crop = None if said.get("crop_pct") is None else float(said["crop_pct"])
    prepared = Config(width, _three(said["mean"]), _three(said["std"]), classifier=classifier, crop_fraction=crop)
    if set(arguments) == set(MODEL_ARGS):
        return replace(prepared, model_args=arguments)
    if set(arguments) == RESNET_ARGS:
        return prepared
    if set(arguments) - {"img_size"}:
        raise ValueError(f"its model_args must be known; {', '.join(map(one_line, arguments))} are not")
    architecture = Architecture("timm", {"name": str(content["architecture"]), "image_size": width})
    return replace(prepared, architecture=architecture)


def _of_transformers(content: dict[str, Any], processor: dict[str, Any]) -> Config:
    usual = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
    for key, value in usual.items():
        if content.get(key, value) != value:
            raise ValueError(f"its {key} must be {value}")
    heads = content["num_attention_heads"]
    if type(heads) is not int or heads < 1:
        raise ValueError("its num_attention_heads must be an integer >= 1")
    mean, std = (_three(processor[key]) if key in processor else None for key in ("image_mean", "image_std"))
    return Config(content.get("image_size"), mean, std, heads=heads)


def _three(values: Any) -> tuple[float, ...]:
    three = tuple(map(float, values))
    if len(three) != 3:
        raise ValueError("mean and std must be three numbers each")
    return three
