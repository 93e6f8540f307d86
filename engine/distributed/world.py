"""The processes of a launch, from their start to their end: groups, devices, turns, the mesh."""

import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import engine
from engine.distributed.agreement import agreement, all_gather
from engine.distributed.launcher import allow_open_files, end_with_launcher, is_launched, local_rank, local_ranks
from engine.distributed.rendezvous import meet
from engine.errors import RunFailed, UserError, one_line

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # a rank may index millions of images while the others wait
ROLL_TIMEOUT = timedelta(seconds=40)
# In an error of torch's, on one line: another rank did not answer. NCCL may have lacked memory on this rank's GPU.
LOST = re.compile(
    r"^(?!.*'out of memory').*(gloo/transport|Connection (closed|reset|was likely closed)|Timed out waiting|NCCL)"
)
_SMALL = 4 << 20  # bytes that every node's first rank may send to all
UNHURRIED = "unhurried"  # the description of groups whose time-out never changes


@dataclass(frozen=True)
class World:
    """This process's place among all of them.

    group: carries the training's tensors. host_group: small CPU messages beside them. save_group: those of saves, which
    have a thread of their own. roll_group: nothing, as long as nothing has failed (engine.distributed.roll).
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    save_group: dist.ProcessGroup
    roll_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def made_by(self) -> dict[str, str]:
        """The versions and hardware that compute here, for whoever finds the results later."""
        return {
            "engine": engine.__version__,
            "torch": torch.__version__,
            "device": self.device_name,
            "ranks": str(self.size),
        }


@contextmanager
def process_group() -> Iterator[World]:
    """Join the other processes of the launch (or be the only one); yields the World.

    GPUs are used where there are any. A rank whose launcher died exits within seconds.

    Raises:
        RunFailed: a rank was lost, and the body had no words for it; of this and of other places, what `meet` raises.
    """
    end_with_launcher(os.getppid())
    with _lost_ranks_in_words():
        yield from _joined()


@contextmanager
def _lost_ranks_in_words() -> Iterator[None]:
    """For a start and an end; a run has better ones (runs/failures.py)."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if not (is_launched() and LOST.search(text)):
            raise
        raise RunFailed(
            f"another rank has ended, or its node is out of reach; the same command starts again ({text[:300]})"
        ) from error


def _joined() -> Iterator[World]:
    allow_open_files()
    cuda = torch.cuda.is_available()
    device = _own_gpu() if cuda else torch.device("cpu")
    store, rank, size = meet(TIMEOUT) if is_launched() else (dist.HashStore(), 0, 1)
    backend = "nccl" if cuda else "gloo"  # small messages of hosts have a group of their own
    dist.init_process_group(
        backend, timeout=TIMEOUT, device_id=device if cuda else None, store=store, rank=rank, world_size=size
    )
    try:
        host_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        save_group = dist.new_group(backend="gloo", timeout=TIMEOUT, group_desc=UNHURRIED)
        dist.barrier(host_group)  # now all are there, and can meet in less time
        roll_group = dist.new_group(backend="gloo", timeout=ROLL_TIMEOUT, group_desc=UNHURRIED)
        yield World(rank, size, device, dist.group.WORLD, host_group, save_group, roll_group)
    except BaseException:
        # NCCL's farewell waits for kernels whose peers may never come: after a failure the process just ends.
        if not cuda:
            dist.destroy_process_group()
        raise
    dist.barrier(host_group)  # a rank that leaves early would take the store with it
    dist.destroy_process_group()


def _own_gpu() -> torch.device:
    """This rank's GPU, set to compute the same bits every time, in the precision that it is asked for."""
    gpus = torch.cuda.device_count()
    if local_rank() >= gpus:
        most = f"at most {gpus}, the number of GPUs that each of them sees"
        raise UserError(f"ranks ({local_ranks()}) must be {most}; start fewer, or let each see all GPUs of its node")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # Sums by the switches of NVLink vary in their order; torch would leave out those of one node alone.
    os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")  # the groups of a mesh share a GPU
    # A run goes further (runs/run.py).
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only wanted for finding bugs, and slow
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def in_turn(world: World, make: Callable[[], T]) -> T:
    """What `make` returns, on rank 0 first: it alone fetches or builds what the others then find.

    Raises:
        UserError: on every rank, where it was raised on any.
    """
    made = []
    for turn in (world.is_first, not world.is_first):
        with agreement(world.host_group):
            if turn:
                made.append(make())
    return made[0]


def once_per_node(world: World, make: Callable[[], T]) -> T:
    """What `make` returns, by rank 0 and then by the first rank of each other node: it finds what was saved where
    nodes share it. The others of a node are given a copy where that is small (`_SMALL`), else they call `make` too.

    Raises:
        UserError: on every rank, where it was raised on any.
    """
    nodes = all_gather(socket.gethostname(), world.host_group)
    first = nodes.index(nodes[world.rank])
    made, alone = [], len(set(nodes)) == world.size
    for turn in (world.is_first, world.rank == first and not world.is_first):
        with agreement(world.host_group):
            if turn:
                made.append(make())
    if alone:
        return made[0]
    copies = all_gather(_packed(made[0]) if made else None, world.host_group)
    with agreement(world.host_group):
        copy = made[0] if made else _unpacked(copies[first])
        return make() if copy is None else copy


def _packed(made: object) -> bytes | None:
    """A copy for the ranks beside this one; None where there is none, or a large one."""
    with suppress(Exception):  # nobody says of a data set of torchvision's what copies it
        packed = pickle.dumps(made)
        return packed if len(packed) <= _SMALL else None
    return None


def _unpacked(packed: bytes | None) -> Any:
    """The copy; None where there is none, or what it is of is not to be found from here."""
    with suppress(Exception):
        return packed and pickle.loads(packed)
    return None


def make_mesh(world: World, shard: str, replicate: int) -> DeviceMesh:
    """The ranks as a grid ("replicate", "shard"): a parameter is spread along the second, copied along the first."""
    copies = {"replicate": world.size, "hybrid": replicate}.get(shard, 1)
    return init_device_mesh(world.device.type, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))
