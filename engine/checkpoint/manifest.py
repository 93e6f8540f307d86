"""MANIFEST.json: what a checkpoint holds, with the size and checksum of every file and of itself."""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import SystemRefused, UserError, reason
from engine.files import replace_file

NAME = "MANIFEST.json"
METADATA = ".metadata"  # torch.distributed.checkpoint's own table of contents
FORMAT = 1
SETTLED = 10.0  # seconds after a change of a file, within which another may leave its times as they are
_READERS = 8  # hashing leaves the interpreter's lock, so threads help


class Damaged(UserError):
    """A path that is no checkpoint, or one that is not as it was written."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"checkpoint ({path}) must be whole: {why}; use another checkpoint or a copy of this one")
        self.why = why


def unreadable(path: Path, error: OSError) -> SystemRefused:
    """For a checkpoint that could not be read now, for a reason that is not its own: a network, a permission."""
    return SystemRefused(f"checkpoint ({path}) must be readable: {reason(error)}; run the same command again")


@dataclass(frozen=True)
class Manifest:
    """step counts finished updates; files: {name: {"bytes", "sha256"}}; tensors: {name: {"shape", "dtype"}} of whole
    tensors, dtype as in "float32"; state: JSON of the run (engine.checkpoint.state)."""

    step: int
    world_size: int
    recipe_sha256: str
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]

    @property
    def is_float64(self) -> bool:
        """Whether weights are kept in float64, which runs of another precision do not take."""
        return any(tensor["dtype"] == "float64" for tensor in self.tensors.values())

    def sha256(self) -> str:
        """Of all that it says, and so of the checkpoint."""
        return own_checksum({"format": FORMAT, **asdict(self)})


_TYPES = {"step": int, "world_size": int, "recipe_sha256": str, "files": dict, "tensors": dict, "state": dict}


_compared: dict[Path, tuple[str, list[tuple[int, ...]]]] = {}  # by `verify_once`: each as it was found whole


def checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {"format": FORMAT, **asdict(manifest)}
    content["manifest_sha256"] = manifest.sha256()
    replace_file(folder / NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def own_checksum(content: dict[str, Any]) -> str:
    """Of the manifest without its own checksum, however it is laid out."""
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of one checkpoint folder, after the checks that cost nothing: names, presence and size of files.

    Contents of files are compared by `verify`. Raises UserError; Damaged where the fault is the checkpoint's own.
    """
    path = Path(path)
    manifest = _parse(path)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    extra = {file.name for file in path.glob("*.distcp")} - set(manifest.files)
    if extra:
        raise Damaged(path, f"{min(extra)} is not in {NAME}")
    if METADATA not in manifest.files:
        raise Damaged(path, f"{NAME} does not list {METADATA}")
    return manifest


def _parse(path: Path) -> Manifest:
    if not path.is_dir():
        raise Damaged(path, "it is not a folder" if path.exists() else "there is no such folder")
    try:
        _regular(path / NAME)
        content = json.loads((path / NAME).read_bytes())
    except FileNotFoundError:
        raise Damaged(path, f"it has no {NAME}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"{NAME} cannot be read ({error})") from error
    if not isinstance(content, dict) or any(type(content.get(key)) is not kind for key, kind in _TYPES.items()):
        raise Damaged(path, f"{NAME} lacks {', '.join(_TYPES)} or holds something else there")
    if content.get("format") != FORMAT:
        raise Damaged(path, f"its format is {content.get('format')!r}, not {FORMAT}")
    if content.get("manifest_sha256") != own_checksum(content):
        raise Damaged(path, f"{NAME} does not match its own checksum")
    return Manifest(**{key: content[key] for key in _TYPES})


def _check_file(path: Path, name: str, entry: Any) -> None:
    if name in ("", ".", "..", NAME) or any(character in name for character in "/\\\0"):
        raise Damaged(path, f"{NAME} lists {name!r}, which is no file of this folder")
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
        raise Damaged(path, f"{NAME} lacks size or checksum of {name}")
    try:
        found = _regular(path / name)
    except FileNotFoundError:
        raise Damaged(path, f"{name} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise Damaged(path, f"{name} cannot be read ({error})") from error
    if found != entry["bytes"]:
        raise Damaged(path, f"{name} has {found} bytes instead of {entry['bytes']}")


def _regular(file: Path) -> int:
    """Size of a plain file: a link may leave the folder, a pipe would never end."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is not a plain file")
    return status.st_size


def verify(path: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare the contents of all files (or of those named) with their checksums. Raises Damaged, or UserError."""
    path, names = Path(path), list(manifest.files if names is None else names)
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            found = list(readers.map(lambda name: checksum(path / name), names))
    except OSError as error:
        raise unreadable(path, error) from error
    for name, entry in zip(names, found, strict=True):
        if entry != manifest.files[name]:
            raise Damaged(path, f"{name} does not match its checksum")


def verify_once(path: Path, manifest: Manifest) -> None:
    """`verify` all files, unless this process has done so and none of them was touched since."""
    looked = time.time()
    try:
        traces = [_trace(path / name) for name in manifest.files]
    except OSError as error:
        raise unreadable(path, error) from error
    key, found = path.resolve(), (manifest.sha256(), traces)
    if _compared.get(key) == found:
        return
    verify(path, manifest)
    if max(changed for *_, changed in traces) < (looked - SETTLED) * 1e9:
        _compared[key] = found


def _trace(file: Path) -> tuple[int, ...]:
    """What differs once a file was touched; last, when it changed, in ns. Of an open file: what a network file system
    says of others may be old."""
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
