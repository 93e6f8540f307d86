"""Find the newest valid checkpoint; load any checkpoint into tensors that are sharded in any way."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from engine.checkpoint import dcp, layout
from engine.checkpoint.manifest import Damaged, Manifest, read_manifest, verify, verify_once
from engine.checkpoint.metadata import checked, entry, read_table
from engine.checkpoint.state import RunState
from engine.distributed.agreement import agreement, broadcast, rank, size
from engine.errors import UserError, listed
from engine.logger import warn

TOGETHER = 16 * 2**20  # bytes of small tensors that are read at once: each call of DCP's takes milliseconds


def newest_valid(checkpoints: Path, group: dist.ProcessGroup | None = None) -> Path | None:
    """The checkpoint of the highest step that is whole, the same on every rank; None without one.

    Rank 0 reads and compares every byte. A damaged checkpoint is set aside (step_X.damaged-1), with a warning on
    stderr; one that was set aside and is whole again gets its name back. Raises UserError, on every rank, where the
    folder cannot be listed.
    """
    checkpoints, found = Path(checkpoints), None
    with agreement(group):
        if rank(group) == 0:
            found = _search(checkpoints)
    return broadcast(found, group)


def _search(checkpoints: Path) -> Path | None:
    found = next((folder for folder in layout.checkpoint_folders(checkpoints) if _is_valid(folder)), None)
    aside = layout.damaged_folders(checkpoints)
    newer = aside if found is None else [one for one in aside if layout.step_of(one[1]) > layout.step_of(found)]
    found = next((former for path, former in newer if _is_back(path, former)), found)
    latest = layout.read_pointer(checkpoints, "latest")
    if latest is not None and not (checkpoints / latest).exists():
        warn(f"`latest` in {checkpoints} names {latest!r}, which is not there")
    return found


def _is_valid(folder: Path) -> bool:
    try:
        check_whole(folder, folder)
        return True
    except Damaged as damage:
        try:
            layout.set_aside(folder, damage.why)
        except OSError as error:
            warn(f"checkpoint {folder} is damaged: {damage.why}; it could not be set aside ({error})")
        return False


def _is_back(folder: Path, former: Path) -> bool:
    """Whether a checkpoint that was set aside is whole again; it then has its former name."""
    try:
        check_whole(folder, former)
        layout.put_back(folder, former)
        return True
    except (UserError, OSError):  # said when it was set aside
        return False


def check_whole(folder: Path, name: Path) -> None:
    """Raises UserError, mostly Damaged, where the folder is not the whole checkpoint of that name."""
    manifest = read_manifest(folder)
    if layout.step_name(manifest.step) != name.name:
        raise Damaged(folder, f"its manifest is of step {manifest.step}")
    verify(folder, manifest)


def read_state(path: Path, group: dist.ProcessGroup | None = None) -> tuple[Manifest, RunState]:
    """What a checkpoint says beside its tensors, which rank 0 reads and tells the others. Raises UserError on every
    rank."""
    said = None
    with agreement(group):
        if rank(group) == 0:
            manifest = read_manifest(path)
            said = manifest, RunState.read(path, manifest)
    return broadcast(said, group)


def load(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    ignore: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill `tensors` in place from a checkpoint of any world size and sharding.

    Every rank of `group` (gloo) calls it with the same names, in its own sharding. Every byte is compared with its
    checksum first, each rank reading a share of the files. Whole shapes and dtypes must be those saved, and every
    name must be in the checkpoint. It holds no other names, except those that begin with one of `ignore`.
    Raises UserError on every rank, before any tensor changes; if the data itself is refused while it is read,
    the error says that the tensors are spoiled.
    """
    path = Path(path)
    manifest, metadata = _open(path, group)
    with agreement(group):
        _match(path, manifest, tensors, ignore)
    dcp.read(path, metadata, tensors, group)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) for all or the given names, in order, in this process alone.

    Every byte of the checkpoint is compared first, once in a process as long as no file is touched.
    Memory: one tensor, or 16 MB of smaller ones, and one stored chunk of it at a time. Raises UserError at once for a
    damaged checkpoint or an unknown name.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_once(path, manifest)
    metadata = checked(path, read_table(path), manifest)
    names = sorted(manifest.tensors) if names is None else list(names)
    unknown = [f"{name} is not in the checkpoint" for name in names if name not in manifest.tensors]
    if unknown:
        raise UserError(_mismatch(path, unknown))
    return _few_by_few(path, names, metadata)


def _few_by_few(path: Path, names: list[str], metadata: Metadata) -> Iterator[tuple[str, torch.Tensor]]:
    for few in _groups(names, metadata):
        saved = {name: metadata.state_dict_metadata[name] for name in few}
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in saved.items()}
        dcp.read(path, metadata, tensors, None, alone=True)
        yield from tensors.items()


def _groups(names: list[str], metadata: Metadata) -> Iterator[list[str]]:
    """Names of tensors to read at once: of at most TOGETHER bytes, or one."""
    few, held = [], 0
    for name in names:
        saved = metadata.state_dict_metadata[name]
        more = saved.size.numel() * saved.properties.dtype.itemsize
        if few and held + more > TOGETHER:
            yield few
            few, held = [], 0
        few.append(name)
        held += more
    if few:
        yield few


def _open(path: Path, group: dist.ProcessGroup | None) -> tuple[Manifest, Metadata]:
    """Manifest and table of contents, which rank 0 reads, after each rank has compared its share of the files. The
    table travels as it was written, and each rank checks it: a pickle is made of it sooner than of what it says."""
    first = rank(group) == 0
    with agreement(group):
        manifest = read_manifest(path) if first else None
    manifest = broadcast(manifest, group)
    with agreement(group):
        verify(path, manifest, sorted(manifest.files)[rank(group) :: size(group)])
    with agreement(group):
        table = read_table(path) if first else None
    table = broadcast(table, group)
    with agreement(group):
        return manifest, checked(path, table, manifest)


def _match(path: Path, manifest: Manifest, tensors: dict[str, torch.Tensor], ignore: tuple[str, ...]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in tensors if name not in manifest.tensors]
    homeless = [name for name in manifest.tensors if name not in tensors and not name.startswith(ignore)]
    problems += [f"{name} of the checkpoint has no place" for name in homeless]
    for name, tensor in tensors.items():
        saved, wanted = manifest.tensors.get(name), entry(tensor.shape, tensor.dtype)
        if saved is not None and saved != wanted:
            problems.append(f"{name} is {_text(saved)} in the checkpoint, {_text(wanted)} here")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no memory to load into")
    if problems:
        raise UserError(_mismatch(path, problems))


def _mismatch(path: Path, problems: list[str]) -> str:
    return f"checkpoint ({path}) must hold exactly these tensors: {listed(problems, between='; ')}"


def _text(described: dict[str, Any]) -> str:
    return f"{described['dtype']} {described['shape']}"
