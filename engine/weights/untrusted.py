"""Open other people's files without trusting them: tensors, text and numbers come out, or a one-line error."""

import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from engine.errors import UserError, one_line, reason

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_ADVICE = "use an intact copy, or another file"
_ALONE = "save its tensors alone (its state_dict) where it can be opened, or use another file"


@dataclass(frozen=True)
class Opened:
    """content: what a pickle holds, or the metadata of a safetensors file. tensors: of a safetensors file, by name."""

    content: Any
    tensors: Mapping[str, Callable[[], Tensor]] | None
    shapes: Mapping[str, torch.Size] | None


class Inert:
    """What argparse's settings and NumPy's numbers become, which many save beside tensors: objects without content."""

    def __init__(self, *said: object):
        """Forgets it."""

    def __setstate__(self, state: object) -> None:
        """Forgets it."""


_NUMPY = [f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("scalar", "_reconstruct")]
_INERT = ["argparse.Namespace", "numpy.dtype", "numpy.ndarray", *_NUMPY]


def open_file(path: Path) -> Opened:
    """A safetensors file (whatever its name) or a pickle of torch.save. Data is mapped, not read, where that can be.

    Raises UserError: no plain file, neither of the two, truncated, a pickle that asks for more than tensors and plain
    values, or one that claims more data than the file has.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"file ({path}) must be a plain file; pass one")
        with path.open("rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:
        raise UserError(f"file ({path}) must be readable: {reason(error)}; pass the path of one") from None
    if len(head) == 9 and head[8:] == b"{":
        return _open_safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return Opened(_unpickle(path, zipped=head.startswith(_ZIP)), None, None)
    raise _refused(path, "it begins like neither a safetensors file nor one of torch.save")


def _refused(path: Path, why: str, do: str = _ADVICE) -> UserError:
    return UserError(f"file ({path}) must hold weights: {why}; {do}")


def _open_safetensors(path: Path) -> Opened:
    try:
        file = safe_open(path, "pt")
        shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return Opened(file.metadata() or {}, {name: _getter(path, file, name) for name in shapes}, shapes)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _refused(path, f"it is no intact safetensors file ({one_line(error)})") from None


def _getter(path: Path, file: Any, name: str) -> Callable[[], Tensor]:
    def get() -> Tensor:
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _refused(path, f"{name} cannot be read ({one_line(error)})") from None

    return get


def _unpickle(path: Path, zipped: bool) -> Any:
    if zipped:
        _check_archive(path)
    try:
        # Musings on odd pickles are torch's; of what is inert nothing but its place is kept.
        with warnings.catch_warnings(action="ignore"), safe_globals([(Inert, name) for name in _INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise _refused(path, _reason(error), _ALONE) from None
    except MemoryError:
        raise _refused(path, "it claims more data than this machine can hold") from None
    except Exception as error:  # unpickling hostile bytes may raise anything
        raise _refused(path, f"it is truncated or damaged ({_reason(error)})") from None
    _check_claims(path, content)
    return content


def _check_archive(path: Path) -> None:
    """torch.save compresses nothing, so no honest entry is larger inside than the file is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _refused(path, f"it is truncated or damaged ({one_line(error)})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _refused(path, "it is a compressed archive, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _refused(path, "its entries claim more data than the file has")


def _reason(error: BaseException) -> str:
    """torch explains a refused pickle in a page, with advice not to follow; the reason is one sentence of it."""
    text = one_line(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"its pickle asks for {found[1]}, and only tensors and plain values are taken from a pickle"
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"WeightsUnpickler error: (.{1,100}?)(?= Check the documentation|$)", text)
        detail = f" ({found[1]})" if found else ""
        return f"its pickle asks for more than tensors and plain values{detail}"
    return text[:200] or type(error).__name__


def _check_claims(path: Path, content: Any) -> None:
    """A view can claim any size without having it (stride 0); tensors with data of their own cannot."""
    limit, waiting, seen = path.stat().st_size, [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise _refused(path, "it holds a tensor that is sparse, quantized or without data")
            if value.numel() * value.element_size() > limit:
                raise _refused(path, f"it claims a tensor of shape {list(value.shape)}, more than the file has")
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
