"""The export formats, a name for each page of this folder. Loads nothing until a page is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.weights.format import Format

NAMES = ("timm", "torchvision", "moco_v3", "deit", "safetensors", "transformers", "onnx")


def format_page(name: str) -> "Format":
    """What a format says of itself."""
    return import_module(f"engine.weights.formats.{name}").FORMAT
