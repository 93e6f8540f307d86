"""A fine-tuned network, trunk and classifier, as the folder from which timm makes it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.weights import tables
from engine.weights.weights import Weights, fill_trunk
from engine.weights.writing import collect, timm_arguments

TOLERANCE = 1e-4  # of the largest logit


def write_classifier(
    weights: Weights,
    head: tuple[Tensor, Tensor],
    classes: Sequence[str],
    folder: Path,
    *,
    interpolation: str,
    crop_fraction: float,
) -> None:
    """Write `folder` so that `timm.create_model('local-dir:FOLDER', pretrained=True)` gives the same logits.

    weights: of one trunk. head: weight [C, D] and bias [C]. The folder appears whole and proven; an old one goes.

    Raises:
        ValueError: timm has no such network, or another one under its name.
    """
    about = weights.known()
    if about.architecture.has_conv_stem:
        raise ValueError("timm has no ViT with a conv stem")
    name, arguments = timm_arguments(about.architecture)
    arguments |= {"num_classes": len(classes)}
    images = {"input_size": [3, about.image_size, about.image_size], "mean": about.mean, "std": about.std}
    images |= {"interpolation": interpolation, "crop_pct": crop_fraction, "num_classes": len(classes)}
    config = {"architecture": name, "num_classes": len(classes), "label_names": list(classes)}
    config |= {"model_args": arguments, "pretrained_cfg": images}
    if about.licence is not None:
        config["license"] = about.licence
    place = _place_of_classifier(name, arguments)
    named = {f"{place}.weight": head[0].float(), f"{place}.bias": head[1].float()}
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        save_file(collect(weights, tables.TRUNK) | named, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _prove(weights, head, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _place_of_classifier(name: str, arguments: dict) -> str:
    """What timm calls the network's last layer."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    last = model.get_classifier()
    if not isinstance(last, nn.Linear):
        raise ValueError(f"timm's {name} does not end in one linear layer")
    return next(path for path, module in model.named_modules() if module is last)


@torch.no_grad()
def _prove(weights: Weights, head: tuple[Tensor, Tensor], folder: Path) -> None:
    size = weights.known().image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = nn.functional.linear(fill_trunk(weights)(images), *(tensor.float() for tensor in head))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not difference <= TOLERANCE:  # not-a-number too
        raise ValueError(f"timm's network has other logits: the largest difference is {difference:.1e} of the largest")
