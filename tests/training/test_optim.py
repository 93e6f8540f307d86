"""LARS moves all parameters at once, and none in a step that does not count."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.world import process_group
from engine.training.optim import Lars

SHAPES = ((4, 3), (5, 2, 3, 3), (6,), (0, 7), ())


class Operations(TorchDispatchMode):
    """Counts what reaches the device: everything but views."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def parameters(copies: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES * copies]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return found


def lars(trained: list[nn.Parameter], group) -> Lars:
    optimizer = Lars(trained, 0.01, group)
    optimizer.param_groups[0]["lr"] = 0.5
    return optimizer


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [tensor.detach().flatten().view(torch.int32).tolist() for tensor in tensors]


def test_more_parameters_are_no_more_operations():
    counts = []
    with process_group() as world:
        for copies in (1, 20):
            optimizer = lars(parameters(copies), world.group)
            optimizer.found_inf = torch.zeros(())
            with Operations() as operations:
                optimizer.step()
            counts.append(operations.found)
    assert counts[0] == counts[1]
    assert counts[0].total() <= 20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_does_not_count_changes_no_bit(bad):
    trained = parameters()
    with process_group() as world:
        optimizer = lars(trained, world.group)
        optimizer.step()
        tensors = [*trained, *(optimizer.state[p]["mu"] for p in trained)]
        before = bits(tensors)
        for parameter in trained:
            parameter.grad.fill_(bad)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert bits(tensors) == before
        for parameter in trained:
            parameter.grad.fill_(1)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        assert all(
            new != old for new, old, tensor in zip(bits(tensors), before, tensors, strict=True) if tensor.numel()
        )
