"""What ends a run from outside is one line that says what is kept, and the run goes on equal to an unbroken one."""

import itertools
import multiprocessing
import os
import threading

import pytest

from engine.data.torchvision import TorchvisionSource
from engine.errors import RunFailed
from engine.recipe.load import load
from engine.runs.pretrain import Pretraining, pretrain
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import rows

FEW = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=1", "checkpoint.every_steps=2", "train.max_steps=6"]


def train(world, directory, *overrides):
    pretrain(load(RECIPE, [*FEW, f"run.dir={directory}", *overrides]), RECIPE, world)


def losses(directory) -> list[float]:
    return [row["loss"] for row in rows(directory, "loss")]


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> list[float]:
    directory = tmp_path_factory.mktemp("unbroken")
    train(world, directory)
    return losses(directory)


@pytest.mark.parametrize(("count", "what"), [(1, "came from the loading processes"), (0, "could be read")])
def test_a_disk_that_does_not_answer_ends_a_run_which_is_saved(world, tmp_path, monkeypatch, unbroken, count, what):
    reads, over, own = itertools.count(), threading.Event(), TorchvisionSource.read

    def read(self, i):
        is_for_a_batch = multiprocessing.parent_process() is not None or threading.current_thread().name == "read"
        if is_for_a_batch and next(reads) >= 24:
            over.wait(600)
            raise OSError("nobody waits any more")
        return own(self, i)

    monkeypatch.setattr(TorchvisionSource, "read", read)
    with pytest.raises(RunFailed) as failure:
        train(world, tmp_path, "run.timeout_minutes=0.01", f"data.workers={count}")
    over.set()
    assert str(failure.value) == (
        f"no image {what} for 0.01 minutes: the disk that holds the images may not answer; "
        "checkpoint step_0000003 is kept, and the same command goes on"
    )
    monkeypatch.setattr(TorchvisionSource, "read", own)
    train(world, tmp_path)
    assert losses(tmp_path) == unbroken


def test_a_loading_process_that_is_killed_ends_the_run_which_is_saved(world, tmp_path, monkeypatch, unbroken):
    own = Pretraining.train_step

    def killing(self, batch):
        if self.step == 0:
            multiprocessing.active_children()[0].kill()
        return own(self, batch)

    monkeypatch.setattr(Pretraining, "train_step", killing)
    words = r"^a loading process died \(Killed\): memory .*; checkpoint step_000000[1-4] is kept, and the"
    with pytest.raises(RunFailed, match=words):
        train(world, tmp_path)
    monkeypatch.setattr(Pretraining, "train_step", own)
    train(world, tmp_path)
    assert losses(tmp_path) == unbroken


def test_a_loading_process_that_is_killed_before_an_evaluation_ends_the_run(world, tmp_path, monkeypatch):
    own = Pretraining.evaluate

    def killing(self):
        if self.step:
            multiprocessing.active_children()[0].kill()
        return own(self)

    monkeypatch.setattr(Pretraining, "evaluate", killing)
    with pytest.raises(RunFailed, match=r"^a loading process died .*; checkpoint step_\d+ is kept, and the same"):
        train(world, tmp_path, "evaluate.knn_every_epochs=1", "train.epochs=1", "train.max_steps=99")


def test_loading_processes_are_forked_once_before_the_run_has_threads(world, tmp_path, monkeypatch):
    """What a thread held at a fork would be held in the new process for ever."""
    before, seen, own = set(threading.enumerate()), [], os.fork

    def fork():
        seen.append(set(threading.enumerate()))
        return own()

    monkeypatch.setattr(os, "fork", fork)
    train(world, tmp_path, "data.workers=2", "evaluate.knn_every_epochs=1", "train.max_steps=14")
    assert len(list(rows(tmp_path, "knn_top1"))) == 3
    assert [threads - before for threads in seen] == [set(), set()]
