"""timm's networks as trunks, where they can be trained on any ranks."""

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
from models.shapes import TIMM
from models.trunk import Trunk


def build_timm(name: str, image_size: int) -> Trunk:
    """timm's model of this name without its classifier, BatchNorm over all ranks.

    Raises:
        ValueError: timm does not know the name, or the network cannot be a trunk here.
    """
    if not timm.is_model(name):
        raise ValueError(f"model.name ({TIMM}{name}) must be a timm model; do `timm.list_models()` to see them")
    module = _create(name, image_size)
    for path, part in module.named_modules():
        if (isinstance(part, nn.Dropout) and part.p > 0) or (isinstance(part, DropPath) and part.drop_prob > 0):
            raise ValueError(f"model.name ({TIMM}{name}) must have no dropout, for one run on any ranks; {path} has")
    replace_batch_norm(module)
    return Trunk(
        module,
        _output_width(module, name, image_size),
        is_vit=isinstance(module, VisionTransformer),
        initial_values=partial(_initial_values, name, image_size),
        drop_paths=partial(_drop_paths, name, image_size),
        layers=module.group_matcher(coarse=False) if hasattr(module, "group_matcher") else None,
        no_weight_decay=frozenset(module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()),
    )


def _create(name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    # Only networks with fixed positions take an image size. Some drop paths unless they are told not to.
    size, rate = {"img_size": image_size}, {"drop_path_rate": drop_path}
    for options in (size | rate, rate, size):
        try:
            return timm.create_model(name, num_classes=0, **options)
        except TypeError:
            continue
        except RuntimeError as error:  # an unknown tag, say
            raise ValueError(f"model.name ({TIMM}{name}) must be a timm model: {_words(error)}") from error
    return timm.create_model(name, num_classes=0)


def _output_width(module: nn.Module, name: str, image_size: int) -> int:
    # Some networks end in a layer that is wider than the `num_features` they state: ask for an output.
    twin = copy.deepcopy(module).to("meta")
    try:
        with torch.no_grad():
            return twin(torch.empty(2, 3, image_size, image_size, device="meta")).shape[-1]
    except RuntimeError as error:
        raise ValueError(f"model.image_size ({image_size}) must suit {TIMM}{name}: {_words(error)}") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _initial_values(name: str, image_size: int, seed: int) -> Draw:
    # timm's initialisation fills whole networks from torch's global generator: draw one on the CPU and read from it.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        values = _create(name, image_size)
    tensors = {**dict(values.named_parameters()), **dict(values.named_buffers())}
    return lambda tensor_name, _: tensors[tensor_name].detach()


def _drop_paths(name: str, image_size: int, highest: float) -> dict[str, float]:
    with torch.device("meta"):
        return drop_path_places(_create(name, image_size, highest), image_size)
