"""Which rank writes which shard, planned once: each is written by one, and those that several ranks have are shared out
by their bytes, the small ones to the first of them.

On 1,024 ranks a ViT-L has more than a million shards, so what ranks tell each other of them are arrays.

Shapes: A shards of all ranks; C different ones; D dimensions at most; R ranks; E = 1 + 2 D, the numbers of `which`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from engine.checkpoint.metadata import entry
from engine.distributed.agreement import agreement, broadcast, gather, rank, scatter
from engine.torch_internals import file_prefix, stored_chunk

SMALL = 2**16  # bytes below which a shard that several ranks have is not worth a file more to open

Tensors = dict[str, torch.Tensor]


class Written(NamedTuple):
    """Where a rank's shards lie that it wrote, in the order of its plan: the file, first byte and length of each."""

    file: str
    places: list[tuple[int, int]]


class Plan:
    """How a set of tensors is saved, of which each rank has its shards. It holds as long as names and shardings do.

    entries: of the whole tensors, as the manifest has them.
    mine: the shards that this rank writes.
    chunks: all ranks', on rank 0.
    written: by this rank at the last save; that of the next is mostly the same.
    contents: on rank 0, the table of contents that followed from what all ranks wrote then.
    """

    def __init__(self, entries: dict[str, dict[str, Any]], mine: SavePlan, chunks: "Chunks | None"):
        self.entries, self.mine, self.chunks = entries, mine, chunks
        self.written: Written | None = None
        self.contents = b""

    def written_as(self, results: list[WriteResult]) -> Written:
        found = {result.index: result.storage_data for result in results}
        places = [found[item.index] for item in self.mine.items]
        return Written(places[0].relative_path if places else "", [(place.offset, place.length) for place in places])


class Chunks(NamedTuple):
    """The different shards of all tensors, by tensors and offsets.

    whole: name, dtype and shape of each tensor. row_CE: which shards (`which`). writer_C: the rank that writes each,
    turn_C: when in its plan.
    """

    whole: list[tuple[str, torch.dtype, torch.Size]]
    row_CE: np.ndarray
    writer_C: np.ndarray
    turn_C: np.ndarray

    def table(self, written: list[Written]) -> tuple[Metadata, list[WriteResult]]:
        """DCP's table of contents, and where each chunk lies; written: by each rank."""
        tensors = {name: TensorStorageMetadata(TensorProperties(dtype=d), shape, []) for name, d, shape in self.whole}
        results, known, most = [], {}, self.row_CE.shape[1] // 2
        rows = zip(self.row_CE.tolist(), self.writer_C.tolist(), self.turn_C.tolist(), strict=True)
        for (number, *extents), writer, turn in rows:
            name, _, shape = self.whole[number]
            parts = tuple(extents[: len(shape)]), tuple(extents[most : most + len(shape)])
            offset, size = (known.setdefault(part, torch.Size(part)) for part in parts)  # a pickle has each once
            tensors[name].chunks.append(ChunkStorageMetadata(offset, size))
            file, (first, length) = written[writer].file, written[writer].places[turn]
            results.append(WriteResult(MetadataIndex(name, offset), length, stored_chunk(file, first, length)))
        return Metadata(dict(tensors)), results


def entries_of(tensors: Tensors) -> dict[str, dict[str, Any]]:
    return {name: entry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def make_plan(tensors: Tensors, group: dist.ProcessGroup | None) -> Plan:
    """All ranks of `group` call it, with the same names, whole shapes and dtypes. Raises ValueError for others."""
    entries = entries_of(tensors)
    _check_same(entries, group)
    items, turns, chunks = own_shards(tensors), None, None
    found = gather(which(items, tensors), group)
    with agreement(group):
        if found is not None:
            turns, chunks = share_out(found, tensors)
    mine = [items[number] for number in scatter(turns, group).tolist()]
    return Plan(entries, SavePlan(mine, storage_data=file_prefix(rank(group))), chunks)


def _check_same(entries: dict[str, dict], group: dist.ProcessGroup | None) -> None:
    """Ranks that save different things would write a checkpoint that fits none of them."""
    first = broadcast(entries, group)
    with agreement(group):
        different = [name for name in sorted(entries.keys() | first) if entries.get(name) != first.get(name)]
        if different:
            raise ValueError(f"all ranks must save the same tensors; {different[0]!r} is not as on rank 0")


def own_shards(tensors: Tensors) -> list[WriteItem]:
    """Those that this rank has."""
    return planner_of(tensors).create_local_plan().items


def planner_of(tensors: Tensors) -> dcp.DefaultSavePlanner:
    """DCP's own, which knows the shards of this rank."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors)
    return planner


def which(items: list[WriteItem], tensors: Tensors) -> np.ndarray:
    """int64 [shards, E]: of each the number of its tensor by name, its offsets and its sizes, zeros behind them."""
    numbers = {name: number for number, name in enumerate(sorted(tensors))}
    most = max((tensor.dim() for tensor in tensors.values()), default=0)
    rows = np.zeros((len(items), 1 + 2 * most), np.int64)
    for row, item in zip(rows, items, strict=True):
        chunk = item.tensor_data.chunk
        row[0] = numbers[item.index.fqn]
        row[1 : 1 + len(chunk.offsets)] = chunk.offsets
        row[1 + most : 1 + most + len(chunk.sizes)] = chunk.sizes
    return rows


def share_out(found: list[np.ndarray], tensors: Tensors) -> tuple[list[np.ndarray], Chunks]:
    """Who writes what. found: `which` of every rank. Returns for each rank the numbers of those of its shards that it
    writes, and the chunks that come of it. Raises ValueError where the shards do not make up the tensors."""
    whole = [(name, tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)]
    row_AE, number_A = np.concatenate(found), np.concatenate([np.arange(len(rows)) for rows in found])
    rank_A = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
    key_A = _keys(row_AE, whole)
    order_A = np.argsort(key_A, kind="stable")
    begin_C = np.flatnonzero(np.diff(key_A[order_A], prepend=-1))
    bytes_C = _bytes(row_AE[order_A[begin_C]], whole)
    chosen_C = order_A[_balanced(rank_A[order_A], begin_C, bytes_C, len(found))]

    writer_C, number_C = rank_A[chosen_C], number_A[chosen_C]
    in_turn_C = np.lexsort((number_C, writer_C))
    begin_R = np.searchsorted(writer_C[in_turn_C], np.arange(len(found)))
    turn_C = np.empty_like(writer_C)
    turn_C[in_turn_C] = np.arange(len(writer_C)) - begin_R[writer_C[in_turn_C]]
    return np.split(number_C[in_turn_C], begin_R[1:]), Chunks(whole, row_AE[chosen_C], writer_C, turn_C)


def _keys(row_AE: np.ndarray, whole: list[tuple[str, torch.dtype, torch.Size]]) -> np.ndarray:
    """int64 [A]: equal for equal shards, in the order of tensors and offsets. An empty shard may begin where its tensor
    ends, so each dimension has a place more than the tensor."""
    most = row_AE.shape[1] // 2
    begins, steps, begin = np.zeros(len(whole), np.int64), np.zeros((len(whole), most), np.int64), 0
    for number, (_, _, shape) in enumerate(whole):
        places = [extent + 1 for extent in shape]
        begins[number], begin = begin, begin + math.prod(places)
        steps[number, : len(places)] = [math.prod(places[after:]) for after in range(1, len(places) + 1)]
    return begins[row_AE[:, 0]] + (row_AE[:, 1 : 1 + most] * steps[row_AE[:, 0]]).sum(1)


def _bytes(row_CE: np.ndarray, whole: list[tuple[str, torch.dtype, torch.Size]]) -> np.ndarray:
    """float64 [C]: of each chunk. Raises ValueError where they do not make up the tensors."""
    most, dimensions = row_CE.shape[1] // 2, np.array([len(shape) for _, _, shape in whole], np.int64)
    is_size = np.arange(most) < dimensions[row_CE[:, :1]]
    values_C = np.where(is_size, row_CE[:, 1 + most :], 1).prod(1)
    for (name, _, shape), values in zip(whole, np.bincount(row_CE[:, 0], values_C, len(whole)), strict=True):
        if values != math.prod(shape):
            raise ValueError(f"all ranks' shards must make up {name!r}, and are {values:.0f} values of it")
    return values_C * np.array([dtype.itemsize for _, dtype, _ in whole], float)[row_CE[:, 0]]


def _balanced(rank_A: np.ndarray, begin_C: np.ndarray, bytes_C: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [C]: of equal shards, which lie side by side from begin_C on, the place of the one that is written.

    What one rank alone has it writes; of what several have the small goes to the first of them, so that a rank that
    needs all of that (AdamW's counts of steps) opens few files; each of the rest to the one that has least so far.
    """
    chosen_C, end_C = begin_C.copy(), np.append(begin_C[1:], len(rank_A))
    is_dealt_C = (end_C - begin_C > 1) & (bytes_C >= SMALL)
    load_R = np.bincount(rank_A[begin_C[~is_dealt_C]], bytes_C[~is_dealt_C], ranks)
    for c in np.flatnonzero(is_dealt_C).tolist():
        having = rank_A[begin_C[c] : end_C[c]]
        first = int(np.argmin(load_R[having]))
        chosen_C[c] += first
        load_R[having[first]] += bytes_C[c]
    return chosen_C
