"""The weights of a rank that keeps all of them, in the type in which a trunk computes: else FSDP does that.

Weights rest in full precision. Before a forward all of them are cast, and after it they rest again; the backward pass
has the casts in its graph, and gives gradients in the type of the weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.torch_internals import copy_each_, put_weight
from models.norm import batch_norm_weights


def cast_weights(trunk: nn.Module, dtype: torch.dtype) -> None:
    """Let forwards of a trunk compute in `dtype`, in place; inputs are cast to it, and the result is not.

    BatchNorm's weights stay as they are. A forward that is computed again in the backward pass, as for an activation
    checkpoint of what is not compiled, would find the weights at rest.
    """
    whole = {id(parameter) for parameter in batch_norm_weights([trunk])}
    places = [
        (module, name)
        for module in trunk.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in whole
    ]
    resting: list[Tensor] = []  # known at the first forward: until then they have no values

    def put(tensors: Iterable[Tensor]) -> None:
        for (module, name), tensor in zip(places, tensors, strict=True):
            put_weight(module, name, tensor)

    def begin(_: nn.Module, images: tuple[Tensor]) -> Tensor:
        if not resting:
            resting.extend(module.get_parameter(name) for module, name in places)
        put(_Cast.apply(dtype, *resting))
        return images[0].to(dtype)

    def end(_: nn.Module, __: tuple[Tensor], features: Tensor | None) -> Tensor | None:
        put(resting)
        return None if features is None else features.to(resting[0].dtype)  # there are none of a forward that failed

    trunk.register_forward_pre_hook(begin)
    trunk.register_forward_hook(end, always_call=True)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        casts = _cast(tensors, dtype)
        # What is frozen takes no gradient, and what took no part in the loss has none, in place of zeros.
        ctx.mark_non_differentiable(*(cast for cast, own in zip(casts, tensors, strict=True) if not own.requires_grad))
        ctx.set_materialize_grads(False)
        return casts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    casts = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    copy_each_(casts, tensors)
    return casts
