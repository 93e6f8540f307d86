"""Tensors to files and back by torch.distributed.checkpoint (DCP), in whatever sharding they have on each rank."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.checkpoint.manifest import METADATA, Damaged
from engine.checkpoint.plan import Plan, planner_of
from engine.distributed.agreement import agreement, all_gather, by_rank, describe, gather, rank
from engine.errors import Interrupted
from engine.files import naming, replace_file

_REASON = 300  # characters of what one rank says of a failure

Shards = dict[MetadataIndex, torch.Tensor]  # of this rank, those that it writes


def shards_of(tensors: dict[str, torch.Tensor], plan: Plan) -> Shards:
    """What this rank writes, in the tensors' own memory."""
    planner = planner_of(tensors)
    return {item.index: planner.lookup_object(item.index).detach() for item in plan.mine.items}


def write(folder: Path, plan: Plan, shards: Shards, group: dist.ProcessGroup | None) -> None:
    """Write each shard once, flushed to the disk. Raises SystemRefused, on every rank."""
    # Copied ahead of writing, shards would wait for the device's training.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, overwrite=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(rank(group) == 0)
    with agreement(group):
        written = plan.written_as(writer.write_data(plan.mine, _Given(shards)).wait())
    if all(all_gather(written == plan.written, group)):
        with agreement(group):
            if rank(group) == 0:
                replace_file(folder / METADATA, plan.contents)
        return
    found = gather(written, group)
    with agreement(group), naming(folder):
        if found is not None:
            table, results = plan.chunks.table(found)
            writer.finish(table, [results])
            plan.contents = (folder / METADATA).read_bytes()
    plan.written = written


class _Given(dcp.DefaultSavePlanner):
    """Hands the writer shards that lie ready."""

    def __init__(self, shards: Shards):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.shards[index]


def read(
    folder: Path,
    metadata: Metadata,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    alone: bool = False,
) -> None:
    """Fill the tensors from the files that a checked table of contents names; alone: this process without the others.

    Raises Damaged on every rank, or Interrupted where one was asked to stop; the tensors are then spoiled.
    """
    failure = _failure(folder, metadata, tensors)
    failures = dict(enumerate([failure] if alone else all_gather(failure, group)))
    for stop in failures.values():
        if isinstance(stop, Interrupted):
            raise stop
    if said := {number: text for number, text in failures.items() if text is not None}:
        reasons = by_rank(said, len(failures))
        raise Damaged(folder, f"its data is refused, the tensors to fill are spoiled: {reasons}")


def _failure(folder: Path, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> str | Interrupted | None:
    """Why this rank could not fill its tensors; each reads for itself, as nothing about it is to be agreed on."""
    # FileSystemReader reads tensors by torch.load(weights_only=True). The planner's load_bytes, which would unpickle
    # freely, is never reached: a checked table of contents names nothing but tensors.
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():  # to read alone is no reason to warn
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(dict(tensors), storage_reader=_Reader(folder, metadata), planner=planner, no_dist=True)
    except Interrupted as stop:
        return stop
    except CheckpointException as error:  # not an Exception
        cause = next(iter(error.failures.values()))[0]
        return cause if isinstance(cause, Interrupted) else describe(cause)[:_REASON]
    return None


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # DCP would store the temporary path and a random id: equal states must give equal files.
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with naming(self.path):
            try:
                return super().write_data(plan, planner)
            except Exception as error:
                # torch.save hides "No space left on device" behind "enforce fail ... unexpected pos".
                if (cause := _os_error(error)) is None:
                    raise
                raise cause from None


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind an error, where there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _Reader(dcp.FileSystemReader):
    """DCP's reader, given a table of contents that was read safely: its own would unpickle anything."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata
