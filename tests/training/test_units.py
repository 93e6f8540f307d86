"""Which blocks of a trunk travel together."""

import torch
from torch import nn

from engine.training.parallelize import least_unit, units
from models.architecture import Architecture
from models.trunk import blocks


def trunk(name: str, shape: dict) -> nn.Module:
    with torch.device("meta"):
        return Architecture(name, shape).build().module


def vit(dim: int, depth: int = 12) -> nn.Module:
    return trunk("vit", {"image_size": 224, "patch_size": 16, "dim": dim, "depth": depth, "heads": 12})


def sizes(module: nn.Module) -> list[int]:
    return [len(unit) for unit in units(module, least_unit(8))]


def test_large_blocks_travel_alone_and_small_ones_together():
    assert sizes(vit(768)) == [1] * 12
    assert sizes(vit(384)) == [3] * 4  # 1.8 million parameters each
    assert sizes(vit(384, depth=11)) == [3] * 3  # the last two travel with the rest of the trunk
    assert sizes(vit(96, depth=2)) == []
    assert units(vit(768), least_unit(1)) == []  # a rank that is alone


def test_units_are_neighbours_of_one_stage():
    resnet = trunk("resnet", {"layers": [3, 4, 6, 3], "width_per_group": 64})
    found = units(resnet, least_unit(8))
    assert found == [[*resnet.layer3[:4]], *([block] for block in resnet.layer4)]
    assert [block for unit in units(resnet, least=1) for block in unit] == blocks(resnet)


def test_blocks_of_a_plain_list_never_share_a_unit():
    """Nothing says that they run one after another."""
    branches = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.ReLU()) for _ in range(4))
    assert units(branches, least=100) == []
    assert units(branches, least=90) == [[branch] for branch in branches]
