"""transformers: a folder for Hugging Face's `ViTModel.from_pretrained`, with its image processor."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from engine.weights.format import Format, collect, metadata
from engine.weights.names import Naming
from engine.weights.weights import Weights
from models.architecture import Architecture

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
    dropped=(r"(pooler\.dense|classifier)\.(weight|bias)",),
)


def write(weights: Weights, file: Path) -> None:
    save_file(collect(weights, VIT), file, metadata=metadata(weights))


def write_config(weights: Weights, folder: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor  # an extra, and seconds to import

    about = weights.known()
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
    namings=(VIT,),
    libraries=("transformers",),
    kinds=("vit",),
    conv_stem=False,
    use=(
        "from transformers import ViTModel\n\nmodel = ViTModel.from_pretrained('PATH', add_pooling_layer=False)\n"
        "features = model(pixel_values=images).last_hidden_state[:, 0]"
    ),
)
