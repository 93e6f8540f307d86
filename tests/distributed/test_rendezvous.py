"""The ranks of a start find each other in a store that remembers earlier ones."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.distributed.rendezvous import of_this_start
from engine.errors import RunFailed

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=0.2)


def meet(store: dist.Store, ranks: int) -> list[bytes]:
    """One start; what every rank reads of a word that rank 0 has left for it, afterwards."""
    with ThreadPoolExecutor(ranks) as pool:
        found = [pool.submit(of_this_start, store, rank, ranks, LONG) for rank in range(ranks)]
        stores = [one.result() for one in found]
    for rank, own in enumerate(stores):
        own.set(f"word/{rank}", str(rank))
    return [stores[rank - 1].get(f"word/{rank}") for rank in range(ranks)]


def test_each_start_has_a_name_of_its_own():
    store = dist.HashStore()
    for _ in range(3):
        assert meet(store, 4) == [b"0", b"1", b"2", b"3"]
    assert of_this_start(store, 0, 1, SHORT).check(["word/0"]) is False


def test_what_dead_ranks_left_is_nobodys():
    """Some asked and nobody answered; some were answered and did not hear it; rank 0 went first, or last."""
    store = dist.HashStore()
    with pytest.raises(RunFailed, match=r"^rank 0 did not come within 0:00:00.2.*; the same command starts again$"):
        of_this_start(store, 1, 3, SHORT)
    with pytest.raises(RunFailed, match=r"^ranks 1, 2 did not come within 0:00:00.2"):
        of_this_start(store, 0, 3, SHORT)
    with pytest.raises(RunFailed, match="rank 0 did not come"):
        of_this_start(store, 2, 3, SHORT)
    assert meet(store, 3) == [b"0", b"1", b"2"]
    assert meet(store, 2) == [b"0", b"1"], "fewer ranks than before"
