"""Which rank writes which shard: laws of any ranks, for which no process is needed."""

import errno
import os

import numpy as np
import pytest
import torch

from engine.checkpoint import dcp
from engine.checkpoint.background import Saver
from engine.checkpoint.load import load
from engine.checkpoint.plan import SMALL, Chunks, share_out
from engine.checkpoint.save import SaveFailed
from tests.checkpoint.examples import SHA, blank, example_state, example_tensors, same

TENSORS = {
    "matrix": torch.zeros(10, 3),
    "alone": torch.zeros(()),
    "columns": torch.zeros(4, 7),
    "nothing": torch.zeros(0, 4),
    "row": torch.zeros(2, dtype=torch.float64),
}
DIMENSIONS = 2


def row(name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> list[int]:
    """As `which` has a shard."""
    filled = [[*extents, *[0] * (DIMENSIONS - len(extents))] for extents in (offset, size)]
    return [sorted(TENSORS).index(name), *filled[0], *filled[1]]


def spread(name: str, ranks: int, rank: int, axis: int = 0) -> list[int]:
    """The shard of a rank of so many; those behind the end are empty, and begin there."""
    shape = list(TENSORS[name].shape)
    most = -(-shape[axis] // ranks)
    start, end = (min(shape[axis], most * number) for number in (rank, rank + 1))
    offset, size = [0] * len(shape), shape
    offset[axis], size[axis] = start, end - start
    return row(name, tuple(offset), tuple(size))


def shards_of(rank: int, shards: int) -> np.ndarray:
    """Of a rank of two replicas or more, each of `shards` ranks; `alone` and `row` are whole on each."""
    own = rank % shards
    rows = [spread("matrix", shards, own), row("alone", (), ()), spread("columns", shards, own, axis=1)]
    return np.array([*rows, spread("nothing", shards, own), row("row", (0,), (2,))])


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 4), (2, 3), (5, 1), (3, 16)])
def test_each_shard_is_written_once_by_one_that_has_it(replicas, shards):
    found = [shards_of(rank, shards) for rank in range(replicas * shards)]
    turns, chunks = share_out(found, TENSORS)
    written = [tuple(found[rank][number]) for rank, numbers in enumerate(turns) for number in numbers]
    assert len(written) == len(set(written))
    assert set(written) == {tuple(one) for rows in found for one in rows}
    for which, writer, turn in zip(chunks.row_CE, chunks.writer_C, chunks.turn_C, strict=True):
        assert found[writer][turns[writer][turn]].tolist() == which.tolist()
    assert chunks.row_CE[:, :3].tolist() == sorted(chunks.row_CE[:, :3].tolist()), "by tensors and offsets"


def test_copies_are_shared_out_by_their_bytes():
    """Ten tensors on ten ranks: one has all to itself, and writes none of the others."""
    tensors = {f"t{k}": torch.zeros(SMALL, device="meta") for k in range(10)}
    tensors["u"] = torch.zeros(8 * SMALL, device="meta")
    copies = [[k, 0, SMALL] for k in range(10)]
    found = [np.array([*copies, [10, 0, 8 * SMALL]]), *[np.array(copies)] * 10]
    turns, _ = share_out(found, tensors)
    assert [len(numbers) for numbers in turns] == [1] * 11
    assert turns[0].tolist() == [10]


def test_a_rank_opens_few_files_to_resume():
    """As of a ViT-L's: matrices that are spread, many counts that all ranks have, and one matrix that they have too.
    Spread out over all files, the counts would have every rank open each."""
    ranks, counts = 256, 360
    tensors = {f"count{k:03}": torch.zeros((), device="meta") for k in range(counts)}
    tensors |= {name: torch.zeros(ranks, SMALL, device="meta") for name in ("matrix0", "matrix1", "whole")}
    first = sorted(tensors).index("matrix0")
    copies = [*([k, 0, 0, 0, 0] for k in range(counts)), [first + 2, 0, 0, ranks, SMALL]]
    found = [np.array([*copies, *([first + k, rank, 0, 1, SMALL] for k in (0, 1))]) for rank in range(ranks)]
    _, chunks = share_out(found, tensors)
    writer = {tuple(row): rank for row, rank in zip(chunks.row_CE.tolist(), chunks.writer_C.tolist(), strict=True)}
    opened = [{writer[tuple(row)] for row in rows.tolist()} for rows in found]
    assert max(map(len, opened)) <= 3, "its own, and those with the counts and with the matrix"
    assert {rank in files for rank, files in enumerate(opened)} == {True}


def test_copies_that_all_ranks_have_lie_evenly_all_the_same():
    """As of a ViT-L's with parallel.shard=replicate: the rank with what is small gets less of what is large."""
    ranks, blocks = 16, 96
    tensors = {f"matrix{k:02}": torch.zeros(1024, 1024, device="meta") for k in range(blocks)}
    tensors |= {f"vector{k:03}": torch.zeros(1024, device="meta") for k in range(8 * blocks)}
    shapes = [(1024, 1024)] * blocks + [(1024, 0)] * 8 * blocks
    found = [np.array([[k, 0, 0, *shape] for k, shape in enumerate(shapes)])] * ranks
    turns, _ = share_out(found, tensors)
    megabytes = [sum(4 if number < blocks else 2**-8 for number in numbers) for numbers in turns]
    assert max(megabytes) - min(megabytes) <= 4, "no more than a matrix"


def test_what_ranks_have_must_make_up_the_tensors():
    found = [shards_of(rank, 4) for rank in range(3)]
    with pytest.raises(ValueError, match=r"^all ranks' shards must make up 'columns', and are 24 values of it$"):
        share_out(found, TENSORS)


def test_the_table_of_contents_is_made_once(tmp_path, monkeypatch):
    """On many ranks it takes long. Where it could not be made it is made again, where not be written it is kept."""
    calls, own, full = [], Chunks.table, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: object) -> None:
        calls.append("refused")
        raise full

    def table(self, written):
        calls.append("made")
        return own(self, written)

    with Saver(tmp_path, SHA) as saver:
        for step, made in ((1, refuse), (2, table), (3, refuse), (4, refuse)):
            tensors = example_tensors()
            tensors["model.bias"].add_(step)
            with monkeypatch.context() as patched:
                patched.setattr(Chunks, "table", made)
                if step == 3:
                    patched.setattr(dcp, "replace_file", refuse)
                saver.start(tensors, example_state(step))
                if step in (1, 3):
                    with pytest.raises(SaveFailed, match="No space left"):
                        saver.wait()
                    assert not (tmp_path / f"step_{step:07}").exists()
                    continue
                saver.wait()
            found = blank(tensors)
            load(tmp_path / f"step_{step:07}", found)
            assert all(same(found[name], tensors[name]) for name in tensors)
    assert calls == ["refused", "made", "refused"]
    assert len({(tmp_path / f"step_{step:07}/.metadata").read_bytes() for step in (2, 4)}) == 1
