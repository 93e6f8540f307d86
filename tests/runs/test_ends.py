"""What a run says of its length: too few steps in an epoch, train.max_steps, the end of its schedules."""

from pathlib import Path

from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL


def test_a_run_says_by_what_it_ended(world, tmp_path, capfd):
    """Of three epochs of two steps: six in all."""

    def said(most, size: int = 20, out: Path = tmp_path) -> list[str]:
        images = f"data.dataset_options={{size: {size}, image_size: [3, 36, 40], num_classes: 4}}"
        values = [*SMALL, images, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={out}"]
        pretrain(load(RECIPE, [*values, f"train.max_steps={most}"]), RECIPE, world)
        found = [line.partition("r0  ")[2] for line in capfd.readouterr().out.splitlines()]
        assert "images of your own: mocov3 run own_photos_small " in found[-1]  # after those that come with the engine
        return [line for line in found if "stopped" in line or line.startswith(("resumed", "warning"))]

    warning = "warning   an epoch has 2 steps and leaves out 4 of 20 images, others each time: pass "
    warning += "train.global_batch_size=2 for 10 steps"
    goes_on = "of 6; the same command with train.max_steps=null goes on"
    stopped = f"          stopped by train.max_steps (3) after step 3 {goes_on}"
    resumed = f"resumed   {tmp_path}/checkpoints/step_0000003 at step 3"
    assert said(3) == [warning, stopped]
    assert said(3) == [warning, f"{resumed}: stopped by train.max_steps", stopped]
    behind = f"          stopped by train.max_steps (1) after step 3 {goes_on}"
    assert said(1) == [warning, f"{resumed}: stopped by train.max_steps", behind]
    assert said("null") == [warning, f"{resumed} of 6"]
    finished = f"resumed   {tmp_path}/checkpoints/step_0000006 at step 6: the run is finished"
    assert said("null") == said(2) == [warning, finished]
    short, _ = said(1, size=16, out=tmp_path / "16")
    assert short == "warning   an epoch has 2 steps: give it more images"
