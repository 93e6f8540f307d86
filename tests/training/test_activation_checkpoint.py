"""What is computed again in a backward pass, and that nothing else changes."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from engine.training.activation_checkpoint import check_activation_checkpoint, checkpoint_forward
from models.classifier import Classifier
from models.norm import set_views
from models.resnet import build_resnet
from models.trunk import Trunk, blocks
from models.vit import build_vit
from tests.recipe.shipped import CONV, QUICK, RESNET

DEAR = ("addmm", "mm", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")
CHEAP = ("native_layer_norm", "gelu", "relu_", "square")


class Calls(TorchDispatchMode):
    """How often each operation is called inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def trunk(kind: str) -> Trunk:
    if kind == "resnet":
        return build_resnet((1, 2, 1, 1), 8)
    return build_vit(image_size=16, patch_size=8, dim=24, depth=2, heads=2, conv_stem=kind == "vit_conv")


@torch.no_grad()
def drawn(trunk: Trunk) -> nn.Module:
    """The trunk's module in float64, with its initial weights."""
    draw, module = trunk.initial_values(0), trunk.module.double().train()
    for name, tensor in module.named_parameters():
        tensor.copy_(draw(name, tensor.shape))
    return module


def step(kind: str, mode: str) -> tuple[dict[str, Tensor], Counter, Counter]:
    """Gradients and buffers after one step in float64, and the calls of its forward and its backward pass."""
    built, forward, backward = trunk(kind), Calls(), Calls()
    module = drawn(built)
    set_views(module, 2)
    for block in blocks(module):
        checkpoint_forward(block, mode) if mode != "none" else None
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with forward:
        features = module(images)
    with backward:
        features.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return gradients | dict(module.named_buffers()), forward.count, backward.count


def again(mode: str, kind: str) -> Counter:
    """What a backward pass calls more often than without checkpoints; it is shown that all else is as without."""
    expected, plain, plain_backward = step(kind, "none")
    found, forward, backward = step(kind, mode)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name: forward[name] for name in (*DEAR, *CHEAP)} == {name: plain[name] for name in (*DEAR, *CHEAP)}
    return backward - plain_backward


@pytest.mark.parametrize("kind", ["vit", "vit_conv", "resnet"])
def test_selective_computes_what_is_cheap_again(kind):
    calls = again("selective", kind)
    assert not any(calls[name] for name in DEAR), calls
    assert calls["relu_" if kind == "resnet" else "gelu"] > 0
    assert calls["lerp_"] == 0  # buffers move once


@pytest.mark.parametrize("kind", ["vit", "vit_conv"])
def test_full_computes_the_whole_block_again(kind):
    calls = again("full", kind)
    assert calls["gelu"] == 2
    assert calls["_scaled_dot_product_flash_attention_for_cpu"] == 2
    assert calls["convolution"] == 0  # the stem is no block


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_branches_that_were_left_out_stay_so(mode):
    """In fine-tuning, where a drop path's choice is set before the forward."""

    def gradients(mode: str) -> list[Tensor]:
        trunk = build_vit(image_size=16, patch_size=8, dim=24, depth=3, heads=2)
        network = Classifier(trunk, 5, 0.5).double()
        for block in blocks(drawn(trunk)):
            checkpoint_forward(block, mode) if mode != "none" else None
        network.choose_paths(torch.linspace(0, 1, 4 * len(network.drop_paths)).view(4, -1))
        images = torch.linspace(-1, 1, 4 * 3 * 16 * 16, dtype=torch.float64).view(4, 3, 16, 16)
        network.trunk(images).square().sum().backward()
        return [p.grad for p in network.trunk.parameters() if p.grad is not None]

    assert all(torch.equal(ours, plain) for ours, plain in zip(gradients(mode), gradients("none"), strict=True))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("has_graph", [True, False])
def test_forwards_without_a_graph_are_left_alone(mode, has_graph):
    seen = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return x.sin().sin()

    block = Block()
    checkpoint_forward(block, mode)
    with nullcontext() if has_graph else torch.no_grad():
        y = block(torch.ones(2, requires_grad=True))
    if has_graph:
        y.sum().backward()
    assert seen == ([True, True] if has_graph else [False])


def test_blocks_with_batch_norm_are_not_computed_again_in_full():
    full = ["parallel.activation_checkpoint=full"]
    with pytest.raises(
        UserError, match=r"^parallel.activation_checkpoint \(full\) must be none or selective for resnet50"
    ):
        make_moco(load(RESNET, full))
    make_moco(load(RESNET, ["parallel.activation_checkpoint=selective"]))
    make_moco(load(QUICK, full))
    make_moco(load(CONV, full))  # the stem has BatchNorm; the blocks have none


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_trunk_without_blocks_has_nothing_to_compute_again(mode):
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    check_activation_checkpoint(plain, "none", "timm/plain")
    with pytest.raises(
        UserError, match=rf"^parallel.activation_checkpoint \({mode}\) must be none for timm/plain, whi"
    ):
        check_activation_checkpoint(plain, mode, "timm/plain")
