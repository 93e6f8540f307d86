"""deit: the form that DeiT's scripts fine-tune from, with `model_args` and what we know beside it."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from engine.weights.format import BY_US, PICKLES, Format, collect
from engine.weights.names import TRUNK
from engine.weights.weights import MARK, Weights
from models.architecture import Architecture


def write(weights: Weights, file: Path) -> None:
    about = weights.known()
    beside = {"model_args": about.architecture.model_args(), MARK: about.to_json()}
    torch.save({"model": collect(weights, TRUNK), **beside}, file)


def features(path: Path, architecture: Architecture, images: Tensor) -> Tensor | None:
    """DeiT's networks are timm's; a conv stem is ours alone."""
    if architecture.has_conv_stem:
        return None
    content = torch.load(FORMAT.file_in(path), weights_only=True)
    model = VisionTransformer(**content["model_args"], num_classes=0)
    model.load_state_dict(content["model"], strict=True)
    return model.eval()(images)


FORMAT = Format(
    file="model.pt",
    endings=PICKLES,
    write=write,
    features=features,
    namings=(TRUNK,),
    kinds=("vit",),
    use=f"{BY_US}\n\n# for DeiT's scripts: --finetune PATH/model.pt",
)
