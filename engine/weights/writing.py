"""Write weights as others read them: one function for each format, one tensor read at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.weights import tables
from engine.weights.reading import MARK
from engine.weights.weights import Weights, fill_trunk
from models.architecture import Architecture
from models.shapes import RESNET_SHAPES

OPSET = 18
ONNX_LIMIT = (
    1_500_000_000  # bytes of weights above which ONNX keeps them in a file of their own; protobuf ends at 2 GiB
)
TIMM_VITS = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


def collect(weights: Weights, form: tables.Form, keep_dtype: bool = False) -> dict[str, Tensor]:
    """Every tensor under the form's names, each in memory of its own; float64 becomes float32 unless it is kept."""
    tensors, taken = {}, set()
    for name, tensor in weights.read(list(weights.shapes)):
        theirs = form.theirs(name)
        if tensor.dtype == torch.float64 and not keep_dtype:
            tensor = tensor.float()
        parts = [tensor] if len(theirs) == 1 else tensor.chunk(len(theirs))
        tensors |= dict(zip(theirs, (_own_memory(part, taken) for part in parts), strict=True))
    return tensors


def _own_memory(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor, or a copy where its memory is larger than itself or `taken` (addresses) by another tensor."""
    # torch.save writes the whole memory behind a view, and safetensors refuses tensors that share theirs.
    memory = tensor.untyped_storage()
    if memory.nbytes() != tensor.nbytes or memory.data_ptr() in taken or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor


def _metadata(weights: Weights) -> dict[str, str]:
    return {"format": "pt", MARK: weights.about.to_json()}


def write_safetensors(weights: Weights, file: Path) -> None:
    """All of base, momentum and heads under our names, in the types that they have."""
    save_file(collect(weights, tables.OURS, keep_dtype=True), file, metadata=_metadata(weights))


def write_torchvision(weights: Weights, file: Path) -> None:
    """The bare table of tensors that `load_state_dict` of a network without classifier takes."""
    tensors = collect(weights, tables.TRUNK)
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata=_metadata(weights))
    else:
        torch.save(tensors, file)


def write_moco_v3(weights: Weights, file: Path) -> None:
    """The reference's checkpoint, with `model_args` beside its own entries."""
    about = weights.about
    form = tables.REFERENCE_VIT if about.architecture.kind == "vit" else tables.REFERENCE_RESNET
    content = {
        "epoch": about.epoch,
        "arch": about.arch or about.architecture.name,
        "state_dict": collect(weights, form),
        "optimizer": None,
        "scaler": None,
        "model_args": about.architecture.model_args(),
    }
    torch.save(content, file)


def write_deit(weights: Weights, file: Path) -> None:
    """The form that DeiT's scripts fine-tune from, with `model_args` beside it."""
    torch.save({"model": collect(weights, tables.TRUNK), "model_args": weights.about.architecture.model_args()}, file)


def timm_arguments(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) with which `timm.create_model` makes this trunk."""
    name, arguments = architecture.name, architecture.arguments
    if architecture.kind == "vit":
        return TIMM_VITS.get(name, "vit_base_patch16_224"), {**architecture.model_args(), "num_classes": 0}
    if architecture.kind == "resnet":
        sizes = {"layers": arguments["layers"], "base_width": arguments["width_per_group"], "num_classes": 0}
        return name if name in RESNET_SHAPES else "resnet50", sizes
    with torch.device("meta"):
        trunk = architecture.build().module
    takes_size = any(n.endswith(("pos_embed", "position_bias_table")) for n, _ in trunk.named_parameters())
    return name, {"num_classes": 0} | ({"img_size": arguments["image_size"]} if takes_size else {})


def write_timm(weights: Weights, file: Path) -> None:
    """A folder that `timm.create_model('local-dir:...')` takes, or one file that says which arguments it needs."""
    name, arguments = timm_arguments(weights.about.architecture)
    tensors = collect(weights, tables.TRUNK)
    if file.suffix != ".safetensors":
        torch.save({"state_dict": tensors, "architecture": name, "model_args": arguments, **_metadata(weights)}, file)
        return
    own = {"architecture": name, "model_args": json.dumps(arguments)}
    save_file(tensors, file, metadata=_metadata(weights) | own)


def write_timm_config(weights: Weights, folder: Path) -> None:
    about = weights.about
    name, arguments = timm_arguments(about.architecture)
    images = {"input_size": [3, about.image_size, about.image_size], "mean": about.mean, "std": about.std}
    config = {
        "architecture": name,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {**images, "num_classes": 0, "interpolation": "bilinear", "crop_pct": 0.875},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_transformers(weights: Weights, file: Path) -> None:
    save_file(collect(weights, tables.TRANSFORMERS), file, metadata=_metadata(weights))


def write_transformers_config(weights: Weights, folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor  # an extra, and seconds to import

    about = weights.about
    shape = about.architecture.arguments
    config = ViTConfig(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["dim"],
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        layer_norm_eps=1e-6,
        architectures=["ViTModel"],
    )
    config.save_pretrained(folder)
    size = {"height": about.image_size, "width": about.image_size}
    ViTImageProcessor(size=size, image_mean=list(about.mean), image_std=list(about.std)).save_pretrained(folder)


def write_onnx(weights: Weights, file: Path) -> None:
    """The trunk as a program, `images` [N, 3, S, S] -> `features` [N, D], for any N."""
    trunk, size = fill_trunk(weights), weights.about.image_size
    program = torch.onnx.export(
        trunk,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    program.model.metadata_props.update(_metadata(weights))
    large = sum(p.numel() * p.element_size() for p in trunk.parameters()) > ONNX_LIMIT
    program.save(file, external_data=large)


WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "timm": write_timm,
    "torchvision": write_torchvision,
    "moco_v3": write_moco_v3,
    "deit": write_deit,
    "safetensors": write_safetensors,
    "transformers": write_transformers,
    "onnx": write_onnx,
}
CONFIGS = {"timm": write_timm_config, "transformers": write_transformers_config}  # beside the weights in a folder
