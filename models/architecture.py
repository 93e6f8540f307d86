"""Which network is this? The one answer: to a recipe's words, to names and shapes of tensors, to a file's own words."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.moco import MoCo
from models.resnet import build_resnet
from models.shapes import RESNET_SHAPES, TIMM, VIT_SHAPES
from models.timm_trunk import build_timm, check_step
from models.trunk import Trunk
from models.vit import build_vit

MODEL_ARGS = {  # a ViT's shape in timm's words and in ours
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
}

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Architecture:
    """A trunk in the words of its constructor, as JSON holds them.

    kind: vit (models.vit.build_vit), resnet (models.resnet.build_resnet) or timm (models.timm_trunk.build_timm).
    """

    kind: str
    arguments: dict[str, Any]

    def build(self, *, freeze_patch_projection: bool = False) -> Trunk:
        """The trunk, on the device of torch's context; its values are undefined, but for timm's off the meta device.

        Args:
            freeze_patch_projection: the paper's stability trick (section 4.2): the patch projection of a ViT keeps its
                random values, weight and bias.

        Raises:
            ValueError: no trunk has these arguments, or timm's network cannot be one here.
        """
        makers = {"vit": build_vit, "resnet": build_resnet, "timm": build_timm}
        try:
            trunk = makers[self.kind](**self.arguments)
        except (KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"no trunk can be built of {self.kind} {self.arguments}: {' '.join(str(error).split())}"
            ) from error
        if freeze_patch_projection:
            if not trunk.is_vit or self.has_conv_stem:
                raise ValueError(
                    f"model.freeze_patch_projection (true) must be false for {self.name}, which is no plain ViT"
                )
            trunk.module.get_submodule("patch_embed.proj").requires_grad_(False)
        return trunk

    def check_step(self, *, bf16: bool) -> None:
        """Raises ValueError where a run, in bf16 or not, cannot train the trunk alike on any ranks."""
        if self.kind == "timm":
            check_step(**self.arguments, bf16=bf16)

    @property
    def has_conv_stem(self) -> bool:
        return self.kind == "vit" and self.arguments["conv_stem"]

    @property
    def name(self) -> str:
        """The reference's or torchvision's name; `vit`, `vit_conv` or `resnet` for a shape without one."""
        if self.kind == "timm":
            return self.arguments["name"]
        if self.kind == "resnet":
            return next((n for n, known in RESNET_SHAPES.items() if known == self.arguments), "resnet")
        own = {key: value for key, value in self.arguments.items() if key != "image_size"}
        bare = "vit_conv" if self.has_conv_stem else "vit"
        return next((n for n, known in VIT_SHAPES.items() if known == own), bare)

    def model_args(self) -> dict[str, Any]:
        """A ViT's shape in timm's words, a ResNet's in torchvision's."""
        if self.kind == "vit":
            return {theirs: self.arguments[ours] for theirs, ours in MODEL_ARGS.items()}
        return dict(self.arguments)

    def differs_from(self, other: "Architecture") -> str | None:
        """The first thing, beside the image size, in which two trunks of one kind differ; None if nothing does."""
        if self.kind != other.kind:
            return f"its trunk is a {self.name}, not a {other.name}"
        for key, value in self.arguments.items():
            if key != "image_size" and value != other.arguments[key]:
                return f"its trunk has {key} {value}, not {other.arguments[key]}"
        return None


def vit(image_size: int, patch_size: int, dim: int, depth: int, heads: int, conv_stem: bool) -> Architecture:
    sizes = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads}
    return Architecture("vit", sizes | {"conv_stem": conv_stem})


def resnet(layers: list[int], width_per_group: int) -> Architecture:
    return Architecture("resnet", {"layers": list(layers), "width_per_group": width_per_group})


def of_name(name: str, image_size: int, shape: Mapping[str, Any] | None) -> Architecture:
    """The trunk that a recipe declares: its name and, of a ViT, the shape (models.shapes.vit_shape)."""
    if shape is not None:
        return vit(image_size=image_size, **shape)
    if name in RESNET_SHAPES:
        return resnet(**RESNET_SHAPES[name])
    return Architecture("timm", {"name": name.removeprefix(TIMM), "image_size": image_size})


def of_shapes(shapes: Shapes, model_args: Mapping[str, Any] | None, heads: int | None) -> Architecture | None:
    """The trunk whose tensors (names without prefix) have these shapes; None where the number of heads is unknown.

    Args:
        model_args: what the file says of itself; it decides heads and image size, and must fit the shapes.
        heads: of a ViT whose file says nothing.

    Raises:
        ValueError: names and shapes are those of no ViT and no bottleneck ResNet, or not those of `model_args`.
    """
    if "layer1.0.conv3.weight" in shapes:
        stages = [len({n.split(".")[1] for n in shapes if n.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4)]
        return bounded(resnet(stages, _extent(shapes, "layer1.0.conv1.weight", 0)))
    if "cls_token" not in shapes or "pos_embed" not in shapes:
        raise ValueError("its tensors must be those of a ViT (cls_token, pos_embed, ...) or a ResNet; neither is there")
    facts = _vit_facts(shapes)
    if model_args is None and heads is None:
        return None
    stated = _checked_arguments(model_args, facts) if model_args is not None else facts | {"heads": heads}
    if not stated["heads"] or stated["dim"] % stated["heads"]:
        raise ValueError(f"its number of heads ({stated['heads']}) must divide its width ({stated['dim']})")
    return bounded(vit(**stated))


def bounded(architecture: Architecture) -> Architecture:
    """The same; raises ValueError where a file asks for a network of a size that nobody builds."""
    plain = architecture.arguments
    sizes = [v for value in plain.values() for v in (value if isinstance(value, list) else [value])]
    if any(not isinstance(v, str | bool) and not (type(v) is int and 0 < v < 65536) for v in sizes):
        raise ValueError("the trunk's sizes must be integers from 1 to 65535")
    if plain.get("depth", 1) > 1000 or sum(plain.get("layers", [])) > 1000:
        raise ValueError("the trunk must have no more than 1,000 blocks")
    return architecture


def _extent(shapes: Shapes, name: str, dimension: int) -> int:
    """One extent of a convolution's kernel; 0 where there is no such kernel."""
    return shapes[name][dimension] if len(shapes.get(name, ())) == 4 else 0


def _vit_facts(shapes: Shapes) -> dict[str, Any]:
    """All of a ViT's shape but its heads, which no tensor shows."""
    if len(shapes["cls_token"]) != 3 or len(shapes["pos_embed"]) != 3:
        raise ValueError("cls_token and pos_embed must have three dimensions each")
    dim, grid = shapes["cls_token"][-1], math.isqrt(max(shapes["pos_embed"][1] - 1, 0))
    if grid * grid != shapes["pos_embed"][1] - 1:
        raise ValueError(f"pos_embed ({list(shapes['pos_embed'])}) must be of CLS and a square grid of patches")
    stem = [n for n in shapes if re.fullmatch(r"patch_embed\.proj\.\d+\.weight", n) and len(shapes[n]) == 4]
    patch_size = 2 ** (len(stem) - 1) if stem else _extent(shapes, "patch_embed.proj.weight", -1)
    depth = len({n.split(".")[1] for n in shapes if n.startswith("blocks.")})
    if not (dim and depth and patch_size):
        raise ValueError("its tensors must be those of a ViT with blocks and a patch projection")
    sizes = {"image_size": grid * patch_size, "patch_size": patch_size, "dim": dim, "depth": depth}
    return sizes | {"conv_stem": bool(stem)}


def _checked_arguments(model_args: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """`model_args` under our names, where it says nothing that the shapes deny."""
    if not isinstance(model_args, Mapping) or set(model_args) != set(MODEL_ARGS):
        raise ValueError(f"its model_args must have exactly {', '.join(MODEL_ARGS)}")
    if any(type(value) is not int or value < 1 for value in model_args.values()):
        raise ValueError("its model_args must be integers >= 1")
    stated = facts | {ours: model_args[theirs] for theirs, ours in MODEL_ARGS.items()}
    for key in ("patch_size", "dim", "depth"):
        if stated[key] != facts[key]:
            raise ValueError(f"its model_args must fit its tensors: {key} is {stated[key]} there, {facts[key]} here")
    if -(-stated["image_size"] // stated["patch_size"]) * facts["patch_size"] != facts["image_size"]:
        raise ValueError(f"its model_args must fit its tensors: img_size {stated['image_size']} has another grid")
    return stated


def by_shape(architecture: Architecture) -> Architecture:
    """The same trunk as vit or resnet where a timm model is one by all names and shapes; else unchanged.

    What names and shapes do not show (an activation, an order) shows in an export's proof.
    """
    if architecture.kind != "timm":
        return architecture
    with torch.device("meta"):
        trunk = architecture.build()
    theirs = _shapes(trunk.module)
    heads = trunk.module.blocks[0].attn.num_heads if trunk.is_vit else None
    try:
        plain = of_shapes(theirs, None, heads)
    except ValueError:  # neither of the two
        return architecture
    return plain if plain is not None and trunk_shapes(plain) == theirs else architecture


def trunk_shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """Every tensor of the trunk that files hold, in order. Allocates nothing."""
    with torch.device("meta"):
        return _shapes(architecture.build().module)


def moco_shapes(architecture: Architecture, hidden_dim: int, output_dim: int) -> dict[str, torch.Size]:
    """Every tensor of base, momentum and predictor on this trunk, in order. Allocates nothing."""
    with torch.device("meta"):
        return _shapes(MoCo(architecture.build, hidden_dim, output_dim))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
