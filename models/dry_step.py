"""Training steps of a trunk before a run begins, without memory or with little: they show what the run would meet."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.norm import GlobalBatchNorm
from models.trunk import blocks, cast_constants

ONE_TYPE = {  # operations whose floating inputs must be of one type
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm", "native_group_norm"),
    *("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
}


def why_untrainable(module: nn.Module, image_size: int, dtype: torch.dtype) -> str | None:
    """Why a trunk cannot be trained on any ranks alike with parameters of this type; None where it can.

    Args:
        module: on the meta device; not to be used afterwards.
    """
    hidden = [f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in _hidden_tensors(part)]
    if hidden:  # these would stay on the meta device, or hold what was before the weights were laid over ranks
        return f"it keeps tensors that are neither parameters nor buffers: {', '.join(hidden[:3])}"
    idle = _as_under_fsdp(module.train(), dtype)
    moving = {name: buffer for name, buffer in module.named_buffers() if not _is_of_batch_norm(module, name)}
    versions = {name: buffer._version for name, buffer in moving.items()}
    watch = _Watch()
    try:
        with watch:
            module(torch.empty(2, 3, image_size, image_size, device="meta", dtype=dtype)).sum().backward()
    except Exception as error:  # whatever a library raises
        return f"its step fails ({' '.join(str(error).split())[:200]})"
    if idle:  # FSDP gathers a block's parameters when the block is called
        return f"its forward passes by {len(idle)} of its blocks and takes what is in them"
    unused = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    moved = [name for name, buffer in moving.items() if buffer._version != versions[name]]
    if unused:
        return f"parameters take no part in its features: {', '.join(unused[:3])}"
    if moved:
        return f"it keeps statistics of a rank's own batch: {', '.join(moved[:3])}"
    return f"it draws random numbers of a rank's own: {', '.join(sorted(watch.draws))}" if watch.draws else None


def refused_in_step(module: nn.Module, image_size: int, dtype: torch.dtype) -> str | None:
    """The first operation of a step on four images that torch's strict deterministic mode, which is on, refuses.

    None where it refuses none. Anything else that the step raises passes.

    Args:
        module: on the device to ask; not to be used afterwards.
    """
    _as_under_fsdp(module.train(), dtype)
    device = next(module.parameters()).device
    try:
        module(torch.ones(4, 3, image_size, image_size, device=device, dtype=dtype)).sum().backward()
    except RuntimeError as error:
        operation, refusal, _ = str(error).partition(" does not have a deterministic implementation")
        if not refusal:
            raise
        return operation
    return None


def _as_under_fsdp(module: nn.Module, dtype: torch.dtype) -> set[nn.Module]:
    """Give parameters, and inputs of blocks, the type that FSDP gives them.

    Returns the blocks; each leaves the set when it is called.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    cast_constants(module, dtype)
    idle = set(blocks(module))

    def begin(block: nn.Module, inputs: Any, named: Any) -> Any:
        idle.discard(block)
        return _cast((inputs, named), dtype)

    for block in blocks(module):
        block.register_forward_pre_hook(begin, with_kwargs=True)
    return idle


def _hidden_tensors(part: nn.Module) -> list[str]:
    held = {name: value if isinstance(value, list | tuple) else [value] for name, value in vars(part).items()}
    return [name for name, values in held.items() if any(isinstance(value, Tensor) for value in values)]


def _is_of_batch_norm(module: nn.Module, buffer: str) -> bool:
    return isinstance(module.get_submodule(buffer.rpartition(".")[0]), GlobalBatchNorm)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    return tuple(_cast(inner, dtype) for inner in value) if isinstance(value, tuple) else value


class _Watch(TorchDispatchMode):
    """Notes every operation that draws random numbers, and refuses mixed types, which the meta device lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: set[str] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        found = {value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()}
        if name in ONE_TYPE and len(found) > 1:
            mixed = sorted(str(dtype).removeprefix("torch.") for dtype in found)
            raise RuntimeError(f"{name} of {' and '.join(mixed)}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            arguments = [argument.name for argument in func._schema.arguments]
            # Attention has the tag, and draws only where it drops.
            if "dropout_p" not in arguments or (dict(zip(arguments, args, strict=False)) | kwargs).get("dropout_p"):
                self.draws.add(name)
        return func(*args, **kwargs)
