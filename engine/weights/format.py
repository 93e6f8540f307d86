"""What an export format says of itself: each file of formats/ ends in one `FORMAT`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.data.decode import CenterCrop
from engine.weights.names import Naming
from engine.weights.weights import MARK, Weights
from models.architecture import Architecture

PICKLES = (".pth.tar", ".pt", ".pth")
SAFETENSORS = (".safetensors",)


BY_US = (
    "import engine\nfrom PIL import Image\n\nencoder = engine.load('PATH')\n"
    "features = encoder(encoder.transform(Image.open('photo.jpg'))[None])"
)


def read_by_us(path: Path, architecture: Architecture, images: Tensor) -> None:
    """`Format.features` of a format that no other library loads."""


def no_transform(path: Path, photo: Path) -> None:
    """`Format.images` of a format whose library is not told how images are made ready."""


def the_same(crop: CenterCrop) -> CenterCrop:
    """`Format.crop` of a library that can cut out of photographs what evaluation does."""
    return crop


def nothing(weights: Weights, folder: Path) -> None:
    """`Format.config` of a format whose weights stand alone."""


@dataclass(frozen=True)
class Format:
    """A format that weights are written in.

    file: their name inside a folder. endings: of OUT as a single file; () where it must be a folder.
    write: the weights into a file. config: what else a folder holds, but for the model card. use: Python for that card,
        from photo.jpg to `features`; PATH, ARCH and TRANSFORM stand for the folder, the network's name and lines that
        make `image` [1, 3, S, S].
    features: [B, D] (logits where the weights have a head) of images [B, 3, S, S], by the library that the format is
        for, from the file or folder; None where this project's own reader is the one that loads it.
    images: [1, 3, S, S] of an image file, by that library's own transform and what the export says of it; None where it
        says nothing. crop: the nearest to evaluation's that it can make.
    namings: in which tensors are written; () where no tensors can be read back.
    libraries: which write it and load it. whole: both encoders and the heads, not one trunk.
    kinds: of trunks that fit; by_shape: a timm model counts as the ViT or ResNet that it is by names and shapes.
    conv_stem: whether a trunk with one fits. norm_eps: whether it can say another eps of LayerNorms than the usual.
    """

    file: str
    endings: tuple[str, ...]
    write: Callable[[Weights, Path], None]
    use: str
    config: Callable[[Weights, Path], None] = nothing
    features: Callable[[Path, Architecture, Tensor], Tensor | None] = read_by_us
    images: Callable[[Path, Path], Tensor | None] = no_transform
    crop: Callable[[CenterCrop], CenterCrop] = the_same
    namings: tuple[Naming, ...] = ()
    libraries: tuple[str, ...] = ()
    whole: bool = False
    kinds: tuple[str, ...] = ("vit", "resnet", "timm")
    by_shape: bool = True
    conv_stem: bool = True
    norm_eps: bool = False

    def file_in(self, path: Path) -> Path:
        """The weights of an export: a folder's file, or the file itself."""
        return path / self.file if path.is_dir() else path


def collect(weights: Weights, naming: Naming, keep_dtype: bool = False) -> dict[str, Tensor]:
    """Every tensor under the naming's names, each in memory of its own; float64 becomes float32 unless it is kept."""
    tensors, taken = {}, set()
    for name, tensor in weights.read(list(weights.shapes)):
        theirs = naming.theirs(name)
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


def metadata(weights: Weights) -> dict[str, str]:
    """What safetensors and ONNX files say of themselves."""
    return {"format": "pt", MARK: weights.known().to_json()}
