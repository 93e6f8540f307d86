"""Projector and predictor: the multi-layer perceptrons behind the trunks (paper section 5 and appendix A)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.norm import GlobalBatchNorm


def head(in_dim: int, hidden_dim: int, out_dim: int, *, layers: int, last_norm: bool) -> nn.Sequential:
    """Linear layers without bias, BatchNorm and ReLU between them, [V*B, in_dim] -> [V*B, out_dim].

    Args:
        layers: number of Linear layers.
        last_norm: whether a BatchNorm without weight and bias ends the head.
    """
    widths = [in_dim, *[hidden_dim] * (layers - 1), out_dim]
    modules: list[nn.Module] = []
    for number, (wide_in, wide_out) in enumerate(pairwise(widths), start=1):
        modules.append(nn.Linear(wide_in, wide_out, bias=False))
        if number < layers:
            modules += [GlobalBatchNorm(wide_out), nn.ReLU(inplace=True)]
        elif last_norm:
            modules.append(GlobalBatchNorm(wide_out, affine=False))
    return nn.Sequential(*modules)


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A head's parameter before training: PyTorch's default for Linear, one and zero for BatchNorm."""
    if len(shape) == 2:
        return torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
