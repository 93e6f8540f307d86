"""Every private name of torch that engine touches, each behind a function with a plain name and with a test.

torch promises nothing of these names: after an update, tests/test_torch_internals.py says which of them is gone or
means something else. `models`, which knows nothing of engine, keeps its own in moco.py, norm.py and dry_step.py; the
same test lists them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule

# ---- lists of tensors, by one kernel for all of them instead of one for each


def add_each(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: float) -> Sequence[Tensor]:
    """tensor + factor * other, for each pair."""
    return torch._foreach_add(tensors, others, alpha=factor)


def subtract_each(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
    """tensor - other, for each pair."""
    return torch._foreach_sub(tensors, others)


def scale_each(tensors: Sequence[Tensor], factor_N: Tensor) -> Sequence[Tensor]:
    """tensor * factor, for each of N tensors and its number on the device."""
    # One kernel for all of them wants factors of the tensors' own shapes, and one fills these too.
    sizes = [tensor.numel() for tensor in tensors]
    wide = torch.cat([factor.expand(size) for factor, size in zip(factor_N.unbind(), sizes, strict=True)])
    scaled = [part.view_as(tensor) for part, tensor in zip(wide.split(sizes), tensors, strict=True)]
    torch._foreach_mul_(scaled, tensors)
    return scaled


def norm_each(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each, float64 [len(tensors)]: squares of finite float32 numbers cannot overflow there."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))


def copy_each_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Give each tensor the values of its other, in place."""
    torch._foreach_copy_(tensors, others)


@torch.no_grad()
def lerp_each_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards its end by this share of the way, in place."""
    torch._foreach_lerp_(tensors, ends, weight)


@torch.no_grad()
def descend_each_(
    tensors: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    *,
    momentum: float,
    lr: float,
    unless: Tensor | None,
) -> None:
    """average = momentum * average + step and tensor = tensor - lr * average for each, in place; nothing is written
    where `unless` (a number on the device) is 1, whatever the steps hold. It is what SGD(fused=True) does."""
    torch._fused_sgd_(
        tensors,
        steps,
        averages,
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=unless,
    )


# ---- modules


def put_weight(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a tensor that is no Parameter, but comes from one, stand in its place, as FSDP lets gathered ones."""
    module._parameters[name] = tensor  # pyrefly: ignore


# ---- FSDP


def forget_forwards(root: nn.Module) -> None:
    """After every forward of `root`, clear what FSDP notes of it for the backward to come: where none ever comes, the
    notes of a long run would fill the memory. No public call does it."""
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]

    def forget(*_: object) -> None:
        for state in states:
            state._comm_ctx.post_forward_order.clear()
            # At most one group until torch 2.13, several from then on.
            several = hasattr(state, "_fsdp_param_groups")
            for group in state._fsdp_param_groups if several else [state._fsdp_param_group]:
                if group is not None:
                    group._post_forward_indices.clear()

    root.register_forward_hook(forget)


# ---- process groups


def all_groups() -> list[dist.ProcessGroup]:
    """Those of which this process is a member."""
    return list(distributed_c10d._world.pg_map)


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let operations of the group fail that, from now on, take longer."""
    # Public from torch 2.14 on.
    getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)(timeout, group)


# ---- the compiler


def allow_variants(count: int) -> None:
    """Let at least this many compiled forms of one function be kept: each shape of a module's class is one."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


@cache
def keeping(share: float, backend: str = "inductor") -> Callable:
    """A backend of torch.compile whose code keeps about this share of what it would keep for its backward pass, beside
    its inputs, and computes the rest again, what is cheap first; what came from other ranks it keeps. 0: inputs alone.

    torch reads the share when it compiles. One object for each, so that modules of one class share compiled code.
    """
    inner = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        with torch._functorch.config.patch(activation_memory_budget=share):
            return inner(graph, inputs)

    return compile_graph


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """How often this process has compiled a function in pieces so far, because one graph could not hold it."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def has_cpp_compiler() -> bool:
    """Whether the C++ compiler is there that compiling for a CPU calls: it looks where the compilation itself will."""
    from torch._inductor import cpp_builder, exc  # takes seconds to import

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


# ---- shapes without values


def without_data() -> AbstractContextManager:
    """Within it tensors have no data, whatever device they say: operations take no time and no memory, and act as they
    would on that device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def watching(see: Callable[[Any, Any], None]) -> AbstractContextManager:
    """Within it `see` is called with every operation and its results."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            see(func, results)
            return results

    return Watch()


# ---- checkpoints


def stored_chunk(file: str, offset: int, length: int) -> Any:
    """Where a chunk of a tensor lies in a checkpoint, as torch.distributed.checkpoint's FileSystemReader wants it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def file_prefix(rank: int) -> Any:
    """How a rank's files in a checkpoint begin, as torch.distributed.checkpoint's FileSystemWriter wants it."""
    from torch.distributed.checkpoint.filesystem import _StoragePrefix

    return _StoragePrefix(f"__{rank}_")
