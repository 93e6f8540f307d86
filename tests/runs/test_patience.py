"""How long ranks wait for each other."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engine.distributed import roll
from engine.distributed.world import LOST, TIMEOUT
from engine.recipe.load import load
from engine.runs import trainer
from engine.runs.on_host import HostCopy
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL


def test_ranks_wait_long_in_a_first_step_whatever_torch_gave_their_groups(world, tmp_path, monkeypatch):
    """NCCL's own time-out is shorter, and a mesh of several dimensions has groups with it."""
    waits = []
    monkeypatch.setattr(trainer, "wait_at_most", lambda world, timeout: waits.append(timeout))
    images = "data.dataset_options={size: 20, image_size: [3, 36, 40], num_classes: 4}"
    values = [*SMALL, images, "model.dim=16", "model.heads=2", "data.workers=0", "train.max_steps=2"]
    pretrain(load(RECIPE, [*values, "run.timeout_minutes=3", f"run.dir={tmp_path}"]), RECIPE, world)
    assert waits[:2] == [TIMEOUT, timedelta(minutes=3)]
    assert waits[-1] == TIMEOUT


def on_the_way(within: float, *looks: bool) -> HostCopy:
    """Numbers of a device that has them after so many looks, or never."""
    copy, answers = HostCopy(torch.tensor([1.0, 2.0]), timedelta(seconds=within)), iter(looks)
    copy.arrival = SimpleNamespace(query=lambda: next(answers, False))
    return copy


def test_a_device_that_waits_for_a_lost_rank_is_waited_for_so_long():
    assert on_the_way(60, False, False, True).numbers() == [1.0, 2.0]
    with pytest.raises(RuntimeError, match=r"^Timed out waiting 50ms for the GPU$") as error:
        on_the_way(0.05).numbers()
    assert LOST.search(str(error.value)), "so that ranks are counted then"


def test_a_watchdog_gives_ranks_time_to_say_who_is_lost(world, monkeypatch):
    given = {}
    backend_of = {"groups": "gloo", "of GPUs": "nccl", "named": "gloo"}
    groups = [SimpleNamespace(name=name, group_desc="undefined") for name in backend_of]
    monkeypatch.setattr(roll, "all_groups", lambda: groups)
    monkeypatch.setattr(dist, "get_backend", lambda group: backend_of[group.name])
    monkeypatch.setattr(roll, "set_group_timeout", lambda group, timeout: given.update({group.name: timeout}))
    roll.wait_at_most(SimpleNamespace(size=2), timedelta(minutes=5))
    assert given == {"groups": timedelta(minutes=5), "of GPUs": timedelta(minutes=7), "named": timedelta(minutes=5)}
