"""Families of files by how their names begin: what stands before a trunk there, and what in them is no trunk."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

KNOWN = (
    "MoCo v1 to v3, SimSiam, BYOL, SwAV, DINO, DINOv2, iBOT, MAE, DeiT, timm, torchvision and transformers' ViT; "
    "ResNets with blocks of three convolutions, as in ResNet-50"
)

# MoCo v1 and v2, v3 without predictor; BYOL; DINO in training; SimSiam; DINO and others; transformers; a bare trunk.
_PREFIXES = (
    "encoder_q.",
    "base_encoder.",
    "online_encoder.net.",
    "online_encoder.",
    "online_network.encoder.",
    "online_network.",
    "teacher.backbone.",
    "teacher_backbone.",
    "encoder.",
    "backbone.",
    "vit.",
    "",
)
_WRAPPERS = r"(?:(?:module|model|net)\.)*"  # DataParallel and modules of Lightning put these before all names
_WITHIN = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = ("conv1.weight", "cls_token", "embeddings.cls_token")  # a tensor that every ResNet or ViT has, at its root

DINOV2_SIGN = "blocks.0.ls1.gamma"  # LayerScale, with positions of 518-pixel images
_DINOV2 = {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"}


def trunk_prefix(names: Iterable[str]) -> str:
    """What stands before a trunk's names; "" where nothing does, or no trunk is to be seen."""
    found = {name.removesuffix(first): None for name in names for first in _FIRST if name.endswith(first)}
    fitting = (p for family in _PREFIXES for p in found if re.fullmatch(_WRAPPERS + re.escape(family), p))
    return next(fitting, "")


def unwrapped(name: str) -> str:
    """Without what torch.compile and PyTorch's wrappers of blocks put into it."""
    return _WITHIN.sub("", name)


def dinov2(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The arguments of DINOv2's network in timm. Raises ValueError where timm names or joins its tensors otherwise."""
    width = shapes["cls_token"][-1] if "cls_token" in shapes else 0
    if width not in _DINOV2 or "register_tokens" in shapes:
        raise ValueError("its DINOv2 network must be a ViT-S, B or L without registers; timm has others: timm/<name>")
    return {"name": _DINOV2[width], "image_size": 518}
