"""Checkpoints between real processes (gloo): any number of ranks to any other, failures of one rank, a killed rank."""

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from engine.checkpoint.background import Saver
from engine.checkpoint.load import load, newest_valid, read_tensors
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.plan import SMALL
from engine.checkpoint.retain import clean, retain
from engine.checkpoint.save import SaveFailed, save
from engine.checkpoint.state import RunState
from engine.errors import UserError

SHA = "0" * 64


# ---- What is saved: a model under FSDP2 with its optimizer, and tensors of other kinds -------------------------------


def whole(name: str, like: torch.Tensor) -> torch.Tensor:
    """The value of a tensor, from its name alone."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * 1000).to(like.dtype)


def make_tensors(replicas: int) -> dict[str, torch.Tensor]:
    """Everything blank, over this launch's ranks; first dimensions of 5, 2, 1 and 0 give uneven and empty shards."""
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False), nn.Linear(2, 1))
    fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors |= {
        "bf16": distribute_tensor(torch.zeros(7, 3, dtype=torch.bfloat16), mesh["shard"], [Shard(1)]),
        "float64": distribute_tensor(torch.zeros(6, dtype=torch.float64), mesh["shard"], [Replicate()]),
        "int64": torch.tensor(0),
        **{f"large{number}": torch.zeros(SMALL // 4) for number in range(4)},  # shared out: every rank writes something
        "nothing": distribute_tensor(torch.zeros(0, 4), mesh["shard"], [Shard(0)]),
    }
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    return tensors


def state(step: int) -> RunState:
    return RunState(step, "task: pretrain\n", {"train": "0"})


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        value = whole(name, tensor)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)
    return tensors


def load_all(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Load a checkpoint that was saved here, and see that it holds what was saved."""
    load(folder, tensors)
    check(tensors)
    assert RunState.read(folder, manifest := read_manifest(folder)) == state(manifest.step)


def check(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, whole(name, tensor)), name


# ---- Launching -------------------------------------------------------------------------------------------------------


def _rank_main(scenario: Callable, rank: int, ranks: int, store: Path, checkpoints: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        scenario(checkpoints)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(ranks, scenario, checkpoints) -> exit codes by rank; a rank that hangs fails the test."""
    context = multiprocessing.get_context("forkserver")

    def run(ranks: int, scenario: Callable, checkpoints: Path) -> list[int]:
        store = tmp_path_factory.mktemp("store") / "store"
        arguments = [(scenario, rank, ranks, store, checkpoints) for rank in range(ranks)]
        processes = [context.Process(target=_rank_main, args=args) for args in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        hung = [process for process in processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, "a rank hangs"
        return [process.exitcode for process in processes]

    return run


# ---- Scenarios -------------------------------------------------------------------------------------------------------


def one_rank_saves(checkpoints: Path) -> None:
    assert newest_valid(checkpoints) is None
    path = save(checkpoints, fill(make_tensors(1)), state(1), recipe_sha256=SHA)
    assert path == newest_valid(checkpoints) == checkpoints / "step_0000001"


def two_ranks(checkpoints: Path) -> None:
    tensors = make_tensors(1)
    load_all(checkpoints / "step_0000001", tensors)
    path = save(checkpoints, tensors, state(2), recipe_sha256=SHA)
    files = read_manifest(path).files
    assert read_manifest(path).world_size == 2
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == set(files)
    stored = sum(entry["bytes"] for entry in files.values())
    alone = sum(entry["bytes"] for entry in read_manifest(checkpoints / "step_0000001").files.values())
    assert stored < 2 * alone, "replicated tensors are stored once"
    refusals(checkpoints, tensors)
    disk_full_on_one_rank(checkpoints, tensors)
    assert retain(checkpoints, 1) == ([checkpoints / "step_0000001"] if dist.get_rank() == 0 else [])


def refusals(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What is wrong on one rank ends the call on all of them, and changes nothing."""
    mine = dist.get_rank() == 1
    kept = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(ValueError if mine else RuntimeError, match="all ranks must save the same tensors; 'extra'"):
        save(checkpoints, tensors | ({"extra": torch.ones(1)} if mine else {}), state(3), recipe_sha256=SHA)
    with pytest.raises(UserError, match=r"rank 1: .*extra is not in the checkpoint"):
        load(checkpoints / "step_0000002", tensors | ({"extra": torch.ones(1)} if mine else {}))
    with pytest.raises(UserError, match="no such folder"):
        load(checkpoints / "step_0000009", tensors)
    with pytest.raises(UserError, match="must be a readable folder"):
        newest_valid(checkpoints / "latest")
    dist.barrier()
    assert kept == sorted(path.name for path in checkpoints.iterdir())
    check(tensors)


def disk_full_on_one_rank(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    with full_disk(on=1), pytest.raises(SaveFailed) as caught:
        save(checkpoints, tensors, state(3), recipe_sha256=SHA)
    text = str(caught.value)
    assert "rank 1: [Errno 27] File too large" in text
    assert "\n" not in text
    assert "step_0000003) was not saved, the previous checkpoint, step_0000002, is intact" in text
    dist.barrier()
    assert not list(checkpoints.glob("step_0000003*"))
    assert newest_valid(checkpoints) == checkpoints / "step_0000002"


def a_rank_is_killed_while_it_saves(checkpoints: Path) -> None:
    """The kernel ends rank 1 in the middle of its file."""
    tensors = fill(make_tensors(1))
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    save(checkpoints, tensors, state(4), recipe_sha256=SHA)


def four_ranks_after_the_kill(checkpoints: Path) -> None:
    assert list(checkpoints.glob("step_0000004.tmp-*")) != []
    assert newest_valid(checkpoints) == checkpoints / "step_0000002"
    dist.barrier()
    assert len(clean(checkpoints)) == (1 if dist.get_rank() == 0 else 0)
    dist.barrier()
    assert not list(checkpoints.glob("*.tmp-*"))
    for replicas in (1, 4):  # all shards, all copies
        tensors = make_tensors(replicas)
        load_all(checkpoints / "step_0000002", tensors)
    assert save(checkpoints, tensors, state(4), recipe_sha256=SHA).name == "step_0000004"
    hybrid = make_tensors(2)
    load_all(checkpoints / "step_0000004", hybrid)
    save(checkpoints, hybrid, state(5), recipe_sha256=SHA)
    beside_traffic(checkpoints, hybrid)
    a_failure_beside_traffic(checkpoints, hybrid)


def beside_traffic(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A save in a thread, while other groups talk: its bytes are the same, each shard is copied by one rank, once."""
    folder = checkpoints.with_name("beside")
    whole = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    with Saver(folder, SHA, dist.new_group(backend="gloo")) as saver:
        saver.prepare(tensors)
        for step in (4, 5):
            saver.start(tensors, state(step))
            copied = torch.tensor(sum(copy.nbytes for copy in saver._copies.values()))
            for _ in range(20):
                dist.all_reduce(copied)
                copied //= dist.get_world_size() if _ else 1
            assert copied == whole
            saver.wait()
    dist.barrier()
    assert read_manifest(folder / "step_0000005") == read_manifest(checkpoints / "step_0000005")


def a_failure_beside_traffic(checkpoints: Path, tensors: dict[str, torch.Tensor]) -> None:
    """On one rank; all raise it where they wait, and the next save is whole."""
    folder = checkpoints.with_name("beside")
    with Saver(folder, SHA, dist.new_group(backend="gloo")) as saver:
        with full_disk(on=2):
            saver.start(tensors, state(6))
            with pytest.raises(SaveFailed, match=r"step_0000005, is intact: rank 2: \[Errno 27\] File too large: '"):
                saver.wait()
        dist.barrier()
        saver.start(tensors, state(7))
        saver.wait()
    assert newest_valid(folder).name == "step_0000007"


@contextmanager
def full_disk(on: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def two_ranks_load_what_four_saved(checkpoints: Path) -> None:
    if dist.get_rank() == 0:
        with (checkpoints / "step_0000005" / "__1_0.distcp").open("r+b") as file:
            file.seek(50)
            file.write(b"?")
    dist.barrier()
    tensors = make_tensors(1)
    with pytest.raises(UserError, match=r"__1_0\.distcp does not match its checksum"):
        load(checkpoints / "step_0000005", tensors)
    assert newest_valid(checkpoints) == checkpoints / "step_0000004"
    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == 1:  # one rank reads the table of contents, for all
            patched.delattr("engine.checkpoint.load.read_table")
        load_all(checkpoints / "step_0000004", tensors)
    save(checkpoints, tensors, state(5), recipe_sha256=SHA)


def test_any_number_of_ranks_to_any_other(launch, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert launch(1, one_rank_saves, checkpoints) == [0]
    assert launch(2, two_ranks, checkpoints) == [0, 0]
    first, second = launch(2, a_rank_is_killed_while_it_saves, checkpoints)
    assert second == -signal.SIGXFSZ
    assert first != 0
    assert launch(4, four_ranks_after_the_kill, checkpoints) == [0, 0, 0, 0]
    assert launch(2, two_ranks_load_what_four_saved, checkpoints) == [0, 0]
    for name in ("step_0000004", "step_0000005"):
        tensors = dict(read_tensors(checkpoints / name))
        assert "model.0.weight" in tensors
        assert "optimizer.3.bias.exp_avg" in tensors
        check(tensors)
