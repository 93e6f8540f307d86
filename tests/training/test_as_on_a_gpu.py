"""A step on a GPU mixes no devices and waits for nothing; tensors without data stand for those on the GPU."""

from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.distributed.signals import StopSignal
from engine.distributed.world import make_mesh
from engine.recipe.load import load
from engine.runs import pretrain
from engine.training.health import health
from engine.training.micro_batch import MicroBatches
from engine.training.step import train_step

ROOT = Path(__file__).parents[2]
GPU = torch.device("meta")
BATCH = 8


class AsOnAGpu(TorchDispatchMode):
    """Raises where an operation mixes the GPU's tensors with the host's, or a copy between them is waited for. What
    else asks the GPU for an answer fails by itself, as there is none."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        if name == "_fused_sgd_":  # has no form without data
            return None
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.is_meta or tensor.dim()}
        if name in ("_to_copy", "copy_"):
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
            waits = len(devices) > 1 and not (kwargs.get("non_blocking") or True in args[2:])
            assert not waits, f"a copy of {list(tensors[-1].shape)} between host and device is waited for"
        else:
            assert len(devices) < 2, f"{name} of tensors on host and device"
        return operation(*args, **kwargs)


@pytest.fixture
def gpu(world, monkeypatch):
    """A world of one rank, and of one GPU."""

    def on_gpu(*tensors: Any, group: Any = None, async_op: bool = False) -> Any:
        assert all(tensor.is_meta for tensor in tensors)
        return dist.Work() if async_op else None

    def tensor(*values: Any, device: Any = None, **more: Any) -> Tensor:
        assert device is None or torch.device(device) != GPU, "values of the host, for whose copy it is waited"
        return make_tensor(*values, device=device, **more)

    make_tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", tensor)
    for name in ("all_reduce", "all_gather_single", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, on_gpu, raising=hasattr(dist, name))
    monkeypatch.setattr(dist.Work, "wait", lambda _: True)
    monkeypatch.setattr(pretrain, "make_mesh", lambda _, *shape: make_mesh(world, *shape))
    return replace(world, device=GPU)


@pytest.mark.parametrize(
    ("network", "precision", "size"),
    [
        ("quickstart", "float32", BATCH),
        ("quickstart", "bf16", BATCH // 2),
        ("quickstart_conv optimizer.name=lars", "bf16", BATCH),
    ],
)
def test_a_step_mixes_no_devices_and_waits_for_nothing(gpu, network, precision, size):
    """Of the whole batch or of micro-batches, with a word to stop and metrics."""
    values = f"{network} model.depth=2 parallel.precision={precision} parallel.compile=false".split()
    recipe = load(ROOT / f"recipes/{values.pop(0)}.yaml", [*values, f"train.global_batch_size={BATCH}"])
    moco, schedule = pretrain.make_moco(recipe), pretrain.make_schedule(recipe, 9)
    state = pretrain.build_state(recipe, moco, gpu, schedule, resumes=True)
    side, augment, stop = recipe.model.image_size, pretrain.make_augment(recipe), StopSignal(gpu)
    crops, sample_B = (
        torch.empty(2, BATCH, 3, side, side, dtype=torch.uint8, device=GPU),
        torch.arange(BATCH, device=GPU),
    )

    def images(rows: slice) -> Tensor:
        return augment(crops[:, rows], sample_B[rows], torch.full((), 1, device=GPU))

    state.update.message = stop.message
    stop.received.add(SIGTERM)
    with AsOnAGpu():
        output = train_step(state, MicroBatches(images, BATCH, size) if size < BATCH else images(slice(None)))
        row = health(output, state)
    assert all(number.is_meta for number in row.values())
    assert all(tensor.is_meta for tensor in state.tensors().values())
