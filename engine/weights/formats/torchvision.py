"""torchvision: the bare table of tensors that `load_state_dict` of a ResNet without classifier takes."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from engine.weights.format import PICKLES, SAFETENSORS, Format, collect, metadata
from engine.weights.names import TRUNK
from engine.weights.weights import Weights
from models.architecture import Architecture


def write(weights: Weights, file: Path) -> None:
    tensors = collect(weights, TRUNK)
    if file.suffix in SAFETENSORS:
        save_file(tensors, file, metadata=metadata(weights))
    else:
        torch.save(tensors, file)


def features(path: Path, architecture: Architecture, images: Tensor) -> Tensor:
    arguments, file = architecture.arguments, FORMAT.file_in(path)
    model = ResNet(Bottleneck, arguments["layers"], width_per_group=arguments["width_per_group"])
    model.fc = nn.Identity()
    tensors = load_file(file) if file.suffix in SAFETENSORS else torch.load(file, weights_only=True)
    model.load_state_dict(tensors, strict=True)
    return model.eval()(images)


FORMAT = Format(
    file="model.safetensors",
    endings=SAFETENSORS + PICKLES,
    write=write,
    features=features,
    namings=(TRUNK,),
    libraries=("torchvision",),
    kinds=("resnet",),
    conv_stem=False,
    use=(
        "import torch, torchvision\nfrom safetensors.torch import load_file\n\n"
        "model = torchvision.models.ARCH()\nmodel.fc = torch.nn.Identity()\n"
        "model.load_state_dict(load_file('PATH/model.safetensors'), strict=True)\n\nTRANSFORM\n"
        "with torch.no_grad():\n    features = model.eval()(image)"
    ),
)
