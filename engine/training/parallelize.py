"""How the networks are laid over the ranks: activation checkpoints, compile, FSDP2, weights. Read it from the top."""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Container, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from engine.errors import UserError
from engine.recipe.sections import Parallel
from engine.torch_internals import allow_variants, forget_forwards, has_cpp_compiler, keeping
from engine.training.activation_checkpoint import KEPT_SHARE, checkpoint_forward
from engine.training.cast import cast_weights
from models.moco import Encoder
from models.norm import batch_norm_weights, set_batch_norm_group
from models.parts import Network, Part
from models.trunk import HasStem, blocks, cast_constants, rows_of_blocks

P, T = ParamSpec("P"), TypeVar("T")

UNIT = 4_000_000  # parameters that travel together at least: a smaller message costs nearly as much time
COMPILED_VARIANTS = 64  # graphs of one forward: its shapes, with and without gradient, in training and evaluation


def parallelize(
    network: Network, mesh: DeviceMesh, group: ProcessGroup, parallel: Parallel, least: float | None = None
) -> None:
    """Shard a network that is still on the meta device over `mesh` ("replicate", "shard"); `materialize` fills it.

    Each of its parts (trunks and heads) is a root of its own, because evaluation calls trunks alone. Trunks run in bf16
    under `precision: bf16`, heads always in full precision; gradients are reduced in full precision.

    `parallel.shard` says where a parameter rests. full, hybrid: units of blocks sharded also between forward and
    backward; grad_op: gathered from the forward to the backward pass. Heads, and the rest of a trunk, stay gathered
    until their backward pass in both: it begins where their forward has ended. replicate: whole on every rank. Such a
    network, and that of a rank that is alone, stays as it is and casts alone (`engine.training.cast`); an update brings
    the gradients of all ranks together (`own_gradients`).

    Args:
        group: the ranks of the global batch, for BatchNorm.
        least: parameters of a trunk that travel together at least, as `units` has it; None: as `least_unit` has it.
    """
    # A trunk's CLS token is a view of its tokens; FSDP warns of in-place writes to it, and there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    network.to(dtype_of(parallel))
    set_batch_norm_group(network, group)
    for part in network.parts():
        if part.is_trunk:
            cast_constants(part.module, trunk_dtype_of(parallel))
            _prepare_blocks(part.module, parallel, part.is_trained)
        elif parallel.compile:
            compile_method(part.module, "forward")
        if is_laid_out(parallel, group.size()):
            _shard_part(part, mesh, parallel, least or least_unit(group.size()))
        elif part.is_trunk and parallel.precision == "bf16":
            cast_weights(part.module, torch.bfloat16)


def gather_early(encoder: Encoder, *more_heads: nn.Module) -> None:
    """In each forward of an encoder, let the weights of heads come while the trunk's second block computes; they would
    otherwise be asked for at the trunk's end, and a GPU would wait for all of them.

    A trunk that goes forward alone asks for none: its heads would stay gathered, and miss an update.

    Args:
        more_heads: those that go forward after every forward of `encoder`, before weights change.
    """
    sharded = [head for head in (encoder.projector, *more_heads) if isinstance(head, FSDPModule)]
    due: list[FSDPModule] = []

    def begin(*_: object) -> None:
        due[:] = sharded

    def ask(*_: object) -> None:
        while due:
            due.pop(0).unshard(async_op=True)

    if sharded and (rows := blocks(encoder.trunk)):
        encoder.register_forward_pre_hook(begin)
        rows[:2][-1].register_forward_pre_hook(ask)


def is_laid_out(parallel: Parallel, ranks: int) -> bool:
    """Whether FSDP lays networks over the ranks, and casts their weights: not where each rank keeps the whole of them.

    Where eager code computes blocks again it does in any case: weights must stay cast until then.
    """
    return computes_blocks_again(parallel) or (ranks > 1 and parallel.shard != "replicate")


def computes_blocks_again(parallel: Parallel) -> bool:
    """Whether blocks are called again in the backward pass, which compiled ones are not."""
    return parallel.activation_checkpoint != "none" and not parallel.compile


def _prepare_blocks(trunk: nn.Module, parallel: Parallel, is_trained: bool) -> None:
    if parallel.compile and isinstance(trunk, HasStem):  # timm's trunks have stems of all kinds, which run as they are
        compile_method(trunk, "stem_forward")
    # What is not trained keeps nothing for a backward pass.
    mode = parallel.activation_checkpoint if is_trained else "none"
    for block in blocks(trunk):
        if mode != "none" and not parallel.compile:
            checkpoint_forward(block, mode)
        if parallel.compile:  # what is compiled decides itself what it computes again
            compile_method(block, "forward", KEPT_SHARE[mode])


def _shard_part(part: Part, mesh: DeviceMesh, parallel: Parallel, least: float) -> None:
    # What is not trained (the momentum encoder, a moving average) must rest sharded after every forward: it never has a
    # backward pass to do so, and its update writes shards, which weights still gathered from the last step would hide.
    resting = not part.is_trained
    if part.is_trunk:
        _shard_trunk(part.module, mesh, parallel, resting, least)
    else:
        shard([part.module], mesh, MixedPrecisionPolicy(), resting)
    if resting:
        forget_forwards(part.module)


def _shard_trunk(trunk: nn.Module, mesh: DeviceMesh, parallel: Parallel, resting: bool, least: float) -> None:
    inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    if parallel.precision != "bf16":
        inner = outer = MixedPrecisionPolicy()
    units_rest = resting or (parallel.shard in ("full", "hybrid") and mesh.size() > 1)
    for unit in units(trunk, least):
        shard(unit, mesh, inner, units_rest)
    shard([trunk], mesh, outer, resting)


def least_unit(ranks: int) -> float:
    """How many parameters should travel together at least: a rank that is alone has a trunk as one unit."""
    return UNIT if ranks > 1 else math.inf


def units(trunk: nn.Module, least: float) -> list[list[nn.Module]]:
    """The blocks of a trunk whose parameters travel together: neighbours that have at least `least` between them.

    What is left at the end of a row travels with the rest of the trunk: a small one is a single unit.
    """
    found = []
    for row in rows_of_blocks(trunk):
        unit: list[nn.Module] = []
        for block in row:
            unit.append(block)
            if sum(parameter.numel() for each in unit for parameter in each.parameters()) >= least:
                found.append(unit)
                unit = []
    return found


def shard(modules: list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy, resting: bool) -> None:
    """Spread what modules hold, and none of their units does, along the last dimension of `mesh`: one unit, gathered
    before the first of them runs and let go after the last.

    A parameter is cut along its first dimension. Where this has fewer entries than there are ranks, every rank would
    send as much as an entry holds (a position embedding [1, T, D] would travel W times): then along a dimension that
    can be cut evenly, as FSDP asks of all but the first. BatchNorm's few weights stay whole on every rank, in full
    precision: no statistic of float32 is scaled by a number of bf16.
    """
    ranks = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        even = [dim for dim, size in enumerate(parameter.shape) if size % ranks == 0]
        return Shard(even[-1]) if len(parameter) < ranks and even else None

    fully_shard(
        modules,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=resting,
        shard_placement_fn=placement,
        ignored_params=set(batch_norm_weights(modules)),
    )


def dtype_of(parallel: Parallel) -> torch.dtype:
    """In which weights rest, heads compute and images are augmented; bf16 is what trunks make of it."""
    return torch.float64 if parallel.precision == "float64" else torch.float32


def trunk_dtype_of(parallel: Parallel) -> torch.dtype:
    """In which trunks compute."""
    return torch.bfloat16 if parallel.precision == "bf16" else dtype_of(parallel)


def local(tensor: Tensor) -> Tensor:
    """This rank's own shard of a tensor; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shares(tensors: Iterable[Tensor], group: ProcessGroup | None) -> Tensor:
    """How much of each tensor's `local` counts in a sum over the ranks of `group`: one over the number of ranks that
    hold the same. float64, on the CPU; without a group nobody else holds anything."""
    return torch.tensor([1 / _copies(tensor, group) for tensor in tensors], dtype=torch.float64)


def _copies(tensor: Tensor, group: ProcessGroup | None) -> int:
    if not isinstance(tensor, DTensor):
        return 1 if group is None else group.size()
    along = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(ranks for ranks, placement in along if placement.is_replicate())


def own_gradients(network: nn.Module, group: ProcessGroup) -> list[nn.Parameter]:
    """Trained parameters that each of several ranks has whole, so that their gradients are of its own images alone.

    FSDP's are of all ranks, and so are BatchNorm's, whose messages bring them.
    """
    if group.size() == 1:
        return []
    brought = set(batch_norm_weights([network]))
    return [p for p in network.parameters() if p.requires_grad and not isinstance(p, DTensor) and p not in brought]


def saved(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that files hold, by name, this rank's shards of them.

    FSDP swaps a module's parameters for gathered ones while it runs, so lists of shards are taken once, before.
    """
    persistent = module.state_dict().keys()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if name in persistent}


def add_up_gradients(root: nn.Module, *, last: bool) -> None:
    """Let the next backward pass of `root` add its gradients to those before on this rank alone; the last one sends
    the sum to the ranks that keep it, once for all. Weights that rest gathered from forward to backward (grad_op)
    stay so until then. A network that each rank has whole is none of FSDP's: its update adds up over ranks."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(last)
        rests_sharded = any(isinstance(parameter, DTensor) for parameter in root.parameters())
        root.set_reshard_after_backward(last or rests_sharded)


def compile_method(module: nn.Module, name: str, kept: float = 1.0) -> None:
    """Compile a method of a module, in place; FSDP's hooks stay outside `forward`, and names as they are.

    kept: the share that stays of what its backward pass needs beside its inputs; the rest is computed again.
    """
    # What is left in float32 is meant so.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores for float32 matrix multiplication available")
    # Modules of one class share a cache: each shape of a ResNet's bottleneck is an entry, with and without gradient.
    allow_variants(COMPILED_VARIANTS)
    setattr(module, name, compiled(getattr(module, name), kept))


def compiled(function: Callable[P, T], kept: float = 1.0) -> Callable[P, T]:
    """A function of tensors as one graph, for the shapes that it meets."""
    backend = "inductor" if kept == 1.0 else keeping(kept)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def check_compiler(parallel: Parallel, device: torch.device) -> None:
    """Raises UserError where code is to be compiled and cannot be: for a CPU it is C++, and Triton's launchers of
    what runs on a GPU are C."""
    assert "auto" not in (parallel.compile, parallel.precision)  # what it stands for is settled before
    if parallel.compile and device.type == "cpu" and not has_cpp_compiler():
        raise UserError(
            "parallel.compile (true) needs a C++ compiler on a CPU, and neither $CXX nor g++ is one; "
            "install g++ or pass parallel.compile=false"
        )
    if parallel.compile and device.type == "cuda" and not has_c_compiler():
        raise UserError(
            "parallel.compile (true) needs a C compiler on a GPU, for Triton, and there is no $CC, gcc or clang; "
            "install gcc or pass parallel.compile=false"
        )


def has_c_compiler() -> bool:
    """Whether the C compiler is there that Triton calls: $CC where it is set, else gcc or clang."""
    named = os.environ.get("CC")
    return any(shutil.which(name) for name in (("gcc", "clang") if named is None else (named,)))


@torch.no_grad()
def materialize(
    network: nn.Module, device: torch.device, values: Iterable[tuple[str, Tensor]], held: Container[str] = ()
) -> None:
    """Allocate this rank's shards and fill them with `values`: every parameter and buffer whole, one at a time.

    held: names of those that have no value yet; the caller loads them.
    """
    network.to_empty(device=device)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, value in values:
        target = tensors.pop(name)
        value = value.to(target.dtype)
        if isinstance(target, DTensor):
            # Every rank has the same value, so each takes its shard without asking another.
            value = distribute_tensor(value.to(device), target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(value.to_local())
        else:
            target.copy_(value)
    empty = sorted(name for name in tensors if name not in held)
    if empty:
        raise RuntimeError(f"{len(empty)} tensors have no initial value: {', '.join(empty[:5])}")
