"""`--from`: a run goes back to an earlier checkpoint of its own, and loses nothing."""

import json
import shutil

import pytest

from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL
from tests.machine import trajectory


def train(world, run, *overrides, earlier=None):
    """Six steps, of which every second is saved."""
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={run}"]
    values += ["train.max_steps=6", "checkpoint.every_steps=2", *overrides]
    pretrain(load(RECIPE, values), RECIPE, world, earlier)


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def pointers(run) -> list[str]:
    return [(run / "checkpoints" / name).read_text().strip() for name in ("latest", "best")]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(world, run)
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_it_makes_the_steps_again_and_keeps_the_first_ones(world, whole, run, capfd):
    step_2 = run / "checkpoints/step_0000002"
    train(world, run, "train.max_steps=2", earlier=step_2)
    left = ["step_0000002", "step_0000004.left-1", "step_0000006.left-1"]
    assert names(run) == left
    out = capfd.readouterr().out
    assert "set aside step_0000006.left-1, step_0000004.left-1, later than step_0000002" in out
    assert "back to step_0000002: the same command goes on from here" in out
    assert trajectory(run) == trajectory(whole)[:2]
    train(world, run)  # which does not take the later ones
    assert f"resumed   {step_2} at step 2" in capfd.readouterr().out
    assert names(run) == sorted([*left, "step_0000004", "step_0000006"])
    assert trajectory(run) == trajectory(whole)
    manifests = [run / f"checkpoints/step_0000006{aside}/MANIFEST.json" for aside in ("", ".left-1")]
    files = [json.loads(manifest.read_text())["files"] for manifest in manifests]
    assert files[0] == files[1]

    (run / "checkpoints/step_0000004").rename(run / "checkpoints/step_0000004.damaged-1")
    train(world, run, earlier=step_2)
    assert {"step_0000004.left-2", "step_0000006.left-2", "step_0000006"} <= set(names(run))
    train(world, run, earlier=run)  # its newest: nothing is to be set aside
    assert len(names(run)) == 7


def test_the_best_is_one_that_is_there(world, run):
    more = ("evaluate.knn_every_epochs=1", "train.max_steps=15", "checkpoint.keep=1")
    train(world, run, *more)
    assert pointers(run)[1] in ("step_0000007", "step_0000014", "step_0000015")
    train(world, run, "train.max_steps=7", "checkpoint.keep=9", earlier=run / "checkpoints" / names(run)[0])
    for pointed in pointers(run):
        assert (run / "checkpoints" / pointed).is_dir()


def test_the_same_command_goes_back_once(world, run, capfd):
    """Though the checkpoint is there no more; another start between them makes it the user's word again."""
    step_2, best = (run / "checkpoints" / name for name in ("step_0000002", "best"))
    train(world, run, "train.max_steps=4", earlier=step_2)
    assert names(run) == ["step_0000002", "step_0000004", "step_0000004.left-1", "step_0000006.left-1"]
    train(world, run, "train.max_steps=5", "checkpoint.keep=1", earlier=step_2)
    assert f"went back to {step_2} before, and goes on from there; remove {run / '.from'}" in capfd.readouterr().out
    assert trajectory(run)[-1]["step"] == 5
    assert "step_0000002" not in names(run)
    train(world, run, earlier=step_2)
    assert trajectory(run)[-1]["step"] == 6
    train(world, run)
    with pytest.raises(UserError, match="must be a checkpoint of the run"):
        train(world, run, earlier=step_2)
    best.write_text("step_0000006")
    train(world, run, "train.max_steps=7", earlier=best)
    train(world, run, "train.max_steps=8", earlier=best)
    assert "step_0000007" in names(run)
    train(world, run, "train.max_steps=9")
    train(world, run, "train.max_steps=9", earlier=run / "checkpoints/step_0000008")
    assert "step_0000009.left-1" in names(run)


def test_a_start_that_is_ended_before_it_went_back_goes_back_at_the_next(world, run, monkeypatch):
    step_2 = run / "checkpoints/step_0000002"
    with monkeypatch.context() as patched:
        patched.setattr("engine.runs.run.go_back", lambda *_: (_ for _ in ()).throw(UserError("ended")))
        with pytest.raises(UserError, match="ended"):
            train(world, run, earlier=step_2)
    train(world, run, "train.max_steps=2", earlier=step_2)
    assert "step_0000004.left-1" in names(run)


def test_what_is_no_whole_checkpoint_of_the_run_is_refused(world, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    log, there = (run / "metrics.jsonl").read_bytes(), names(run)

    def refused(words: str, earlier, *overrides: str) -> None:
        with pytest.raises(UserError, match=words):
            train(world, run, *overrides, earlier=earlier)
        assert names(run) == there
        assert (run / "metrics.jsonl").read_bytes() == log

    which = r"must be a checkpoint of the run in .*, which has step_0000006, .*2; .* run.continue_from"
    for foreign in (other, other / "checkpoints/step_0000002", run / "checkpoints/step_0000003", run / "recipe.yaml"):
        refused(rf"^--from \({foreign}\) {which}", foreign)
    refused(r"train.epochs \(3 -> 5\)", run / "checkpoints/step_0000002", "train.epochs=5")
    file = next((run / "checkpoints/step_0000002").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused("step_0000002.* must be whole: .* does not match its checksum", run / "checkpoints/step_0000002")
    (run / "checkpoints/step_0000004").rename(run / "checkpoints/step_0000003")
    there = names(run)
    refused("its manifest is of step 4", run / "checkpoints/step_0000003")
