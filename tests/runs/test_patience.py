"""How long ranks wait for each other."""

from datetime import timedelta

from engine.distributed.world import TIMEOUT
from engine.recipe.load import load
from engine.runs import trainer
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
