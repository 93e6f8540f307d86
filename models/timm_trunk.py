"""timm's networks as trunks, where they can be trained on any ranks."""

import copy
import difflib
import math
from functools import partial
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import auto_group_layers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.drop_path import drop_path_places
from models.dry_step import why_untrainable
from models.initial import Draw
from models.norm import replace_batch_norm
from models.shapes import TIMM
from models.trunk import Trunk

_WIDTHS: dict[tuple[str, int], int] = {}  # of outputs, by name and image size: a run builds its trunk several times

_INITIALIZERS = {nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_}
# With which timm's own ones do it; the last four make uniform numbers normal, and cut off their tails.
_FILLS = {
    getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "fill", "zero", "erfinv", "mul", "add", "clamp")
}


def build_timm(name: str, image_size: int) -> Trunk:
    """timm's model of this name without its classifier, BatchNorm over all ranks.

    Raises:
        ValueError: timm does not know the name, or the network cannot be a trunk here.
    """
    if not timm.is_model(name):
        known = timm.list_models()
        nearest = [each for each in known if each.startswith(name)] or difflib.get_close_matches(name, known, 1)
        do = f"did you mean {TIMM}{nearest[0]}?" if nearest else "do `timm.list_models()` to see them"
        raise ValueError(f"model.name ({TIMM}{name}) must be a timm model; {do}")
    with _Unfilled():
        module = _create(name, image_size)
    try:
        replace_batch_norm(module)
    except ValueError as error:
        raise ValueError(f"model.name ({TIMM}{name}) must be another network: {error}") from error
    return Trunk(
        module,
        _output_width(module, name, image_size),
        is_vit=isinstance(module, VisionTransformer),
        initial_values=partial(_initial_values, name, image_size),
        drop_paths=partial(drop_path_places, partial(_create, name, image_size), image_size),
        layers=_layers(module),
        no_weight_decay=frozenset(module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()),
        never_trained=frozenset(name for name, p in module.named_parameters() if not p.requires_grad),
    )


def check_step(name: str, image_size: int, *, bf16: bool) -> None:
    """Raises ValueError where no run on any ranks can train the network, told by a step on the meta device."""

    def found(dtype: torch.dtype) -> str | None:
        with torch.device("meta"):
            return why_untrainable(build_timm(name, image_size).module, image_size, dtype)

    why = found(torch.bfloat16 if bf16 else torch.float32)
    if why and bf16 and not found(torch.float32):
        raise ValueError(f"parallel.precision (bf16) must be float32 for {TIMM}{name}: {why}")
    if why:
        raise ValueError(f"model.name ({TIMM}{name}) must be a network that trains alike on any ranks: {why}")


def _create(name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    # Only networks with fixed positions take an image size. Some drop paths or features unless they are told not to.
    size, paths, features = ("img_size", image_size), ("drop_path_rate", drop_path), ("drop_rate", 0.0)
    options = (size, paths, features)
    for some in (options, (paths, features), (size, features), (size, paths), (features,), (paths,), (size,)):
        try:
            return timm.create_model(name, num_classes=0, **dict(some))
        except TypeError:  # it does not take one of them
            continue
        except RuntimeError as error:  # an unknown tag, say
            raise ValueError(f"model.name ({TIMM}{name}) must be a timm model: {_words(error)}") from error
    return timm.create_model(name, num_classes=0)


def _layers(module: nn.Module) -> Any:
    if hasattr(module, "group_matcher"):
        return module.group_matcher(coarse=False)
    # As timm does for a network that does not say: every 12 parameters are a layer.
    places = auto_group_layers(module)
    return lambda name: places.get(name, math.inf)


class _Unfilled(TorchFunctionMode):
    """Within, parameters on the meta device are not filled: random numbers for nobody took most of a network's time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if func in _FILLS else kwargs["tensor"] if func in _INITIALIZERS else None
        return filled if filled is not None and filled.is_meta else func(*args, **kwargs)


def _output_width(module: nn.Module, name: str, image_size: int) -> int:
    # Some networks end in a layer that is wider than the `num_features` they state: ask for an output.
    if (name, image_size) in _WIDTHS:
        return _WIDTHS[name, image_size]
    twin = copy.deepcopy(module).to("meta")
    try:
        with torch.no_grad():
            output = twin(torch.empty(2, 3, image_size, image_size, device="meta"))
    except Exception as error:  # timm asserts, divides and looks up without saying what was wrong
        raise ValueError(f"model.image_size ({image_size}) must suit {TIMM}{name}: {_words(error)}") from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = list(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"model.name ({TIMM}{name}) must give one row of features for an image; 2 images give {found}")
    return _WIDTHS.setdefault((name, image_size), output.shape[1])


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _initial_values(name: str, image_size: int, seed: int) -> Draw:
    # timm's initialisation fills whole networks from torch's global generator: draw one on the CPU and read from it.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        values = _create(name, image_size)
    tensors = {**dict(values.named_parameters()), **dict(values.named_buffers())}
    return lambda tensor_name, _: tensors[tensor_name].detach()
