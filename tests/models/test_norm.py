"""BatchNorm over the global batch, in one process: its gradient, what it keeps, how often ranks speak.

What needs several ranks is in tests/distributed/laws.py.
"""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import _inductor as inductor
from torch._inductor import metrics
from torchvision.models import resnet50

from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from models import norm
from models.norm import GlobalBatchNorm
from models.resnet import build_resnet
from models.shapes import RESNET_SHAPES

RECIPES = Path(__file__).parents[2] / "recipes"


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What a forward keeps for its backward beside parameters, each storage once."""
    parameters = {id(p.untyped_storage()) for p in module.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module.train()(x)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


def test_resnet_keeps_what_it_keeps_with_torchs_batch_norm():
    """In bf16, per crop of 224 x 224: activations, which convolutions need too, and few numbers for each channel."""
    with torch.device("meta"):
        ours, theirs = build_resnet(**RESNET_SHAPES["resnet50"]).module, resnet50()
        theirs.fc = nn.Identity()
        images = torch.empty(8, 3, 224, 224, dtype=torch.bfloat16)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.data = parameter.data.bfloat16()  # as FSDP gathers them; buffers stay float32
    found, wanted = (kept_bytes(module, images) / len(images) for module in (ours, theirs))
    assert 40e6 < wanted < 50e6
    assert found < 1.01 * wanted


@pytest.mark.parametrize(("affine", "size"), [(True, (3, 2)), (True, ()), (False, ())])
def test_its_gradient_is_that_of_its_function(affine, size):
    module = GlobalBatchNorm(3, affine=affine, views=2).double()
    weights = [nn.Parameter(torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)) for _ in range(2 * affine)]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(("weight", "bias"), weights, strict=False))
        # The ReLU in place changes the module's output, as it does in trunks and heads.
        return nn.functional.relu(torch.func.functional_call(module, named, x) + 0.1, inplace=True)

    x = (torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 7).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *weights))


def test_relu_in_place_and_low_precision_leave_the_gradient_as_it_is():
    """Against torch's BatchNorm of each view in float32, from one input in bf16."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(8, 5, 4, 4, generator=generator) * 2 + 3).bfloat16().requires_grad_()
    weights = torch.randn(x.shape, generator=generator)
    ours = nn.Sequential(GlobalBatchNorm(5, views=2), nn.ReLU(inplace=True)).bfloat16()
    theirs = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    for module in (ours[0], theirs[0]):
        module.running_mean, module.running_var = torch.zeros(5), torch.ones(5)
        module.weight.data.copy_(torch.linspace(0.5, 2, 5))
        module.bias.data.copy_(torch.linspace(-1, 1, 5))
    whole = x.detach().float().requires_grad_()
    theirs[0].weight.data.copy_(ours[0].weight)
    theirs[0].bias.data.copy_(ours[0].bias)
    y, expected = ours(x), torch.cat([theirs(view) for view in whole.chunk(2)])
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    near = {"rtol": 0.01, "atol": 0.01, "check_dtype": False}
    torch.testing.assert_close(y, expected, **near)
    torch.testing.assert_close(x.grad, whole.grad, **near)
    torch.testing.assert_close(ours[0].weight.grad, theirs[0].weight.grad, **near | {"atol": 0.1})
    torch.testing.assert_close(ours[0].running_mean, theirs[0].running_mean)
    torch.testing.assert_close(ours[0].running_var, theirs[0].running_var)
    assert y.dtype == x.grad.dtype == ours[0].weight.grad.dtype == torch.bfloat16


@settings(max_examples=60)
@given(
    views=st.integers(1, 3),
    images=st.sampled_from([1, 2, 15, 16, 17, 33]),
    size=st.sampled_from([(), (3,), (2, 3), (2, 2, 2)]),
    far=st.sampled_from(["nowhere", "all", "sampled", "first"]),
    layout=st.sampled_from(["plain", "last", "sliced", "expanded"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_batch_is_normalised_as_torch_does_in_float64(views, images, size, far, layout, dtype, seed):
    """Whatever lies how in memory, and wherever the images lie of which the mean is near."""
    if images * math.prod(size) == 1:
        size = (3,)  # torch refuses a single value
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(views, images, 4, *size, generator=generator, dtype=torch.float64)
    x[:, {"nowhere": [], "all": slice(None), "sampled": slice(None, None, 16), "first": 0}[far]] += 100
    x = laid_out(x.to(dtype).flatten(0, 1), layout).requires_grad_()
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    module = GlobalBatchNorm(4, views=views).to(torch.promote_types(dtype, torch.float32))
    y = module(x)
    found = torch.autograd.grad(y, (x, *module.parameters()), dy)
    whole, (weight, bias) = x.detach().double().requires_grad_(), (p.double() for p in module.parameters())
    views_of_y = [F.batch_norm(view, None, None, weight, bias, training=True) for view in whole.chunk(views)]
    exact = torch.autograd.grad(torch.cat(views_of_y), (whole, weight, bias), dy.double())
    near = {"rtol": 1e-2 if dtype.itemsize == 2 else 1e-4, "check_dtype": False}
    scale = (weight / (whole.unflatten(0, (views, -1)).var((1, *range(3, x.dim() + 1))) + 1e-5).sqrt()).max().item()
    torch.testing.assert_close(y, torch.cat(views_of_y), atol=near["rtol"], **near)
    torch.testing.assert_close(found[0], exact[0], atol=near["rtol"] * scale, **near)
    for gradient, wanted in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(gradient, wanted, atol=len(x) * near["rtol"], **near)
    assert y.dtype == found[0].dtype == dtype


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "last" and x.dim() > 3:
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "sliced":
        return x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    return x[:, :1].expand(x.shape) if layout == "expanded" else x


@pytest.mark.parametrize("far", [[], [0, 16], [5]])
def test_statistics_are_exact_wherever_some_images_lie(far):
    """Two views of 32 images around 1e3, some of them 1e3 away from the others, in float32 against float64."""
    x = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1e3
    x.unflatten(0, (2, -1))[:, far] += 1e3
    module, exact = GlobalBatchNorm(3, affine=False, views=2), GlobalBatchNorm(3, affine=False, views=2).double()
    module(x.float())
    exact(x.float().double())
    torch.testing.assert_close(module.running_mean.double(), exact.running_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(module.running_var.double(), exact.running_var, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_channel_of_one_large_value_has_no_variance():
    """And not one below zero, though compiled code rounds sums of 2,048 equal numbers."""
    module = GlobalBatchNorm(4, affine=False, momentum=1.0)
    x = (1.2345678e7 * torch.tensor([1.0, -1.0, 0.7, 0.123])).repeat(2048, 1)
    y = torch.compile(module, fullgraph=True, dynamic=False)(x)
    assert y.isfinite().all()
    assert (module.running_var >= 0).all()


def test_the_order_of_memory_stays():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    y = GlobalBatchNorm(3, views=2)(x)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiled_it_moves_each_value_as_seldom_as_it_can(caplog):
    """Channels last in bf16, with a ReLU: forward two readings and a writing, and the ReLU's mask of half the bytes;
    backward two readings each of three things, half the bytes of one, and a writing. A sixteenth is for `near`."""
    caplog.set_level(logging.INFO, "torch._inductor")  # it counts bytes where it logs
    module = nn.Sequential(GlobalBatchNorm(32, views=2), nn.ReLU())
    x = torch.randn(64, 32, 16, 16).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    metrics.reset()
    with inductor.config.patch(force_disable_caches=True):
        y = torch.compile(module, fullgraph=True, dynamic=False)(x)
        forward = metrics.num_bytes_accessed
        y.sum().backward()
    assert 3 * x.nbytes < forward < 3.6 * x.nbytes
    assert 5.5 * x.nbytes < metrics.num_bytes_accessed - forward < 6.05 * x.nbytes


@pytest.mark.parametrize(("recipe", "layers"), [("resnet50_100ep", 53), ("vit_s", 0), ("vit_conv_s", 4)])
def test_ranks_speak_once_a_pass_for_each_batch_norm(recipe, layers, monkeypatch):
    """Keys forward, queries forward and backward, however many views: 167 for ResNet-50, 13 for a ViT."""
    calls = []
    monkeypatch.setattr(norm, "sum_over_ranks", lambda x, *_: calls.append(x.shape) or x)
    moco = make_moco(load(RECIPES / f"{recipe}.yaml"))
    for module in moco.modules():
        if isinstance(module, GlobalBatchNorm):
            module.ranks, module.group_name = 2, "two ranks"
    images = torch.empty(4, 3, 224, 224, device="meta")
    moco.keys(images)
    moco.queries(images)[1].sum().backward()
    keys, queries = (2, 2 + 1) if layers == 53 else (3, 3 + 2)
    assert len(calls) == (layers + keys) + 2 * (layers + queries) == {53: 167, 0: 13, 4: 25}[layers]
