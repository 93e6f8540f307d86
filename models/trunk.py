"""What a trunk is: any network that turns images into one feature vector each."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.initial import Draw


@dataclass(frozen=True)
class Trunk:
    """A network without heads and what others must know of it.

    module: [N, 3, H, W] -> [N, width].
    is_vit: whether it takes the heads of the ViTs (all others take the ResNet's).
    initial_values: from a seed to the value of every parameter and buffer before training.
    drop_paths: from a highest probability to that of every place of stochastic depth, by path; empty where it has none.
    layers: how timm tells a parameter's layer by its name (what `group_matcher(coarse=False)` gives).
    no_weight_decay: parameters that its authors leave out, beside biases and norms.
    never_trained: parameters that its authors leave as they are, with labels too.
    """

    module: nn.Module
    width: int
    is_vit: bool
    initial_values: Callable[[int], Draw]
    drop_paths: Callable[[float], Mapping[str, float]]
    layers: Any
    no_weight_decay: frozenset[str] = frozenset()
    never_trained: frozenset[str] = frozenset()


@runtime_checkable
class HasStem(Protocol):
    """A trunk's module that computes its first block's input in a method of its own, which can be compiled."""

    def stem_forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> the first block's input."""
        ...


def as_convolutions_want(images: Tensor) -> Tensor:
    """The same images [N, C, H, W], on a GPU with channels last in memory: what its tensor cores read, and what comes
    out of a convolution and of BatchNorm has their order."""
    return images.to(memory_format=torch.channels_last) if images.device.type == "cuda" else images


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated units of a trunk's module, in order: what is compiled one by one and sharded in units.

    They are the children of the innermost lists whose members are all of one composite class (a ViT's `blocks`, the
    bottlenecks of a ResNet's stages), but those that share parameters; a trunk without such lists has none.
    """
    return [block for row in rows_of_blocks(module) for block in row]


def rows_of_blocks(module: nn.Module) -> list[list[nn.Module]]:
    """The same, in rows: those of one `nn.Sequential`, which run one after another; any other block is a row."""
    places = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    rows = []
    for group in _lists_of_blocks(module):
        own = [block for block in group.children() if all(places[p] == 1 for p in block.parameters())]
        rows += [own] if isinstance(group, nn.Sequential) else [[block] for block in own]
    return rows


def cast_constants(module: nn.Module, dtype: torch.dtype) -> None:
    """Give tables and masks (floating buffers that no file holds) the type in which the trunk computes.

    FSDP casts parameters and inputs alone; statistics, which files hold, stay as they are.
    """
    lasting = module.state_dict().keys()
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if f"{path}.{name}".lstrip(".") not in lasting and buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))


def _lists_of_blocks(module: nn.Module) -> list[nn.Module]:
    inner = [found for child in module.children() for found in _lists_of_blocks(child)]
    members = list(module.children())
    if inner or not isinstance(module, nn.Sequential | nn.ModuleList) or not members:
        return inner
    same = all(type(member) is type(members[0]) for member in members)
    return [module] if same and any(members[0].children()) else []
