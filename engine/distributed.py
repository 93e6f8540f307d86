"""The process group's life: start, devices, mesh, agreement between ranks, end."""

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.recipe import UserError

TIMEOUT = timedelta(minutes=30)  # a rank may index millions of images while the others wait
ORPHAN_CHECK_SECONDS = 1.0


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


def world_size_from_environment() -> int:
    """Number of processes that the launcher started; known before any of them talks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group():
    """Join the other processes of the launch (or be the only one); yields the World.

    GPUs are used where there are any. Under torchrun a rank whose agent died exits within seconds.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
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


def _exit_with_parent(parent: int) -> None:
    # A rank that outlives its agent would go on training beside the job that replaces it.
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_SECONDS)
    os.write(2, b"the launcher is gone: this rank exits; the newest checkpoint is kept\n")
    os._exit(1)


def make_mesh(world: World, shard: str, replicate: int) -> DeviceMesh:
    """The ranks as a grid ("replicate", "shard"): a parameter is spread along the second, copied along the first."""
    copies = {"replicate": world.size, "hybrid": replicate}.get(shard, 1)
    return init_device_mesh(world.device.type, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))


def share(world: World, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.host_group)
    return box[0]


@contextmanager
def agreement(world: World):
    """Let all ranks fail together: a UserError inside on any rank is raised on every one of them, with the same text."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem, group=world.host_group)
    first = next((p for p in problems if p is not None), None)
    if first is not None:
        raise UserError(first)
