"""How long ranks take to find each other (engine.distributed.rendezvous): `python -m tests.distributed.handshake RANKS`
prints a row of a table.

Rank 0 and the launch's store have a process each, as torchrun's agent has; the others are threads of a few processes,
each with a connection of its own. What they take is not what as many machines would: on few cores they wait for each
other. So CPU seconds of rank 0 and of the store are told beside.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import torch.distributed as dist

from engine.distributed.launcher import allow_open_files
from engine.distributed.rendezvous import of_this_start

TIMEOUT = timedelta(minutes=10)
CLIENTS = 256  # threads of a process


def join(port: int) -> dist.Store:
    return dist.TCPStore("localhost", port, None, False, TIMEOUT, wait_for_workers=False)


def keep_store(pipe: Connection) -> None:
    """The store, until it is told to end; then it says what CPU seconds that took."""
    allow_open_files()
    store = dist.TCPStore("localhost", 0, None, True, TIMEOUT, wait_for_workers=False)
    began = time.process_time()
    pipe.send(store.port)
    pipe.recv()
    pipe.send(time.process_time() - began)


def be_rank_0(port: int, size: int, go: Event, pipe: Connection) -> None:
    store = join(port)
    pipe.send("here")
    go.wait()
    began = time.process_time()
    of_this_start(store, 0, size, TIMEOUT)
    pipe.send(time.process_time() - began)


def be_ranks(port: int, ranks: range, size: int, go: Event, pipe: Connection) -> None:
    allow_open_files()
    with ThreadPoolExecutor(len(ranks)) as threads:
        stores = list(threads.map(lambda _: join(port), ranks))
        pipe.send("here")
        go.wait()
        met = threads.map(lambda each: of_this_start(*each, size, TIMEOUT), zip(stores, ranks, strict=True))
        pipe.send(len(list(met)))


def start(work, *arguments) -> tuple[multiprocessing.Process, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=work, args=(*arguments, theirs))
    process.start()
    return process, ours


def measure(size: int) -> dict[str, str]:
    go = multiprocessing.Event()
    keeper, store = start(keep_store)
    port = store.recv()
    shares = [range(first, min(size, first + CLIENTS)) for first in range(1, size, CLIENTS)]
    first = start(be_rank_0, port, size, go)
    others = [start(be_ranks, port, ranks, size, go) for ranks in shares]
    for _, pipe in (first, *others):
        pipe.recv()
    began = time.monotonic()
    go.set()
    rank_0 = first[1].recv()
    assert sum(pipe.recv() for _, pipe in others) == size - 1
    met = time.monotonic() - began
    store.send("end")
    seconds = store.recv()
    for process in (keeper, first[0], *(process for process, _ in others)):
        process.join()
    return {
        "ranks": f"{size:,}",
        "all have met": f"{met:.1f} s",
        "CPU of rank 0": f"{rank_0:.2f} s",
        "CPU of the store": f"{seconds:.2f} s",
        "cores": str(len(os.sched_getaffinity(0))),
    }


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the store asks for a name of each connection, and may find none
    multiprocessing.set_start_method("spawn")
    row = measure(int(sys.argv[1]))
    print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}\n| {' | '.join(row.values())} |")
