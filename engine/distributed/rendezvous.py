"""How the ranks of one start find each other, and nobody of an earlier one.

torchrun keeps one store over its restarts, and what dead ranks left in it would be taken for the living. Its count of
restarts differs between nodes, so each start has a name of its own, which rank 0 makes and gives to those who ask.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from engine.errors import RunFailed, UserError, listed
from engine.logger import warn

QUESTIONS = "engine/questions"  # of ranks that want to know the name
LOOK_SECONDS = 0.05
# NCCL's watchdogs announce a failure under these keys, which have no prefix: left by one start, they end the next.
FAREWELLS = "exception_dump", "remote_error"
SAY_SECONDS = 60.0  # between two lines about ranks that have not come


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The launch's store below the name of this start, this process's rank, and how many ranks there are.

    Raises:
        UserError: the launcher's variables are not complete.
        RunFailed: there is no store where they say, or other ranks have not come when the time is over.
    """
    rank, size = int(_said("RANK")), int(_said("WORLD_SIZE"))
    return of_this_start(_open(rank, size, timeout), rank, size, timeout), rank, size


def _open(rank: int, size: int, timeout: timedelta) -> dist.Store:
    host, port = _said("MASTER_ADDR"), int(_said("MASTER_PORT"))
    # torchrun has a store for its ranks, if it is not told otherwise; else rank 0 has it.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(host, port, size, hosts, timeout, wait_for_workers=False, multi_tenant=True)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        why = next(iter(str(error).splitlines()), "no reason given")
        does, do = ("open", "choose another MASTER_PORT, or start again") if hosts else ("reach", "start again")
        raise RunFailed(f"rank {rank} could not {does} {host}:{port}, where ranks meet ({why}); {do}") from error


def _said(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{name} (missing) must be set where RANK is; start by torchrun")
    return value


def of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store below a name that all living ranks know. Raises RunFailed as `meet`."""
    name = _ask(store, rank, timeout) if rank else _answer(store, size, timeout)
    _wait_for_all(store, name, timeout)
    return dist.PrefixStore(f"engine/{name}", store)


def _ask(store: dist.Store, rank: int, timeout: timedelta) -> str:
    question = f"engine/answer/{secrets.token_hex(8)}"  # which no dead rank 0 has answered
    store.append(QUESTIONS, f"{question} ")
    try:
        store.wait([question], timeout)
    except dist.DistStoreError as error:
        raise RunFailed(f"rank 0 did not come within {timeout}; the same command starts again") from error
    name = store.get(question).decode()
    store.append(f"engine/{name}/heard", f"{rank} ")
    return name


def _wait_for_all(store: dist.Store, name: str, timeout: timedelta) -> None:
    try:
        store.wait([f"engine/{name}/met"], timeout)
    except dist.DistStoreError as error:
        raise RunFailed(f"not all ranks came within {timeout}; the same command starts again") from error


def _answer(store: dist.Store, size: int, timeout: timedelta) -> str:
    """Answer whoever asks until every rank has heard: the question of a dead rank gets an answer that nobody reads."""
    name, answered, missing = secrets.token_hex(8), set(), set(range(1, size))
    begun, lines = time.monotonic(), 1
    while True:
        asked = _list(store, QUESTIONS) - answered
        if asked:
            store.multi_set(list(asked), [name] * len(asked))
            answered |= asked
        missing -= {int(rank) for rank in _list(store, f"engine/{name}/heard")}
        if not missing:  # so nobody of an earlier start lives
            for farewell in FAREWELLS:
                store.delete_key(farewell)
            store.set(f"engine/{name}/met", "")
            return name
        late = f"ranks {listed([str(rank) for rank in sorted(missing)])}"
        waited = time.monotonic() - begun
        if waited > lines * SAY_SECONDS:
            warn(f"{late} have not come yet, after {waited:.0f} s")
            lines += 1
        if waited > timeout.total_seconds():
            raise RunFailed(f"{late} did not come within {timeout}; the same command starts again")
        time.sleep(LOOK_SECONDS)


def _list(store: dist.Store, key: str) -> set[str]:
    """What was appended to a key, in one question to the store however many ranks there are."""
    store.append(key, "")  # else `get` would wait for it
    return set(store.get(key).decode().split())
