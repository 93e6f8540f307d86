"""The process group's life: start, devices, mesh, agreement between ranks, end."""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.front_door import end_with_launcher

TIMEOUT = timedelta(minutes=30)  # a rank may index millions of images while the others wait


@dataclass(frozen=True)
class World:
    """This process's place among all of them. `host_group` carries small CPU messages beside the training traffic."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group():
    """Join the other processes of the launch (or be the only one); yields the World.

    GPUs are used where there are any. Under torchrun a rank whose agent died exits within seconds.
    """
    end_with_launcher()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    launched = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if cuda else None, **launched)
    try:
        host_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, host_group)
    finally:
        dist.destroy_process_group()


def make_mesh(world: World, shard: str, replicate: int) -> DeviceMesh:
    """The ranks as a grid ("replicate", "shard"): a parameter is spread along the second, copied along the first."""
    copies = {"replicate": world.size, "hybrid": replicate}.get(shard, 1)
    return init_device_mesh(world.device.type, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))


class StopSignal:
    """SIGINT or SIGTERM on any rank, known to all ranks after the same step. A second SIGINT ends the process at once.

    A second SIGTERM changes nothing: schedulers send it to ranks and launcher alike, and the launcher passes it on.
    The ranks' answers travel while the next step runs, so nobody waits for them.
    """

    def __init__(self, world: World):
        self.world = world
        self.received = torch.zeros(1, dtype=torch.int32)
        self._start()

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: object) -> None:
        self.received[0] = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def _start(self) -> None:
        self.message = self.received.clone()
        self.work = dist.all_reduce(self.message, dist.ReduceOp.MAX, group=self.world.host_group, async_op=True)

    def agreed(self) -> int:
        """Once a step, on every rank: the signal that some rank had received before the step began, or 0."""
        self.work.wait()
        signum = int(self.message)
        self._start()
        return signum
