"""How the ranks of one start find each other, and nobody of an earlier one.

torchrun keeps one store over its restarts, and what dead ranks left in it would be taken for the living. Its count of
restarts differs between nodes, so each start has a name of its own, which rank 0 makes and gives to those who ask.
"""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from engine.errors import RunFailed, listed

LOOK_SECONDS = 0.05


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The launcher's store below the name of this start, this process's rank, and how many ranks there are.

    Raises RunFailed where other ranks have not come when the time is over.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return of_this_start(store, rank, size, timeout), rank, size


def of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store below a name that all living ranks know. Raises RunFailed as `meet`."""
    name = _ask(store, rank, timeout) if rank else _answer(store, size, timeout)
    return dist.PrefixStore(f"engine/{name}", store)


def _ask(store: dist.Store, rank: int, timeout: timedelta) -> str:
    question = secrets.token_hex(8)  # which no dead rank has answered
    store.set(f"engine/ask/{rank}", question)
    try:
        store.wait([f"engine/answer/{question}"], timeout)
    except dist.DistStoreError as error:
        raise RunFailed(f"rank 0 did not come within {timeout}; the same command starts again") from error
    name = store.get(f"engine/answer/{question}").decode()
    store.set(f"engine/{name}/heard/{rank}", "")
    return name


def _answer(store: dist.Store, size: int, timeout: timedelta) -> str:
    """Answer whoever asks until every rank has heard: the question of a dead rank gets an answer that nobody reads."""
    name, answered, missing = secrets.token_hex(8), set(), set(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            asked = store.get(f"engine/ask/{rank}").decode() if store.check([f"engine/ask/{rank}"]) else None
            if asked is not None and asked not in answered:
                answered.add(asked)
                store.set(f"engine/answer/{asked}", name)
            if store.check([f"engine/{name}/heard/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            late = listed([str(rank) for rank in sorted(missing)])
            raise RunFailed(f"ranks {late} did not come within {timeout}; the same command starts again")
        time.sleep(LOOK_SECONDS)
    return name
