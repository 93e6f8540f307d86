"""Read DCP's `.metadata`, a pickle, without trusting it.

A checksum is no signature: whoever can write a checkpoint can write its manifest too. So the pickle may name only the
classes of DCP's table of contents, and even those are replaced by inert records while it is read; what comes out is
checked against the manifest and only then turned into the classes that DCP's reader works with.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine.checkpoint.manifest import METADATA, Damaged, Manifest
from engine.errors import one_line
from engine.torch_internals import stored_chunk

_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILESYSTEM, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


# DCP's BytesStorageMetadata is missing on purpose: it stands for an object that DCP would unpickle freely.


class _Record:
    """Stands for any of these classes: takes whatever a pickle gives it, and does nothing with it."""

    def __init__(self, *arguments: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint")


def read_table(path: Path) -> bytes:
    """The table of contents of a checkpoint, as it was written. Raises UserError (Damaged)."""
    try:
        return (path / METADATA).read_bytes()
    except OSError as error:
        raise _refused(path, error) from error


def checked(path: Path, table: bytes, manifest: Manifest) -> Metadata:
    """What the table of contents says of a checkpoint whose manifest was read. Raises UserError (Damaged)."""
    try:
        return _checked(_Unpickler(io.BytesIO(table)).load().state, manifest)
    except Exception as error:  # unpickling hostile bytes may raise anything
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> Damaged:
    return Damaged(path, f"{METADATA} is refused ({one_line(error) or type(error).__name__})")


def _checked(content: dict[str, Any], manifest: Manifest) -> Metadata:
    tensors, stored = content["state_dict_metadata"], {}
    if set(tensors) != set(manifest.tensors):
        raise ValueError("its tensors are not those of the manifest")
    for index, info in content["storage_data"].items():
        key = MetadataIndex(index.state["fqn"], _extents(index.state["offset"]))
        stored[key] = _place(info.state, manifest)
    checked = {name: _tensor(name, record.state, manifest, stored) for name, record in tensors.items()}
    return Metadata(checked, storage_data=stored)


def _place(info: dict[str, Any], manifest: Manifest) -> Any:
    """Where one chunk lies: inside a file that the manifest lists, as plain bytes."""
    file, offset, length = info["relative_path"], info["offset"], info["length"]
    if file not in manifest.files:
        raise ValueError(f"it refers to {file!r}, which is no file of the manifest")
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise ValueError("an offset or length is no count of bytes")
    if offset + length > manifest.files[file]["bytes"]:
        raise ValueError(f"it refers to bytes behind the end of {file}")
    if info.get("transform_descriptors"):
        raise ValueError("it asks for a transformation of the stored bytes")
    return stored_chunk(file, offset, length)


def _tensor(name: str, record: Any, manifest: Manifest, stored: dict[MetadataIndex, Any]) -> TensorStorageMetadata:
    """One tensor, whose chunks must be stored, lie inside it and add up to it."""
    shape, dtype = _extents(record["size"]), record["properties"].state[0]
    chunks = [ChunkStorageMetadata(_extents(c.state["offsets"]), _extents(c.state["sizes"])) for c in record["chunks"]]
    if not isinstance(dtype, torch.dtype) or manifest.tensors[name] != entry(shape, dtype):
        raise ValueError(f"shape or dtype of {name} is not that of the manifest")
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise ValueError(f"a chunk of {name} has another number of dimensions")
        if any(start + extent > end for start, extent, end in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise ValueError(f"a chunk of {name} lies outside of it")
        if MetadataIndex(name, chunk.offsets) not in stored:
            raise ValueError(f"a chunk of {name} is not stored")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of {name} do not add up to it")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)


def _extents(value: Any) -> torch.Size:
    if type(value) is not tuple or any(type(extent) is not int or extent < 0 for extent in value):
        raise ValueError(f"{value!r} is no shape")
    return torch.Size(value)


def entry(shape: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    """A tensor as the manifest describes it."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
