"""Tensors to files and back by torch.distributed.checkpoint (DCP), in whatever sharding they have on each rank."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engine.checkpoint.manifest import Damaged
from engine.checkpoint.metadata import entry
from engine.distributed.agreement import agreement, broadcast, by_rank, describe, gather, rank, scatter, size
from engine.errors import Interrupted
from engine.files import naming

_REASON = 300  # characters of what one rank says of a failure

Shards = dict[MetadataIndex, torch.Tensor]  # of this rank, those that it writes


class Plan(NamedTuple):
    """How a set of tensors is saved, of which each rank has its shards. It holds as long as names and shardings do.

    entries: of the whole tensors, as the manifest has them.
    mine: the shards that this rank writes; each is written by one.
    table: of contents, all ranks', on rank 0.
    """

    entries: dict[str, dict[str, Any]]
    mine: SavePlan
    table: Metadata | None


def entries_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {name: entry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def make_plan(tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> Plan:
    """All ranks of `group` call it, with the same names, whole shapes and dtypes. Raises ValueError for others."""
    entries = entries_of(tensors)
    _check_same(entries, group)
    planner, shares, table = _planner(), None, None
    planner.set_up_planner(tensors, is_coordinator=rank(group) == 0)
    plans = gather(planner.create_local_plan(), group)
    with agreement(group):
        if plans is not None:
            shares, table = planner.create_global_plan(plans)
            shares = _Writer(Path()).prepare_global_plan(shares)  # the names of files, the same in any folder
    return Plan(entries, scatter(shares, group), table)


def _check_same(entries: dict[str, dict], group: dist.ProcessGroup | None) -> None:
    """Ranks that save different things would write a checkpoint that fits none of them."""
    first = broadcast(entries, group)
    with agreement(group):
        different = [name for name in sorted(entries.keys() | first) if entries.get(name) != first.get(name)]
        if different:
            raise ValueError(f"all ranks must save the same tensors; {different[0]!r} is not as on rank 0")


def shards_of(tensors: dict[str, torch.Tensor], plan: Plan) -> Shards:
    """What this rank writes, in the tensors' own memory."""
    planner = _planner()
    planner.set_up_planner(tensors)
    return {item.index: planner.lookup_object(item.index).detach() for item in plan.mine.items}


def write(folder: Path, plan: Plan, shards: Shards, group: dist.ProcessGroup | None) -> None:
    """Write each shard once, flushed to the disk. Raises SystemRefused, on every rank."""
    # Copied ahead of writing, shards would wait for the device's training.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, overwrite=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(rank(group) == 0)
    with agreement(group):
        mine = writer.write_data(plan.mine, _Given(shards)).wait()
    results = gather(mine, group)
    with agreement(group), naming(folder):
        if results is not None:
            writer.finish(plan.table, results)


def _planner() -> dcp.DefaultSavePlanner:
    return dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


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


@contextmanager
def _arguments(group: dist.ProcessGroup | None, alone: bool) -> Iterator[dict[str, Any]]:
    alone = alone or not dist.is_initialized()
    with warnings.catch_warnings():  # one process without a group is no reason to warn
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield {"process_group": None if alone else group, "no_dist": alone}


def _reasons(error: CheckpointException, group: dist.ProcessGroup | None) -> str:
    failures = {number: describe(cause)[:_REASON] for number, (cause, _) in error.failures.items()}
    return by_rank(failures, size(group))
