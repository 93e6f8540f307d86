"""The proof of an export: its own library loads it, and its features are those of the source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import RunFailed, one_line
from engine.weights.memory import peak_bytes
from engine.weights.reading import read_weights
from engine.weights.weights import EncoderName, Weights, fill_trunk

TOLERANCE = 1e-4  # of the largest feature; another head count or position order differs by a tenth and more
BATCH = 3


def prove(
    open_source: Callable[[], Weights], encoder: EncoderName, name: str, path: Path, architecture: Any
) -> dict[str, float]:
    """Compare the export at `path` with its source.

    Returns max_feature_difference (largest difference over the largest feature) and peak_bytes of this process.
    Raises RunFailed where they differ or the library refuses the export.
    """
    source = open_source()
    trunk = source.trunk(encoder)
    size = trunk.about.image_size
    images = torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours_ND = _run(fill_trunk(trunk), images)
    if not (ours_ND[0] - ours_ND[1]).abs().max() > 0:
        raise RunFailed("the source's features are the same for every image, or not finite: an export proves nothing")
    try:
        theirs_ND = LOADERS[name](path, architecture, images)
        if name in ("moco_v3", "safetensors"):
            _check_bits(source, read_weights(path), keep_dtype=name == "safetensors")
    except Exception as error:  # whatever a library has to say against a file
        raise RunFailed(f"the export to {name} was refused by its own reader: {one_line(error)[:500]}") from error
    difference = ((theirs_ND - ours_ND).abs().max() / ours_ND.abs().max()).item()
    if not difference <= TOLERANCE:  # not-a-number too
        raise RunFailed(
            f"the export to {name} has other features than its source: the largest difference is {difference:.1e} "
            f"of the largest feature, where {TOLERANCE} is allowed; nothing was written"
        )
    return {"max_feature_difference": difference, "peak_bytes": peak_bytes()}


@torch.no_grad()
def _run(network: nn.Module, images: Tensor) -> Tensor:
    return network.eval()(images)


def _check_bits(source: Weights, written: Weights, keep_dtype: bool) -> None:
    """Formats of all weights give back every tensor as it was."""
    if source.shapes.keys() != written.shapes.keys():
        raise ValueError("it holds other tensors than its source")
    names = list(source.shapes)
    for (name, one), (_, two) in zip(source.read(names), written.read(names), strict=True):
        expected = one if keep_dtype or one.dtype != torch.float64 else one.float()
        if expected.dtype != two.dtype or not torch.equal(expected, two):
            raise ValueError(f"{name} is not as in its source")


def _timm(path: Path, _: Any, images: Tensor) -> Tensor:
    import timm

    if path.is_dir():
        return _run(timm.create_model(f"local-dir:{path}", pretrained=True), images)
    content = _metadata(path)
    model = timm.create_model(content["architecture"], **content["model_args"])
    timm.models.load_checkpoint(model, str(path), strict=True)
    return _run(model, images)


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True, mmap=True)
    from safetensors import safe_open

    content = safe_open(path, "pt").metadata()
    return content | {"model_args": json.loads(content["model_args"])}


def _torchvision(path: Path, architecture: Any, images: Tensor) -> Tensor:
    from torchvision.models.resnet import Bottleneck, ResNet

    arguments = architecture.arguments
    model = ResNet(Bottleneck, arguments["layers"], width_per_group=arguments["width_per_group"])
    model.fc = nn.Identity()
    file = path / "model.safetensors" if path.is_dir() else path
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    model.load_state_dict(tensors, strict=True)
    return _run(model, images)


def _deit(path: Path, architecture: Any, images: Tensor) -> Tensor:
    """DeiT's networks are timm's; a conv stem is ours alone."""
    if architecture.has_conv_stem:
        return _reread(path, architecture, images)
    from timm.models.vision_transformer import VisionTransformer

    content = torch.load(path / "model.pt" if path.is_dir() else path, weights_only=True)
    model = VisionTransformer(**content["model_args"], num_classes=0)
    model.load_state_dict(content["model"], strict=True)
    return _run(model, images)


def _transformers(path: Path, _: Any, images: Tensor) -> Tensor:
    from transformers import ViTModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, found = ViTModel.from_pretrained(path, add_pooling_layer=False, output_loading_info=True)
    problems = {key: list(value) for key, value in found.items() if value}
    if problems:
        raise ValueError(f"transformers reports {problems}")
    with torch.no_grad():
        return model.eval()(pixel_values=images).last_hidden_state[:, 0]


def _onnx(path: Path, _: Any, images: Tensor) -> Tensor:
    import onnxruntime

    file = path / "model.onnx" if path.is_dir() else path
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batches = [images[:1], images[1:]]  # of two sizes
    return torch.cat([torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in batches])


def _reread(path: Path, _: Any, images: Tensor) -> Tensor:
    return _run(fill_trunk(read_weights(path).trunk("base")), images)


LOADERS: dict[str, Callable[[Path, Any, Tensor], Tensor]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "moco_v3": _reread,
    "deit": _deit,
    "safetensors": _reread,
    "transformers": _transformers,
    "onnx": _onnx,
}
