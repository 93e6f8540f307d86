"""transformers: a folder for Hugging Face's `ViTModel.from_pretrained`, with its image processor."""

import dataclasses
from pathlib import Path

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from engine.data.decode import RESAMPLING, CenterCrop
from engine.weights.format import Format, collect, metadata
from engine.weights.names import Naming
from engine.weights.weights import Weights
from models.architecture import Architecture
from models.vit import NORM_EPS

VIT = Naming(
    sign="embeddings.cls_token",
    rows=(
        ("base.trunk.cls_token", ("embeddings.cls_token",)),
        ("base.trunk.pos_embed", ("embeddings.position_embeddings",)),
        ("base.trunk.patch_embed.proj.", ("embeddings.patch_embeddings.projection.",)),
        ("base.trunk.blocks.{n}.norm1.", ("encoder.layer.{n}.layernorm_before.",)),
        (
            "base.trunk.blocks.{n}.attn.qkv.",
            tuple(f"encoder.layer.{{n}}.attention.attention.{part}." for part in ("query", "key", "value")),
        ),
        ("base.trunk.blocks.{n}.attn.proj.", ("encoder.layer.{n}.attention.output.dense.",)),
        ("base.trunk.blocks.{n}.norm2.", ("encoder.layer.{n}.layernorm_after.",)),
        ("base.trunk.blocks.{n}.mlp.fc1.", ("encoder.layer.{n}.intermediate.dense.",)),
        ("base.trunk.blocks.{n}.mlp.fc2.", ("encoder.layer.{n}.output.dense.",)),
        ("base.trunk.norm.", ("layernorm.",)),
    ),
    dropped=(r"(pooler\.dense|classifier)\.(weight|bias)", r"embeddings\.mask_token"),
)


def write(weights: Weights, file: Path) -> None:
    save_file(collect(weights, VIT), file, metadata=metadata(weights))


def write_config(weights: Weights, folder: Path) -> None:
    from transformers import BitImageProcessor, ViTConfig  # an extra, and seconds to import

    about = weights.known()
    shape = about.architecture.arguments
    config = ViTConfig(
        hidden_size=shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["dim"],
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        layer_norm_eps=NORM_EPS if about.norm_eps is None else about.norm_eps,
        architectures=["ViTModel"],
    )
    config.save_pretrained(folder)
    crop = weights.crop
    # ViT's own processor squashes photographs to a square; this one, DINOv2's too, keeps their shape.
    processor = BitImageProcessor(
        size={"shortest_edge": nearest(crop).resized_side},
        crop_size={"height": crop.size, "width": crop.size},
        resample=RESAMPLING[crop.interpolation],
        image_mean=list(about.mean),
        image_std=list(about.std),
    )
    processor.save_pretrained(folder)


def nearest(crop: CenterCrop) -> CenterCrop:
    """The same, of an image with one pixel more where transformers, which rounds halves down, cut it out elsewhere."""
    beside = crop.resized_side - crop.size
    if round(beside / 2) == beside // 2:
        return crop
    return dataclasses.replace(crop, fraction=crop.size / (crop.resized_side + 1))


def images(path: Path, photo: Path) -> Tensor:
    from transformers import AutoImageProcessor

    with Image.open(photo) as image:
        return AutoImageProcessor.from_pretrained(path)(image, return_tensors="pt")["pixel_values"]


def features(path: Path, architecture: Architecture, images: Tensor) -> Tensor:
    from transformers import ViTModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, found = ViTModel.from_pretrained(path, add_pooling_layer=False, output_loading_info=True)
    problems = {key: list(value) for key, value in found.items() if value}
    if problems:
        raise ValueError(f"transformers reports {problems}")
    return model.eval()(pixel_values=images).last_hidden_state[:, 0]


FORMAT = Format(
    file="model.safetensors",
    endings=(),
    write=write,
    config=write_config,
    features=features,
    images=images,
    crop=nearest,
    namings=(VIT,),
    libraries=("transformers",),
    kinds=("vit",),
    conv_stem=False,
    norm_eps=True,
    use=(
        "import torch\nfrom PIL import Image\nfrom transformers import AutoImageProcessor, ViTModel\n\n"
        "processor = AutoImageProcessor.from_pretrained('PATH')\n"
        "model = ViTModel.from_pretrained('PATH', add_pooling_layer=False)\n"
        "with torch.no_grad():\n"
        "    images = processor(Image.open('photo.jpg').convert('RGB'), return_tensors='pt')\n"
        "    features = model(**images).last_hidden_state[:, 0]"
    ),
)
