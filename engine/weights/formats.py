"""What can be exported to what, checked before any work."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.weights.weights import Weights
from models.architecture import Architecture, by_shape

PICKLES = (".pth.tar", ".pt", ".pth")
SAFETENSORS = (".safetensors",)
ENDINGS = (*SAFETENSORS, *PICKLES, ".onnx")


class Format(NamedTuple):
    """file: its name inside a folder. endings: of OUT as a single file. libraries: which write it and prove it.

    whole: both encoders and the heads, not one trunk. kinds: of trunks that fit; by_shape: a timm model counts as the
    ViT or ResNet that it is by names and shapes. conv_stem: whether a trunk with one fits.
    """

    file: str
    endings: tuple[str, ...]
    libraries: tuple[str, ...]
    whole: bool
    kinds: tuple[str, ...]
    conv_stem: bool
    by_shape: bool = True


ANY = ("vit", "resnet", "timm")
ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "timm": Format("model.safetensors", SAFETENSORS + PICKLES, ("timm",), False, ANY, False, by_shape=False),
    "torchvision": Format("model.safetensors", SAFETENSORS + PICKLES, ("torchvision",), False, ("resnet",), False),
    "moco_v3": Format("checkpoint.pth.tar", PICKLES, (), True, ("vit", "resnet"), True),
    "deit": Format("model.pt", PICKLES, (), False, ("vit",), True),
    "safetensors": Format("model.safetensors", SAFETENSORS, (), True, ANY, True, by_shape=False),
    "transformers": Format("model.safetensors", (), ("transformers",), False, ("vit",), False),
    "onnx": Format("model.onnx", (".onnx",), ONNX, False, ANY, True, by_shape=False),
}


def check_out(out: Path, name: str, force: bool) -> None:
    """Raises UserError where OUT cannot be written in this format, a library is missing, or something is there."""
    form = FORMATS[name]
    if is_file(out) and not out.name.endswith(form.endings):
        kinds = ", ".join(form.endings) or "no single file"
        raise UserError(f"OUT ({out}) must end in {kinds} for --format {name}, or be a folder; change its name")
    if out.exists() and not force:
        raise UserError(f"OUT ({out}) must not exist; pass another name, or --force to replace it")
    if out.exists() and out.is_dir() == is_file(out):
        raise UserError(f"OUT ({out}) must not be a {'folder' if out.is_dir() else 'file'}; pass another name")
    if not out.resolve().parent.is_dir():
        raise UserError(f"OUT ({out}) must lie in a folder that exists; make {out.resolve().parent}")
    missing = [library for library in form.libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"--format ({name}) must have {', '.join(missing)} installed; do `pip install -e '.[export]'`")


def is_file(out: Path) -> bool:
    return out.name.endswith(ENDINGS)


def fitting_architecture(weights: Weights, name: str, encoder: str | None) -> Architecture:
    """The trunk as the format takes it. Raises UserError where these weights have no place in it."""
    form = FORMATS[name]
    if form.whole and encoder == "momentum":
        raise UserError(f"--encoder (momentum) must be left out for --format {name}, which holds both encoders")
    if form.whole and not weights.is_whole:
        raise UserError(
            f"--format ({name}) must get both encoders and their heads; {weights.origin} holds one trunk alone"
        )
    architecture = by_shape(weights.known().architecture) if form.by_shape else weights.known().architecture
    if architecture.kind not in form.kinds:
        fitting = " or ".join(
            {"vit": "a plain ViT", "resnet": "a ResNet", "timm": "a timm model"}[k] for k in form.kinds
        )
        raise UserError(f"--format ({name}) must get {fitting}; the trunk is {architecture.name}")
    if architecture.has_conv_stem and not form.conv_stem:
        raise UserError(
            f"--format ({name}) must get a ViT without conv stem, which {name} cannot represent; "
            "use moco_v3, deit, safetensors or onnx"
        )
    return architecture
