"""A rank that is alone computes in bf16 what FSDP would let it, to the bit, and its weights rest in between."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from engine.distributed.world import make_mesh
from engine.recipe.sections import Parallel
from engine.training import parallelize
from engine.training.cast import cast_weights
from models.architecture import Architecture
from models.moco import MoCo
from models.norm import GlobalBatchNorm

SHAPES = {
    "vit": {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "conv_stem": True},
    "resnet": {"layers": [1, 1, 1, 1], "width_per_group": 8},
}


def laid(world, kind: str, **parallel) -> MoCo:
    with torch.device("meta"):
        moco = MoCo(Architecture(kind, SHAPES[kind]).build, 16, 8)
    settings = Parallel(**{"compile": False, "precision": "bf16"} | parallel)
    parallelize.parallelize(moco, make_mesh(world, "full", 1), world.group, settings)
    parallelize.materialize(moco, world.device, moco.initial_values(0))
    return moco


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_features_and_gradients_are_those_of_fsdp(world, kind, monkeypatch):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def found() -> list[torch.Tensor]:
        moco = laid(world, kind)
        features, queries = moco.queries(images)
        (features.square().mean() + queries.square().mean()).backward()
        gradients = [parallelize.local(p.grad) for p in moco.parameters() if p.grad is not None]
        return [features.detach(), queries.detach(), moco.keys(images), *gradients]

    own = found()
    monkeypatch.setattr(parallelize, "computes_blocks_again", lambda _: True)
    by_fsdp = found()
    assert len(own) == len(by_fsdp) > 20
    assert all(map(torch.equal, own, by_fsdp))


def test_blocks_that_are_computed_again_are_fsdps(world):
    def by_fsdp(**parallel) -> bool:
        return any(isinstance(module, FSDPModule) for module in laid(world, "vit", **parallel).modules())

    assert by_fsdp(activation_checkpoint="full")
    assert not by_fsdp()
    assert not by_fsdp(precision="float32")


def test_weights_rest_between_forwards_also_after_one_that_fails():
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    weights = list(network.parameters())
    cast_weights(network, torch.bfloat16)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network(torch.ones(2, 5))
    assert all(found is weight for found, weight in zip(network.parameters(), weights, strict=True))
    out = network(torch.ones(2, 3))
    assert out.dtype == torch.float32
    assert all(found is weight for found, weight in zip(network.parameters(), weights, strict=True))
    out.sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in weights)


def test_batch_norms_weights_are_not_cast():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), GlobalBatchNorm(4)).eval()
    seen = []
    network[1].register_forward_pre_hook(lambda module, inputs: seen.append((module.weight.dtype, inputs[0].dtype)))
    cast_weights(network, torch.bfloat16)
    network(torch.ones(2, 3, 2, 2))
    assert seen == [(torch.float32, torch.bfloat16)]


def test_what_is_frozen_or_takes_no_part_has_no_gradient():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    network[0].weight.requires_grad_(False)
    network[1].register_parameter("idle", nn.Parameter(torch.ones(2)))
    needs = []
    network[0].register_forward_pre_hook(lambda module, _: needs.extend((module.weight, module.bias)))
    cast_weights(network, torch.bfloat16)
    network(torch.ones(2, 3)).sum().backward()
    assert [tensor.requires_grad for tensor in needs] == [False, True]
    found = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert found == {"0.bias", "1.weight", "1.bias"}
