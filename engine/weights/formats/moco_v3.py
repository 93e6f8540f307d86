"""moco_v3: the reference's checkpoint, with `model_args` and what we know beside its own entries."""

from pathlib import Path

import torch

from engine.weights.format import BY_US, PICKLES, Format, collect
from engine.weights.names import Naming
from engine.weights.weights import MARK, Weights


def _naming(sign: str, head: str) -> Naming:
    """The reference hangs the projector into the encoder in its classifier's place, `head`."""
    rows = (
        ("base.projector.", (f"module.base_encoder.{head}.",)),
        ("base.trunk.", ("module.base_encoder.",)),
        ("momentum.projector.", (f"module.momentum_encoder.{head}.",)),
        ("momentum.trunk.", ("module.momentum_encoder.",)),
        ("predictor.", ("module.predictor.",)),
    )
    return Naming(sign, rows)


VIT = _naming("module.base_encoder.", head="head")
RESNET = _naming("module.base_encoder.conv1.weight", head="fc")


def write(weights: Weights, file: Path) -> None:
    about = weights.known()
    content = {
        "epoch": about.epoch,
        "arch": about.arch or about.architecture.name,
        "state_dict": collect(weights, VIT if about.architecture.kind == "vit" else RESNET),
        "optimizer": None,
        "scaler": None,
        "model_args": about.architecture.model_args(),
        MARK: about.to_json(),
    }
    torch.save(content, file)


FORMAT = Format(
    file="checkpoint.pth.tar",
    endings=PICKLES,
    write=write,
    namings=(VIT, RESNET),
    whole=True,
    kinds=("vit", "resnet"),
    use=f"{BY_US}\n\n# for the reference's scripts: --pretrained PATH/checkpoint.pth.tar",
)
