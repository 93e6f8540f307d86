"""GELU by fewer operations is GELU."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models.gelu import Gelu, _Gelu, probability


def test_the_probability_is_that_of_a_normal_number():
    x = torch.linspace(-12, 12, 100_001)
    below, exponential = probability(x)
    assert (below - torch.special.ndtr(x.double())).abs().max() < 3e-7
    assert torch.allclose(exponential, (-x.double().square() / 2).exp().float(), rtol=1e-5, atol=1e-30)


def test_value_and_gradient_are_torchs_to_rounding():
    x = torch.linspace(-8, 8, 4001, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    dy = torch.linspace(1, -1, 4001)
    _Gelu.apply(x).backward(dy)
    F.gelu(other).backward(dy)
    assert (_Gelu.apply(x) - F.gelu(other)).abs().max() < 2e-6
    assert (x.grad - other.grad).abs().max() < 2e-6


def test_on_a_cpu_and_in_full_precision_it_is_torchs():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(Gelu()(x.to(dtype)), F.gelu(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_compiled_code_for_a_gpu_computes_it_in_many_small_steps(dtype):
    """One by one they would each pass over memory, in float32."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    with FakeTensorMode():
        x = torch.empty(8, device="cuda", dtype=dtype)
        assert Gelu()(x.requires_grad_()).grad_fn.name() == "GeluBackward0"
        torch.compile(Gelu(), fullgraph=True, backend=backend)(x.detach())
    assert "torch.exp" in graphs[0]
