"""How the networks are laid over the ranks: compile, then FSDP2, then weights. Read from top to bottom."""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.errors import UserError
from engine.recipe.sections import Precision, Shard
from models.classifier import Classifier
from models.moco import MoCo
from models.norm import set_batch_norm_group
from models.trunk import blocks

COMPILED_VARIANTS = 64  # graphs of one forward: its shapes, with and without gradient, in training and evaluation


class Layout(NamedTuple):
    """How one run lays networks over its ranks.

    mesh: of "replicate" and "shard" where there are replicas, of "shard" alone where there are none.
    resharding: whether what is trained rests sharded between forward and backward.
    """

    mesh: DeviceMesh
    resharding: bool
    precision: Precision
    compile: bool


def parallelize(
    moco: MoCo,
    mesh: DeviceMesh,
    group: torch.distributed.ProcessGroup,
    *,
    shard: Shard,
    precision: Precision,
    compile: bool,
) -> None:
    """Shard a MoCo that is still on the meta device over `mesh` ("replicate", "shard"); `materialize` fills it.

    Every trunk, projector and the predictor is a root of its own, because evaluation calls the trunks alone. Trunks run
    in bf16 under `precision: bf16`, heads always in full precision; gradients are reduced in full precision.

    Args:
        group: the ranks of the global batch, for BatchNorm.
        shard: where a parameter rests. full, hybrid: sharded also between forward and backward; grad_op: gathered from
            the forward to the backward pass; replicate: whole on every rank.
    """
    layout = _layout(mesh, shard, precision, compile)
    _prepare(moco, group, precision)
    _shard_pair(moco.base.trunk, moco.base.projector, layout, trained=True)
    _shard_pair(moco.momentum.trunk, moco.momentum.projector, layout, trained=False)
    _shard_head(moco.predictor, layout, layout.resharding)


def parallelize_classifier(
    classifier: Classifier,
    ema: Classifier | None,
    mesh: DeviceMesh,
    group: torch.distributed.ProcessGroup,
    *,
    shard: Shard,
    precision: Precision,
    compile: bool,
) -> None:
    """`parallelize` for a classifier that is trained and, where there is one, the moving average of its weights."""
    layout = _layout(mesh, shard, precision, compile)
    for network in (classifier, ema):
        if network is not None:
            _prepare(network, group, precision)
            _shard_pair(network.trunk, network.head, layout, trained=network is classifier)


def _layout(mesh: DeviceMesh, shard: Shard, precision: Precision, compile: bool) -> Layout:
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    return Layout(mesh, shard in ("full", "hybrid"), precision, compile)


def _prepare(network: nn.Module, group: torch.distributed.ProcessGroup, precision: Precision) -> None:
    # A trunk's CLS token is a view of its tokens; FSDP warns of in-place writes to it, and there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    network.to(torch.float64 if precision == "float64" else torch.float32)
    set_batch_norm_group(network, group)


def _shard_pair(trunk: nn.Module, head: nn.Module, layout: Layout, *, trained: bool) -> None:
    """A trunk and what stands on it."""
    # What is not trained (the momentum encoder, a moving average) must rest sharded after every forward: it never has a
    # backward pass to do so, and its update writes shards, which weights still gathered from the last step would hide.
    resting = layout.resharding or not trained
    _shard_trunk(trunk, layout, resting)
    _shard_head(head, layout, resting)
    if not trained:
        forget_forwards(trunk)
        forget_forwards(head)


def _shard_trunk(trunk: nn.Module, layout: Layout, resting: bool) -> None:
    inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    if layout.precision != "bf16":
        inner = outer = MixedPrecisionPolicy()
    for block in blocks(trunk):
        if layout.compile:
            compile_forward(block)
        fully_shard(block, mesh=layout.mesh, mp_policy=inner, reshard_after_forward=resting)
    fully_shard(trunk, mesh=layout.mesh, mp_policy=outer, reshard_after_forward=resting)


def _shard_head(head: nn.Module, layout: Layout, resting: bool) -> None:
    if layout.compile:
        compile_forward(head)
    fully_shard(head, mesh=layout.mesh, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=resting)


def forget_forwards(root: nn.Module) -> None:
    """After every forward of `root`, clear what FSDP notes of it for the backward to come: where none ever comes, the
    notes of a long run would fill the memory. No public call does it."""
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]

    def forget(*_: object) -> None:
        for state in states:
            state._comm_ctx.post_forward_order.clear()
            # One group until torch 2.13, several from then on.
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                group._post_forward_indices.clear()

    root.register_forward_hook(forget)


def compile_forward(module: nn.Module) -> None:
    """Compile a module's forward into one graph, in place; FSDP's hooks stay outside, and names as they are."""
    # Modules of one class share a cache: each shape of a ResNet's bottleneck is an entry, with and without gradient.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Raises UserError where compiled code for the device could not be built: on a CPU it is C++."""
    from torch._inductor import cpp_builder, exc  # it looks where the compilation itself will; seconds to import

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "parallel.compile (true) must have a C++ compiler on a CPU, and $CXX or g++ is none; "
            "install g++ or pass parallel.compile=false"
        ) from error


@torch.no_grad()
def materialize(network: nn.Module, device: torch.device, values: Iterable[tuple[str, Tensor]]) -> None:
    """Allocate this rank's shards and fill them with `values`: every parameter and buffer whole, one at a time."""
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
    if tensors:
        raise RuntimeError(f"{len(tensors)} tensors have no initial value: {', '.join(sorted(tensors)[:5])}")
