"""Trunks by name: any network that turns images into one feature vector each."""

import copy
from functools import partial

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.drop_path import drop_path_places
from models.initial import Draw
from models.norm import replace_batch_norm
from models.resnet import build_resnet
from models.vit import build_vit

TIMM = "timm/"


def build_trunk(name: str, *, image_size: int, freeze_patch_projection: bool, shape: dict | None = None) -> nn.Module:
    """The trunk that a recipe names: [V*B, 3, H, W] -> [V*B, num_features].

    Beside torch's attributes a trunk has `num_features`, `initial_values(seed)`, the values that it starts from,
    `drop_paths(highest)`, the probability of every place of stochastic depth, and timm's `group_matcher`.

    Args:
        name: a ViT name with `shape`, `resnet50`, or `timm/<any timm model>`.
        shape: of a ViT: patch_size, dim, depth, heads, conv_stem.

    Raises:
        ValueError: timm does not know the name, or the network cannot be a trunk here.
    """
    if name == "resnet50":
        return build_resnet()
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), image_size, freeze_patch_projection)
    return build_vit(image_size=image_size, freeze_patch_projection=freeze_patch_projection, **shape)


def _build_timm(name: str, image_size: int, freeze_patch_projection: bool) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"model.name (timm/{name}) must be a timm model; do `timm.list_models()` to see them")
    trunk = _create_timm(name, image_size)
    trunk.initial_values = partial(_initial_timm_values, name, image_size)
    trunk.drop_paths = partial(_timm_drop_paths, name, image_size)
    for path, module in trunk.named_modules():
        if (isinstance(module, nn.Dropout) and module.p > 0) or (isinstance(module, DropPath) and module.drop_prob > 0):
            raise ValueError(f"model.name (timm/{name}) must have no dropout, for one run on any ranks; {path} has")
    replace_batch_norm(trunk)
    trunk.num_features = _output_width(trunk, name, image_size)
    if freeze_patch_projection:
        if not isinstance(trunk, VisionTransformer):
            raise ValueError(f"model.freeze_patch_projection (true) must be false for timm/{name}: it is no plain ViT")
        trunk.patch_embed.proj.requires_grad_(False)
    return trunk


def _create_timm(name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    # Only networks with fixed positions take an image size. Some drop paths unless they are told not to.
    size, rate = {"img_size": image_size}, {"drop_path_rate": drop_path}
    for options in (size | rate, rate, size):
        try:
            return timm.create_model(name, num_classes=0, **options)
        except TypeError:
            continue
        except RuntimeError as error:  # an unknown tag, say
            raise ValueError(f"model.name (timm/{name}) must be a timm model: {error}") from error
    return timm.create_model(name, num_classes=0)


def _output_width(trunk: nn.Module, name: str, image_size: int) -> int:
    # Some networks end in a layer that is wider than the `num_features` they state: ask for an output.
    probe = copy.deepcopy(trunk).to("meta")
    try:
        with torch.no_grad():
            return probe(torch.empty(2, 3, image_size, image_size, device="meta")).shape[-1]
    except RuntimeError as error:
        raise ValueError(f"model.image_size ({image_size}) must suit timm/{name}: {error}") from error


def _initial_timm_values(name: str, image_size: int, seed: int) -> Draw:
    # timm's initialisation fills whole networks from torch's global generator: draw one on the CPU and read from it.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        values = _create_timm(name, image_size)
    tensors = {**dict(values.named_parameters()), **dict(values.named_buffers())}
    return lambda tensor_name, _: tensors[tensor_name].detach()


def _timm_drop_paths(name: str, image_size: int, highest: float) -> dict[str, float]:
    with torch.device("meta"):
        return drop_path_places(_create_timm(name, image_size, highest), image_size)


def is_vit(trunk: nn.Module) -> bool:
    """Whether the trunk takes the three-layer projector of the ViTs (all others take the ResNet's)."""
    return isinstance(trunk, VisionTransformer)


def blocks(trunk: nn.Module) -> list[nn.Module]:
    """The repeated units of a trunk, in order: what is sharded and compiled one by one.

    They are the children of the innermost lists whose members are all of one composite class (a ViT's `blocks`, the
    bottlenecks of a ResNet's stages); a trunk without such lists has none.
    """
    return [unit for group in _lists_of_units(trunk) for unit in group.children()]


def _lists_of_units(module: nn.Module) -> list[nn.Module]:
    inner = [found for child in module.children() for found in _lists_of_units(child)]
    units = list(module.children())
    if inner or not isinstance(module, nn.Sequential | nn.ModuleList) or not units:
        return inner
    same = all(type(unit) is type(units[0]) for unit in units)
    return [module] if same and any(units[0].children()) else []
