"""ResNet trunk: torchvision's network without its classifier."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from models.initial import seeded
from models.norm import GlobalBatchNorm


def build_resnet(layers: tuple[int, int, int, int] = (3, 4, 6, 3), width_per_group: int = 64) -> ResNet:
    """torchvision's bottleneck ResNet (default: ResNet-50), [V*B, 3, H, W] -> [V*B, 2048], BatchNorm over all ranks."""
    trunk = ResNet(Bottleneck, list(layers), width_per_group=width_per_group, norm_layer=GlobalBatchNorm)
    trunk.num_features = trunk.fc.in_features
    trunk.fc = nn.Identity()
    trunk.initial_values = seeded(initial_value)
    trunk.group_matcher = group_matcher
    trunk.drop_paths = lambda _: {}  # torchvision's has no stochastic depth
    return trunk


def group_matcher(coarse: bool = False) -> dict[str, str]:
    """How timm tells the layers of a ResNet by their parameters' names: by stage, or by block."""
    return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A ResNet parameter before training: torchvision's rule with `zero_init_residual=True`."""
    if len(shape) == 4:
        fan_out = shape[0] * shape[2] * shape[3]
        return torch.empty(shape).normal_(0, (2 / fan_out) ** 0.5, generator=generator)
    if name.endswith("bn3.weight") or not name.endswith("weight"):
        return torch.zeros(shape)
    return torch.ones(shape)
