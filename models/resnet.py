"""ResNet trunk: torchvision's network without its classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from models.initial import seeded
from models.norm import GlobalBatchNorm
from models.trunk import Trunk, as_convolutions_want

LAYERS = {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)\.(\d+)"}  # as timm tells them by a parameter's name


def build_resnet(layers: Sequence[int], width_per_group: int) -> Trunk:
    """torchvision's bottleneck ResNet, [N, 3, H, W] -> [N, 2048], BatchNorm over all ranks."""
    module = StemResNet(Bottleneck, list(layers), width_per_group=width_per_group, norm_layer=GlobalBatchNorm)
    width = module.fc.in_features
    setattr(module, "fc", nn.Identity())  # noqa: B010 (typed as Linear)
    return Trunk(module, width, False, seeded(initial_value), drop_paths=lambda _: {}, layers=LAYERS)


class StemResNet(ResNet):
    """torchvision's, with its stem as a method. It has no classifier."""

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D], the mean over the last stage's positions."""
        x = self.stem_forward(images)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.avgpool(x).flatten(1)

    def stem_forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> the first block's input, [N, 64, H/4, W/4]."""
        return self.maxpool(self.relu(self.bn1(self.conv1(as_convolutions_want(images)))))


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A ResNet parameter before training: torchvision's rule with `zero_init_residual=True`."""
    if len(shape) == 4:
        fan_out = shape[0] * shape[2] * shape[3]
        return torch.empty(shape).normal_(0, (2 / fan_out) ** 0.5, generator=generator)
    if name.endswith("bn3.weight") or not name.endswith("weight"):
        return torch.zeros(shape)
    return torch.ones(shape)
