"""Files of weights to test with, and what is done with all of them."""

from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from engine.weights.formats.table import format_page
from engine.weights.opening import open_trunk
from engine.weights.read import read_weights
from engine.weights.weights import EncoderName, fill_trunk

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHAPE = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2}
PUBLISHED = [GOLDEN / "I_vit_small_shape.pth.tar", GOLDEN / "I_vit_conv_small_shape.pth.tar"]


def trunk_of(checkpoint: Path, encoder: EncoderName = "base") -> nn.Module:
    return fill_trunk(open_trunk(str(checkpoint), encoder))


def write(file: Path, name: str, source: Path, encoder: EncoderName = "base") -> Path:
    """The weights of a file in another format, without proof."""
    weights = read_weights(source)
    format_page(name).write(weights if format_page(name).whole else weights.trunk(encoder), file)
    return file


def state_dict(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Names, their order, types, and every bit."""
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


def small_vit(heads: int, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", num_heads=heads, **SHAPE, **{"num_classes": 0} | more).eval()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def photograph() -> Image.Image:
    coarse = torch.randint(0, 256, (9, 13, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(coarse.numpy()).resize((1300, 650), Image.Resampling.BICUBIC)
