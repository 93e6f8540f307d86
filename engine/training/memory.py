"""How much of a GPU's memory a step of pre-training takes, counted before there is a GPU.

Real modules go forward once, on two images without data, and what autograd keeps for the backward pass is added up; the
rest is arithmetic on shapes. It is the moment at which the backward pass begins. Not counted: CUDA's own memory and
workspaces, buffers of NCCL, and what the allocator cannot use. A tenth of the card is for them.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.recipe.sections import ActivationCheckpoint, Pretrain
from engine.torch_internals import watching, without_data
from engine.training.activation_checkpoint import is_dear
from engine.training.loss import CHUNK
from engine.training.parallelize import computes_blocks_again, least_unit, trunk_dtype_of, units
from models.moco import MoCo
from models.norm import has_batch_norm
from models.trunk import blocks, cast_constants

GIB = 2**30
CROPS = 2  # that a count sees
FLOAT = 4  # bytes of a number where weights rest, in heads and in the loss
# Compiled blocks with BatchNorm keep other tensors than the same in eager mode: so much for each byte that these keep
# without checkpoints, counted of ResNet-50. All other blocks keep as much compiled as not.
COMPILED_BATCH_NORM: dict[ActivationCheckpoint, float] = {"none": 1.14, "selective": 0.82}


class BlockBytes(NamedTuple):
    """What a block keeps for its backward pass, by activation checkpoint, and the results of its dear operations."""

    none: float
    selective: float
    full: float
    dear: float


@dataclass(frozen=True)
class TrunkBytes:
    """What a trunk keeps of one crop: outside of its blocks, and in each."""

    outside: float
    blocks: list[BlockBytes]

    def kept(self, mode: ActivationCheckpoint) -> float:
        return self.outside + sum(getattr(block, mode) for block in self.blocks)

    def backward(self, mode: ActivationCheckpoint) -> float:
        """For the backward pass of the largest block: what it computes again, and gradients of what was dear."""
        return max((block.none - getattr(block, mode) + block.dear for block in self.blocks), default=0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU when the backward pass begins."""

    weights: float  # at rest, of both encoders and the predictor, with gradients and the optimizer's state
    gathered: float  # weights as blocks use them, and gradients on their way to the ranks that keep them
    trunk: float  # activations of the base trunk that its backward pass needs
    backward: float  # and what this pass adds
    heads: float  # the same of projector and predictor, features, keys of all ranks, and logits
    images: float  # views, and crops in bytes, those of the next step among them

    @property
    def gib(self) -> float:
        return sum(vars(self).values()) / GIB


def memory_of(recipe: Pretrain, moco: MoCo, gpus: int) -> Memory:
    """Of a step on so many GPUs, which divide the batch.

    Args:
        moco: the recipe's networks, on the meta device.
    """
    train, mode = recipe.train, recipe.parallel.activation_checkpoint
    batch = train.global_batch_size // gpus
    crops, at_once = moco.views * batch, moco.views * (train.micro_batch_size or batch)
    trunk = trunk_bytes(recipe, moco)
    return Memory(
        weights=_at_rest(recipe, moco, gpus),
        gathered=_gathered(recipe, moco, gpus, is_whole=at_once < crops),
        trunk=at_once * trunk.kept(mode),
        backward=at_once * trunk.backward(mode),
        heads=_heads(recipe, moco, crops, gpus),
        images=_images(recipe, crops, at_once),
    )


# ---- what is kept for the backward pass


def trunk_bytes(recipe: Pretrain, moco: MoCo) -> TrunkBytes:
    """What the recipe's trunk keeps of one crop."""
    trunk, size = copy.deepcopy(moco.base.trunk).train(), recipe.model.image_size
    dtype = trunk_dtype_of(recipe.parallel)
    cast_constants(trunk, dtype)
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(dtype)
    kept, counted = count_kept(trunk, (CROPS, 3, size, size), dtype)
    found = [_as_run(block, has_batch_norm(module), recipe.parallel.compile) for module, block in counted]
    return TrunkBytes((kept - sum(block.none for _, block in counted)) / CROPS, found)


def _as_run(block: BlockBytes, has_norm: bool, is_compiled: bool) -> BlockBytes:
    """Of one crop."""
    if has_norm and is_compiled:
        share = COMPILED_BATCH_NORM
        block = block._replace(none=share["none"] * block.none, selective=share["selective"] * block.none)
    return BlockBytes(*(count / CROPS for count in block))


class _Count:
    """Bytes that autograd keeps so far, and of results of dear operations: all, and those before the last one kept.

    A forward that is computed again ends where nothing more is kept, so results after that need not be there.
    """

    def __init__(self, module: nn.Module):
        self.kept = self.dear = self.needed = 0
        self.found = {id(tensor.untyped_storage()): tensor for tensor in (*module.parameters(), *module.buffers())}

    def see(self, operation: Any, results: Any) -> None:
        if is_dear(operation):
            self.dear += _bytes_of(results)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.found:
            self.found[id(storage)] = tensor
            self.kept += storage.nbytes()
            self.needed = self.dear
        return tensor


def count_kept(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, list[tuple[nn.Module, BlockBytes]]]:
    """The bytes that a forward keeps beside an input of this shape, and those of each block.

    Args:
        module: on the meta device; not to be used afterwards.
    """
    counted: list[tuple[nn.Module, BlockBytes]] = []
    with without_data():
        module.to_empty(device="cpu")  # not meta, where attention has another form
        count = _Count(module)
        for block in blocks(module):
            _watch(block, count, counted)
        images = torch.empty(shape, dtype=dtype)
        count.found[id(images.untyped_storage())] = images  # not of the module
        with saved_tensors_hooks(count.keep, lambda tensor: tensor), watching(count.see):
            module(images)
    return count.kept, counted


def _watch(block: nn.Module, count: _Count, counted: list[tuple[nn.Module, BlockBytes]]) -> None:
    before: dict[str, int] = {}

    def begin(_: nn.Module, inputs: tuple) -> None:
        count.needed = count.dear
        before.update(input=_bytes_of(inputs), kept=count.kept, dear=count.dear)

    def end(*_: Any) -> None:
        selective = before["input"] + count.needed - before["dear"]
        added, dear = count.kept - before["kept"], count.dear - before["dear"]
        counted.append((block, BlockBytes(added, selective, before["input"], dear)))

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)


def _bytes_of(values: Any) -> int:
    several = values if isinstance(values, tuple | list) else (values,)
    return sum(value.nbytes for value in several if isinstance(value, Tensor))


# ---- arithmetic


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _at_rest(recipe: Pretrain, moco: MoCo, gpus: int) -> float:
    parallel = recipe.parallel
    ranks = {"replicate": 1, "hybrid": gpus // parallel.replicate}.get(parallel.shard, gpus)
    trained = _size(p for p in moco.parameters() if p.requires_grad)
    states = 2 if recipe.optimizer.name == "adamw" else 1  # and the gradient
    return FLOAT * (_size(moco.parameters()) + (1 + states) * trained) / ranks


def _gathered(recipe: Pretrain, moco: MoCo, gpus: int, *, is_whole: bool) -> float:
    """is_whole: gradients of micro-batches add up, whole, on each rank."""
    trunk, parallel = moco.base.trunk, recipe.parallel
    whole, width = _size(trunk.parameters()), trunk_dtype_of(parallel).itemsize
    if gpus == 1 and not computes_blocks_again(parallel):
        # Casts alone (engine.training.cast). Their gradients take the place of what the backward pass lets go, and come
        # in float32 all at once: as those that count as at rest, or, of a later micro-batch, beside them.
        return (width + is_whole * FLOAT) * whole if parallel.precision == "bf16" else 0
    sizes = [sum(_size(block.parameters()) for block in unit) for unit in units(trunk, least_unit(gpus))]
    unit, rest = max(sizes, default=0), whole - sum(sizes)
    # One unit at work, the next one on its way, and one that is let go; the rest of the trunk stays throughout.
    weights = whole if parallel.shard in ("grad_op", "replicate") or gpus == 1 else min(rest + 3 * unit, whole)
    gradients = FLOAT * whole if is_whole else 2 * max(unit, rest) * (width + FLOAT)
    heads = _size((*moco.base.projector.parameters(), *moco.predictor.parameters()))
    return weights * width + gradients + 2 * FLOAT * heads


def _heads(recipe: Pretrain, moco: MoCo, crops: int, gpus: int) -> float:
    kept = 0
    for head, width in ((moco.base.projector, moco.width), (moco.predictor, recipe.model.output_dim)):
        kept += count_kept(copy.deepcopy(head).train(), (CROPS, width), torch.float32)[0]
    features = 2 * crops * (moco.width + recipe.model.output_dim)
    keys = 2 * crops * gpus * recipe.model.output_dim  # as they came, and normalised
    logits = 3 * crops // moco.views * min(CHUNK, recipe.train.global_batch_size)
    return crops * kept / CROPS + FLOAT * (features + keys + logits)


def _images(recipe: Pretrain, crops: int, at_once: int) -> float:
    """Crops in bytes, of this step and of the next, which come meanwhile; views in the trunk's type, as they were made
    and in the order that convolutions want."""
    return 3 * recipe.model.image_size**2 * (2 * crops + at_once * 2 * trunk_dtype_of(recipe.parallel).itemsize)
