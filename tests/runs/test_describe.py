"""A line of the log waits for the device once, and the rank that writes it computes what it alone needs."""

import threading
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.bad_images import BadImages
from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.runs import pretrain
from engine.runs.on_host import on_host
from engine.runs.pretrain import Pretraining
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import rows

AT_ONCE = timedelta(0)


class Scalars(TorchDispatchMode):
    """Counts numbers that are asked for by themselves: on a GPU each of them waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_numbers_come_to_the_host_as_they_were():
    third = torch.tensor(1 / 3)
    row = on_host(
        {"a": third, "lr": 0.1, "count": torch.tensor(3), "b": third.double(), "bad": torch.tensor(torch.nan)}, AT_ONCE
    )
    assert list(row) == ["a", "lr", "count", "b", "bad"]
    assert (row["a"], row["lr"], row["count"], row["b"]) == (third.item(), 0.1, 3, third.double().item())
    assert type(row["count"]) is int
    assert row["bad"] != row["bad"]


def test_a_line_of_the_log_waits_once(tmp_path, monkeypatch):
    """One copy to the host and two all-reduces: of all numbers, and of the features' Gram matrix."""
    described, waits, sums = Pretraining.describe, [], []

    def counted(task, output, within):
        copies, reductions = [], []
        with monkeypatch.context() as patch, Scalars() as scalars:
            patch.setattr(BadImages, "count", lambda _: 0)  # a message over the host group
            patch.setattr(torch.Tensor, "tolist", lambda x, own=torch.Tensor.tolist: copies.append(1) or own(x))
            reduced = dist.all_reduce
            patch.setattr(dist, "all_reduce", lambda *a, **k: reductions.append(1) or reduced(*a, **k))
            row = described(task, output, within)
        waits.append(scalars.count + len(copies))
        sums.append(len(reductions))
        return row

    monkeypatch.setattr(Pretraining, "describe", counted)
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={tmp_path}", "train.max_steps=2"]
    with process_group() as world:
        pretrain.pretrain(load(RECIPE, [*values, "evaluate.online_probe=true"]), RECIPE, world)
    assert (waits, sums) == ([1, 1], [2, 2])


@pytest.mark.parametrize("ends", ["well", "in a fault"])
def test_training_goes_on_while_eigenvalues_are_computed(world, tmp_path, monkeypatch, ends):
    """A row waits for them; a run that fails writes it before it ends."""
    second, came, own, train_step = threading.Event(), [], pretrain.rankme_from_gram, Pretraining.train_step

    def rankme(gram_DD):
        came.append(second.wait(20))
        return own(gram_DD)

    def step(task, batch):
        output = train_step(task, batch)
        if task.step == 2:
            second.set()
            if ends != "well":
                raise ValueError("a fault")
        return output

    monkeypatch.setattr(pretrain, "rankme_from_gram", rankme)
    monkeypatch.setattr(Pretraining, "train_step", step)
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={tmp_path}", "train.max_steps=3"]
    with nullcontext() if ends == "well" else pytest.raises(ValueError, match="a fault"):
        pretrain.pretrain(load(RECIPE, [*values, "log.every_steps=1", "evaluate.knn_every_epochs=0"]), RECIPE, world)
    written = rows(tmp_path, "loss")
    assert [row["step"] for row in written] == ([1, 2, 3] if ends == "well" else [1])
    assert all(1 < row["rankme"] <= 16 for row in written)
    assert all(came)
