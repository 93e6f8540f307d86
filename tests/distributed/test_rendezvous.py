"""The ranks of a start find each other in a store that remembers earlier ones."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from engine.distributed import rendezvous, world
from engine.distributed.rendezvous import of_this_start
from engine.distributed.roll import lost_ranks
from engine.distributed.world import process_group
from engine.errors import RunFailed, UserError

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.2)


def meet(store: dist.Store, ranks: int) -> list[bytes]:
    """One start; what every rank reads of a word that rank 0 has left for it, afterwards."""
    with ThreadPoolExecutor(ranks) as pool:
        others = [pool.submit(of_this_start, store, rank, ranks, LONG) for rank in range(1, ranks)]
        time.sleep(0.2)  # they ask before rank 0 answers
        first = pool.submit(of_this_start, store, 0, ranks, LONG)
        stores = [one.result() for one in (first, *others)]
    for rank, own in enumerate(stores):
        own.set(f"word/{rank}", str(rank))
    return [stores[rank - 1].get(f"word/{rank}") for rank in range(ranks)]


def test_each_start_has_a_name_of_its_own():
    store = dist.HashStore()
    for _ in range(3):
        assert meet(store, 4) == [b"0", b"1", b"2", b"3"]
    assert of_this_start(store, 0, 1, SHORT).check(["word/0"]) is False


def test_no_farewell_of_an_earlier_start_reaches_a_new_one():
    """NCCL's watchdogs look for it below no name, and end whoever finds it."""
    store, farewells = dist.HashStore(), ["exception_dump", "remote_error"]
    assert meet(store, 2) == [b"0", b"1"]
    for farewell in farewells:
        store.set(farewell, "1")
    with ThreadPoolExecutor(2) as pool:
        early = [pool.submit(of_this_start, store, rank, 3, LONG) for rank in (0, 1)]
        time.sleep(0.5)
        assert not any(rank.done() for rank in early), "a rank is missing, which may still be of an earlier start"
        of_this_start(store, 2, 3, LONG)
        assert not any(store.check([farewell]) for farewell in farewells)


def test_who_is_waited_for_is_said(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.1)
    with pytest.raises(RunFailed, match=r"^ranks 1, 2 did not come"):
        of_this_start(dist.HashStore(), 0, 3, timedelta(seconds=0.35))
    assert "warning: ranks 1, 2 have not come yet, after 0 s" in capsys.readouterr().err.splitlines()[0]


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


def test_a_place_where_nobody_meets_is_said_in_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(
            RunFailed, match=rf"^rank 0 could not open localhost:{port}, .*; choose another MASTER_PORT"
        ):
            rendezvous.meet(SHORT)
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(RunFailed, match=rf"^rank 1 could not reach localhost:{port}, .*; start again$"):
            rendezvous.meet(timedelta(seconds=1))
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match=r"^MASTER_ADDR \(missing\) must be set where RANK is; start by torchrun"):
        rendezvous.meet(SHORT)


@pytest.mark.parametrize(
    "words", ["[gloo/transport/tcp/pair.cc:547] closed", "Connection was likely closed.\nFrames: ..."]
)
def test_a_rank_that_is_lost_before_or_after_a_run_is_said_in_one_line(monkeypatch, words):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    said = r"^another rank has ended.*; the same command starts again \(.*closed"
    with pytest.raises(RunFailed, match=said), process_group():
        raise RuntimeError(words)
    for others in ("a fault of the program", "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"):
        with pytest.raises(RuntimeError, match=f"^{others}$"), process_group():
            raise RuntimeError(others)


def test_where_all_ranks_answer_torchs_own_words_are_kept(monkeypatch):
    """They are then all that tells why: of NCCL, often a network interface."""
    monkeypatch.setattr(dist, "monitored_barrier", lambda *_, **__: None)
    groups = dict.fromkeys(("group", "host_group", "save_group", "roll_group"))
    error = RuntimeError("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)")
    assert "run with NCCL_DEBUG=INFO" in lost_ranks(SimpleNamespace(size=2, **groups), error, LONG)


def test_ranks_make_the_group_of_short_patience_once_all_are_there(monkeypatch):
    """Nodes start one after another; and who waits for rank 0 in a roll waits as long as its group was made with."""
    done, new_group, barrier = [], dist.new_group, dist.barrier

    def noted(*, timeout, **how):
        done.append(timeout)
        return new_group(timeout=timeout, **how)

    monkeypatch.setattr(dist, "new_group", noted)
    monkeypatch.setattr(dist, "barrier", lambda group: done.append("all are there") or barrier(group))
    with process_group():
        assert done == [world.TIMEOUT, world.TIMEOUT, "all are there", world.ROLL_TIMEOUT]
