"""timm: a folder for `timm.create_model('local-dir:...')`, or one file that says which arguments it needs.

One trunk, with its linear classifier where it has one.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.data.decode import CenterCrop
from engine.errors import UserError
from engine.weights.format import PICKLES, SAFETENSORS, Format, collect, metadata
from engine.weights.names import TRUNK
from engine.weights.weights import Weights
from models.architecture import Architecture
from models.shapes import RESNET_SHAPES

VITS = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


def create_arguments(architecture: Architecture, classes: int = 0) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) with which `timm.create_model` makes this trunk, with a classifier of `classes`."""
    name, arguments = architecture.name, architecture.arguments
    if architecture.kind == "vit":
        return VITS.get(name, "vit_base_patch16_224"), {**architecture.model_args(), "num_classes": classes}
    if architecture.kind == "resnet":
        sizes = {"layers": arguments["layers"], "base_width": arguments["width_per_group"], "num_classes": classes}
        return name if name in RESNET_SHAPES else "resnet50", sizes
    with torch.device("meta"):
        trunk = architecture.build().module
    takes_size = any(n.endswith(("pos_embed", "position_bias_table")) for n, _ in trunk.named_parameters())
    return name, {"num_classes": classes} | ({"img_size": arguments["image_size"]} if takes_size else {})


def write(weights: Weights, file: Path) -> None:
    head = weights.head
    name, arguments = create_arguments(weights.known().architecture, len(head.classes) if head else 0)
    tensors = collect(weights, TRUNK)
    if head is not None:
        place = _place_of_classifier(name, arguments)
        tensors |= {f"{place}.weight": head.weight.float(), f"{place}.bias": head.bias.float()}
    if file.suffix in SAFETENSORS:
        own = {"architecture": name, "model_args": json.dumps(arguments)}
        save_file(tensors, file, metadata=metadata(weights) | own)
    else:
        torch.save({"state_dict": tensors, "architecture": name, "model_args": arguments, **metadata(weights)}, file)


def _place_of_classifier(name: str, arguments: dict[str, Any]) -> str:
    """What timm calls the network's last layer."""
    model = _network(name, arguments)
    last = model.get_classifier()
    if not isinstance(last, nn.Linear):
        raise UserError(f"timm's {name} does not end in one linear layer")
    return next(path for path, module in model.named_modules() if module is last)


def _network(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's, without values."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def write_config(weights: Weights, folder: Path) -> None:
    """What timm writes beside weights of its own: how to build the network, to adapt it and to prepare images."""
    about, head = weights.known(), weights.head
    classes = len(head.classes) if head else 0
    name, arguments = create_arguments(about.architecture, classes)
    network = _network(name, arguments)
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": classes,
        "num_features": network.num_features,
        "model_args": arguments,
        "pretrained_cfg": _adaptation(network.pretrained_cfg, classes, about.image_size) | _preparation(weights),
    }
    if head is not None:
        config["label_names"] = list(head.classes)
    if about.licence is not None:
        config["license"] = about.licence
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _adaptation(own: Mapping[str, Any], classes: int, image_size: int) -> dict[str, Any]:
    """By what timm fits weights to another head, number of channels or image size: its own words for this network."""
    kept = {key: own.get(key) for key in ("first_conv", "classifier", "fixed_input_size")}
    same_size = own["input_size"][-1] == image_size
    return kept | {"num_classes": classes, "pool_size": own.get("pool_size") if same_size else None}


def _preparation(weights: Weights) -> dict[str, Any]:
    """How images are made ready, as evaluation does it."""
    about, crop = weights.known(), weights.crop
    return {
        "input_size": [3, about.image_size, about.image_size],
        "mean": about.mean,
        "std": about.std,
        "interpolation": crop.interpolation,
        "crop_pct": _crop_pct(crop),
        "crop_mode": "center",
    }


def _crop_pct(crop: CenterCrop) -> float:
    """The fraction by which timm, which rounds sides down, resizes as evaluation does."""
    side = crop.resized_side
    near = (crop.fraction, crop.size / side, math.nextafter(crop.size / side, 0))
    return next(fraction for fraction in near if math.floor(crop.size / fraction) == side)


def images(path: Path, photo: Path) -> Tensor | None:
    if not path.is_dir():
        return None
    model = timm.create_model(f"local-dir:{path}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with Image.open(photo) as image:
        return transform(image)[None]


def features(path: Path, architecture: Architecture, images: Tensor) -> Tensor:
    if path.is_dir():
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()(images)
    said = _said(path)
    model = timm.create_model(said["architecture"], **said["model_args"])
    timm.models.load_checkpoint(model, str(path), strict=True)
    return model.eval()(images)


def _said(file: Path) -> dict[str, Any]:
    """What a single file says of itself."""
    if file.suffix not in SAFETENSORS:
        return torch.load(file, weights_only=True, mmap=True)
    content = safe_open(file, "pt").metadata()
    return content | {"model_args": json.loads(content["model_args"])}


FORMAT = Format(
    file="model.safetensors",
    endings=SAFETENSORS + PICKLES,
    write=write,
    config=write_config,
    features=features,
    images=images,
    namings=(TRUNK,),
    libraries=("timm",),
    by_shape=False,
    conv_stem=False,
    use=(
        "import timm, torch\nfrom PIL import Image\n\n"
        "model = timm.create_model('local-dir:PATH', pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "with torch.no_grad():\n"
        "    features = model(transform(Image.open('photo.jpg').convert('RGB'))[None])\n\n"
        "# with a new head\nmodel = timm.create_model('local-dir:PATH', pretrained=True, num_classes=10)"
    ),
)
