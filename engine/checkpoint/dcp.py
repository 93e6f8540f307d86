"""Tensors to files and back by torch.distributed.checkpoint (DCP), in whatever sharding they have on each rank."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.checkpoint.manifest import Damaged
from engine.distributed.agreement import by_rank, describe, size
from engine.errors import Interrupted, UserError

_REASON = 300  # characters of what one rank says of a failure


def write(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Write each shard once, flushed to the disk. Raises UserError on every rank."""
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, overwrite=False)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _arguments(group, alone=False) as arguments:
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, **arguments)
    except CheckpointException as error:  # not an Exception; DCP raises it on every rank
        raise UserError(_reasons(error, group)) from error


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
    # FileSystemReader reads tensors by torch.load(weights_only=True). The planner's load_bytes, which would unpickle
    # freely, is never reached: read_metadata lets nothing but tensors through.
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _arguments(group, alone) as arguments:
            dcp.load(dict(tensors), storage_reader=_Reader(folder, metadata), planner=planner, **arguments)
    except CheckpointException as error:  # not an Exception; DCP raises it on every rank
        reasons = _reasons(error, group)
        for cause, _ in error.failures.values():
            if isinstance(cause, Interrupted):
                raise cause from None
        raise Damaged(folder, f"its data is refused, the tensors to fill are spoiled: {reasons}") from error


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # DCP would store the temporary path and a random id: equal states must give equal files.
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
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


@contextmanager
def _arguments(group: dist.ProcessGroup | None, alone: bool) -> Iterator[dict[str, Any]]:
    alone = alone or not dist.is_initialized()
    with warnings.catch_warnings():  # one process without a group is no reason to warn
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield {"process_group": None if alone else group, "no_dist": alone}


def _reasons(error: CheckpointException, group: dist.ProcessGroup | None) -> str:
    failures = {number: describe(cause)[:_REASON] for number, (cause, _) in error.failures.items()}
    return by_rank(failures, size(group))
