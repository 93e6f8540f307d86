"""What a run does about a save that failed, and when it waits for one."""

import threading
from types import SimpleNamespace

import pytest

from engine.checkpoint.layout import read_pointer
from engine.checkpoint.save import SaveFailed
from engine.errors import RunFailed
from engine.recipe.load import load
from engine.runs.directory import RunDirectory
from engine.runs.log import MetricsLog
from engine.runs.plan import Plan
from engine.runs.saves import Saves
from tests.checkpoint.examples import example_state, example_tensors
from tests.distributed.trajectories import RECIPE


class Story:
    """A run without training, whose log's disk is `full` or not, and its saves."""

    def __init__(self, path, world, **checkpoint):
        values = [f"checkpoint.{key}={value}" for key, value in checkpoint.items()]
        recipe = load(RECIPE, [f"run.dir={path}", *values])
        plan = Plan(99, 1, 1, 2, 0, max_failures=recipe.checkpoint.max_failures)
        self.task = SimpleNamespace(recipe=recipe, world=world, step=0, plan=lambda: plan, tensors=example_tensors)
        self.task.state = lambda: example_state(self.task.step)
        self.log, self.full = MetricsLog(path, -1), False
        self.log.sync = self.sync
        self.directory = RunDirectory(path, world)

    def sync(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device", "metrics.jsonl")

    def step(self, saves: Saves, *, full: bool = False, must: bool = False) -> None:
        self.task.step, self.full = self.task.step + 1, full
        saves.make(must=must)
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()


@pytest.fixture
def story(tmp_path, world):
    def begin(**checkpoint) -> tuple[Story, Saves]:
        story = Story(tmp_path / "run", world, **checkpoint)
        return story, Saves(story.task, story.log, story.directory)

    return begin


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_so_many_failures_in_a_row_end_a_run_at_the_last_of_them(story, asynchronous):
    story, saves = story(max_failures=3, asynchronous=asynchronous)
    with story.directory, saves:
        for full in (True, True, False, True, True):
            story.step(saves, full=full)
        with pytest.raises(SaveFailed, match=r"step_0000006\) was not saved, the previous .* step_0000003, is intact"):
            story.step(saves, full=True)
        assert saves.failures == 5
        story.step(saves)
        saves.settle()
        assert (saves.in_a_row, saves.saved) == (0, 7)


def test_what_must_be_saved_is_tried_whatever_failed_before(story):
    story, saves = story(max_failures=1)
    with story.directory, saves:
        story.step(saves, full=True)
        story.step(saves, must=True)
        assert read_pointer(saves.checkpoints, "latest") == "step_0000002"
        with pytest.raises(SaveFailed, match="put this right, and the same command goes on"):
            story.step(saves, full=True, must=True)
        story.step(saves, full=True)
        with pytest.raises(SaveFailed, match="step_0000004"):
            story.step(saves)


def test_a_step_that_is_not_saved_is_before_a_run_stops(story):
    """In the middle of an evaluation, before which its save failed, or is under way, or is done."""
    story, saves = story()
    with story.directory, saves:
        story.step(saves, full=True)
        story.full = False
        saves.secure()
        assert read_pointer(saves.checkpoints, "latest") == "step_0000001"
        story.step(saves)
        saves.saver.start = None  # nothing is saved once more
        saves.secure()
        saves.secure()
        assert (saves.failures, saves.saved) == (1, 2)


def test_best_names_what_is_there(story):
    """The best of those that were saved, and nothing where none was; retention spares it."""
    story, saves = story(asynchronous="false", max_failures=9)
    with story.directory, saves:
        assert saves.point_best()
        for step, top1 in enumerate((0.3, 0.9, 0.8, 0.1, 0.2), start=1):
            story.step(saves, full=step == 2)
            story.log.monitor_row(step, {"knn_top1": top1})
            saves.point_best()
        assert read_pointer(saves.checkpoints, "best") == "step_0000003"
        assert sorted(path.name[-1] for path in saves.checkpoints.glob("step_*")) == ["3", "4", "5"]
        (saves.checkpoints / "step_0000003").rename(saves.checkpoints / "step_0000003.damaged-1")
        assert saves.point_best()
        assert read_pointer(saves.checkpoints, "best") == "step_0000005"
        for step in (4, 5):
            (saves.checkpoints / f"step_000000{step}").rename(saves.checkpoints / f"step_000000{step}.damaged-1")
        assert saves.point_best()
        assert read_pointer(saves.checkpoints, "best") is None


def test_retention_waits_until_best_could_be_written(story, monkeypatch):
    story, saves = story(asynchronous="false")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device", "best")

    with story.directory, saves:
        for step, top1 in enumerate((0.9, 0.1, 0.2, 0.3), start=1):
            with monkeypatch.context() as patched:
                if step < 4:
                    patched.setattr("engine.runs.saves.point", refuse)
                story.step(saves)
                story.log.monitor_row(step, {"knn_top1": top1})
        assert read_pointer(saves.checkpoints, "best") == "step_0000001"
        assert sorted(path.name[-1] for path in saves.checkpoints.glob("step_*")) == ["1", "3", "4"]
        assert story.log.failures == 2


def test_a_folder_that_was_deleted_is_noticed_by_the_next_save(story):
    story, saves = story()
    with story.directory, saves:
        story.directory.path.rename(story.directory.path.with_name("elsewhere"))
        story.step(saves)
        with pytest.raises(RunFailed, match="was deleted or replaced while the run went on"):
            story.step(saves)
        assert not story.directory.path.exists()
