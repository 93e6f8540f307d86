"""How much of a GPU's memory a step takes that trains a trunk, counted before there is a GPU.

Real modules go forward once, on images without data, and what autograd keeps for the backward pass is added up; the
rest is arithmetic on shapes. It is the moment at which the backward pass begins. Not counted: CUDA's own memory and
workspaces, buffers of NCCL, and what the allocator cannot use. A tenth of the card is for them.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.recipe.sections import ActivationCheckpoint, Finetune, Parallel, Pretrain
from engine.torch_internals import watching, without_data
from engine.training.activation_checkpoint import is_dear
from engine.training.loss import CHUNK
from engine.training.parallelize import dtype_of, is_laid_out, least_unit, trunk_dtype_of, units
from models.classifier import Classifier
from models.moco import MoCo
from models.norm import has_batch_norm
from models.parts import Network
from models.trunk import blocks, cast_constants

GIB = 2**30
CROPS = 64  # that a count sees: many, beside which what a batch keeps once, as numbers for each channel, is little
# Compiled blocks with BatchNorm keep other tensors than the same in eager mode: so much for each byte that these keep
# without checkpoints, counted of ResNet-50. Where an activation keeps its input, as SiLU, it is less: of a block of
# timm's EfficientNet-B0 0.65 and 0.36, for which this counts too much. All other blocks keep as much compiled as not.
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
    """Bytes on each GPU when the backward pass begins, or where nothing has one, when most is there."""

    weights: float  # at rest, of all networks, with gradients and the optimizer's state
    gathered: float  # weights as blocks use them, and gradients on their way to the ranks that keep them
    trunk: float  # activations of the trunk that its backward pass needs
    backward: float  # and what this pass adds
    heads: float  # the same of heads, with features, keys of all ranks, and logits
    images: float  # as the networks take them, and crops in bytes, those of the next step among them

    @property
    def gib(self) -> float:
        return sum(vars(self).values()) / GIB


class Images(NamedTuple):
    """What a rank sees in a step: crops, those that pass the trunk together, their side, and the type in which they
    come."""

    crops: int
    at_once: int
    side: int
    dtype: torch.dtype


def memory_of(recipe: Pretrain, moco: MoCo, gpus: int) -> Memory:
    """Of a step of pre-training on so many GPUs, which divide the batch.

    Args:
        moco: the recipe's networks, on the meta device.
    """
    train, parallel = recipe.train, recipe.parallel
    batch = train.global_batch_size // gpus
    crops, at_once = moco.views * batch, moco.views * (train.micro_batch_size or batch)
    images = Images(crops, at_once, recipe.model.image_size, trunk_dtype_of(parallel))
    states, heads = 2 if recipe.optimizer.name == "adamw" else 1, _heads(recipe, moco, crops, gpus)
    return _memory_of([moco], images, parallel, gpus, states=states, heads=heads)


def memory_of_finetuning(
    recipe: Finetune, classifier: Classifier, ema: Classifier | None, image_size: int, gpus: int
) -> Memory:
    """Of a step of fine-tuning on so many GPUs, which divide the batch.

    Args:
        classifier, ema: as the run makes them, on the meta device; the next step must choose paths anew.
    """
    crops = recipe.train.global_batch_size // gpus
    classifier.choose_paths(torch.ones(CROPS, len(classifier.drop_paths)))
    images = Images(crops, crops, image_size, dtype_of(recipe.parallel))
    networks = [classifier] if ema is None else [classifier, ema]
    return _memory_of(networks, images, recipe.parallel, gpus, states=2, heads=_head(classifier, images))


def _memory_of(
    networks: Sequence[Network], images: Images, parallel: Parallel, gpus: int, *, states: int, heads: float
) -> Memory:
    """networks: the one that is trained, and others that rest. states: of the optimizer, for each number."""
    mode = parallel.activation_checkpoint
    trunk = trunk_bytes(_trained(networks[0], is_trunk=True)[0], images.side, parallel)
    return Memory(
        weights=_at_rest(networks, parallel, gpus, states),
        gathered=_gathered(networks[0], parallel, gpus, is_whole=images.at_once < images.crops),
        trunk=images.at_once * trunk.kept(mode),
        backward=images.at_once * trunk.backward(mode),
        heads=heads,
        images=_bytes_of_images(images, trunk_dtype_of(parallel)),
    )


def _trained(network: Network, *, is_trunk: bool) -> list[nn.Module]:
    return [part.module for part in network.parts() if part.is_trained and part.is_trunk == is_trunk]


# ---- what is kept for the backward pass


def trunk_bytes(trunk: nn.Module, size: int, parallel: Parallel) -> TrunkBytes:
    """What a trunk on the meta device keeps of one crop of this side."""
    trunk, dtype = copy.deepcopy(trunk).train(), trunk_dtype_of(parallel)
    cast_constants(trunk, dtype)
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(dtype)
    kept, counted = count_kept(trunk, (CROPS, 3, size, size), dtype)
    found = [_as_run(block, has_batch_norm(module), parallel.compile) for module, block in counted]
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


def _at_rest(networks: Sequence[Network], parallel: Parallel, gpus: int, states: int) -> float:
    ranks = {"replicate": 1, "hybrid": gpus // parallel.replicate}.get(parallel.shard, gpus)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    trained = _size(parameter for parameter in parameters if parameter.requires_grad)
    return dtype_of(parallel).itemsize * (_size(parameters) + (1 + states) * trained) / ranks  # with the gradient


def _gathered(network: Network, parallel: Parallel, gpus: int, *, is_whole: bool) -> float:
    """is_whole: gradients of micro-batches add up, whole, on each rank."""
    (trunk,) = _trained(network, is_trunk=True)
    whole, width, full = _size(trunk.parameters()), trunk_dtype_of(parallel).itemsize, dtype_of(parallel).itemsize
    if not is_laid_out(parallel, gpus):
        # Casts alone (engine.training.cast). Their gradients take the place of what the backward pass lets go, and come
        # in float32 all at once: as those that count as at rest, or, of a later micro-batch, beside them.
        return (width + is_whole * full) * whole if parallel.precision == "bf16" else 0
    sizes = [sum(_size(block.parameters()) for block in unit) for unit in units(trunk, least_unit(gpus))]
    unit, rest = max(sizes, default=0), whole - sum(sizes)
    # One unit at work, the next one on its way, and one that is let go; the rest of the trunk stays throughout.
    weights = whole if parallel.shard in ("grad_op", "replicate") or gpus == 1 else min(rest + 3 * unit, whole)
    gradients = full * whole if is_whole else 2 * max(unit, rest) * (width + full)
    heads = sum(_size(head.parameters()) for head in _trained(network, is_trunk=False))
    return weights * width + gradients + 2 * full * heads


def _heads(recipe: Pretrain, moco: MoCo, crops: int, gpus: int) -> float:
    kept, dtype = 0, dtype_of(recipe.parallel)
    for head, width in ((moco.base.projector, moco.width), (moco.predictor, recipe.model.output_dim)):
        kept += count_kept(copy.deepcopy(head).train().to(dtype), (CROPS, width), dtype)[0]
    features = 2 * crops * (moco.width + recipe.model.output_dim)
    keys = 2 * crops * gpus * recipe.model.output_dim  # as they came, and normalised
    logits = 3 * crops // moco.views * min(CHUNK, recipe.train.global_batch_size)
    return crops * kept / CROPS + dtype.itemsize * (features + keys + logits)


def _head(classifier: Classifier, images: Images) -> float:
    """Features and logits with their gradients, log-probabilities, targets, and the products of both."""
    return images.dtype.itemsize * images.crops * (2 * classifier.head.in_features + 5 * classifier.head.out_features)


def _bytes_of_images(images: Images, dtype: torch.dtype) -> float:
    """Crops in bytes, of this step and of the next, which come meanwhile; as they come to the trunk, and in its `dtype`
    and in the order that convolutions want."""
    return 3 * images.side**2 * (2 * images.crops + images.at_once * (images.dtype.itemsize + dtype.itemsize))
