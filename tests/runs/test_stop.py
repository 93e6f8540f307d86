"""A signal stops a run after the step in which all ranks know of it, whatever the step's gradients are."""

import json
import os
import signal

import numpy as np
import pytest
import torch.distributed as dist

from engine.distributed import signals
from engine.distributed.signals import SIGNALS, StopSignal
from engine.errors import Interrupted, RunFailed, UserError
from engine.evaluation import features
from engine.recipe.load import load
from engine.runs import trainer
from engine.runs.directory import RunDirectory
from engine.runs.linear import LinearClassification, linear
from engine.runs.pretrain import Pretraining, pretrain
from engine.runs.saves import Saves
from engine.runs.task import SKIPS_IN_A_ROW
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import CHECKPOINT, linear_recipe, rows

FEW = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", "log.every_steps=100", "checkpoint.every_steps=100"]


def train(world, directory, *overrides):
    pretrain(load(RECIPE, [*FEW, f"run.dir={directory}", *overrides]), RECIPE, world)


def before_steps(monkeypatch, task, act) -> None:
    """Call act(number of the step) before each step."""
    step = task.train_step
    monkeypatch.setattr(task, "train_step", lambda self, batch: act(self.step + 1) or step(self, batch))


def signal_before(wanted: int, signum: int):
    return lambda step: os.kill(os.getpid(), signum) if step == wanted else None


@pytest.fixture
def heeds_hangups():
    """As where nohup does not start the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_hangups")
@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "lr", [4e-3, 1e300]
)  # the second makes gradients that are not finite from step 3 on, as the first rate is 0
def test_a_signal_is_heard_one_step_later_and_the_state_is_saved(world, tmp_path, monkeypatch, signum, lr):
    before = signal.getsignal(signum)
    before_steps(monkeypatch, Pretraining, signal_before(5, signum))
    with pytest.raises(Interrupted) as stop:
        train(world, tmp_path, f"optimizer.base_lr={lr}")
    assert (stop.value.signum, stop.value.status) == (signum, 128 + signum)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000006"
    assert (tmp_path / "REQUEUE").exists() == (signum != signal.SIGINT), "a person's word is final"
    assert signal.getsignal(signum) == before


def test_a_file_stops_a_run_which_removes_it_and_leaves_no_mark(world, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0)
    (tmp_path / "REQUEUE").touch()
    before_steps(monkeypatch, Pretraining, lambda step: (tmp_path / "STOP").touch() if step == 3 else None)
    with pytest.raises(Interrupted) as stop:
        train(world, tmp_path)
    assert stop.value.status == 0
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000004"
    assert not {"STOP", "REQUEUE"} & {path.name for path in tmp_path.iterdir()}
    (tmp_path / "STOP").touch()
    train(world, tmp_path, "train.max_steps=4")
    assert not (tmp_path / "STOP").exists(), "a run at its end has stopped"


@pytest.mark.parametrize("by", ["SIGTERM", "the file STOP"])
def test_what_stopped_it_is_said_while_signals_are_heeded(world, tmp_path, monkeypatch, by):
    """A launcher ends the ranks that are on their way out when another has ended: their words would be lost."""
    said, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals, "say", lambda text: said.append((text, signal.getsignal(signal.SIGTERM) != before)))
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0)
    ask = kill_self if by == "SIGTERM" else (tmp_path / "STOP").touch
    before_steps(monkeypatch, Pretraining, lambda step: ask() if step == 1 else None)
    with pytest.raises(Interrupted) as stop:
        train(world, tmp_path)
    assert said == [(f"stopped by {by} {stop.value.where}; the same command goes on", True)]


def test_a_hangup_that_is_ignored_stays_so(world, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_steps(monkeypatch, Pretraining, signal_before(1, signal.SIGHUP))
        train(world, tmp_path, "train.max_steps=3")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("owner", "where"),
    [(RunDirectory, "__enter__"), *((Pretraining, name) for name in ("start", "batches", "train_step"))],
)
def test_before_a_step_is_made_a_signal_ends_the_run_at_once(world, tmp_path, monkeypatch, owner, where):
    """While it waits for its directory, on the way to the loop, and to the first step of a run that goes on."""
    train(world, tmp_path, "train.max_steps=2")
    own = getattr(owner, where)
    stopping = lambda self, *a, **k: os.kill(os.getpid(), signal.SIGUSR1) or own(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(owner, where, stopping)
    with pytest.raises(Interrupted) as stop:
        train(world, tmp_path, "train.max_steps=4")
    assert stop.value.where == "before a step was made; nothing is lost"
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000002"
    assert (tmp_path / "REQUEUE").exists()
    monkeypatch.setattr(owner, where, own)
    train(world, tmp_path, "train.max_steps=4")
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000004"
    assert not (tmp_path / "REQUEUE").exists()


def test_an_evaluation_ends_at_one_of_its_next_batches_and_is_made_by_the_resumed_run(world, tmp_path, monkeypatch):
    """Also after the last step; the state was saved before."""
    batches, own = [], Pretraining.evaluate
    monkeypatch.setattr(features, "BATCH", 2)

    def stopped(self):
        if self.step:
            ask = self.at_batch
            self.at_batch = lambda number: (batches.append(number), number == 1 and kill_self(), ask(number))
        return own(self)

    monkeypatch.setattr(Pretraining, "evaluate", stopped)
    few = ["train.max_steps=2", "evaluate.knn_every_epochs=1"]
    with pytest.raises(Interrupted, match="after step 2, which is saved, during its evaluation"):
        train(world, tmp_path / "stopped", *few)
    assert batches == list(range(2 * trainer.ASK_EVERY + 1))
    assert [row["step"] for row in rows(tmp_path / "stopped", "knn_top1")] == [0]
    monkeypatch.setattr(Pretraining, "evaluate", own)
    for name in ("stopped", "whole"):
        train(world, tmp_path / name, *few)
    found, expected = (rows(tmp_path / name, "knn_top1") for name in ("stopped", "whole"))
    assert found == expected
    assert [row["step"] for row in found] == [0, 2]


def test_what_refuses_the_save_of_a_stopped_evaluation_ends_the_run(world, tmp_path, monkeypatch):
    """An evaluation that fails is left out; the save is none of it."""
    own = Pretraining.evaluate

    def stopped(self):
        ask = self.at_batch
        self.at_batch = lambda number: (number == 1 and self.step and kill_self(), ask(number))
        return own(self)

    def refuse(self):
        raise UserError("another run writes here")

    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(Pretraining, "evaluate", stopped)
    monkeypatch.setattr(Saves, "secure", refuse)
    with pytest.raises(UserError, match="another run writes here"):
        train(world, tmp_path, "train.max_steps=2", "evaluate.knn_every_epochs=1")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_step_without_a_guard_over_ranks_sends_signals_by_themselves(world, tmp_path, monkeypatch):
    before_steps(monkeypatch, LinearClassification, signal_before(2, signal.SIGTERM))
    with pytest.raises(Interrupted):
        linear(linear_recipe(tmp_path), CHECKPOINT, "base", world)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000003"


def test_a_signal_costs_no_message_of_its_own(world, tmp_path, monkeypatch):
    """One sum over ranks that is not BatchNorm's guards a step, and no other is made between logged steps."""
    sums, own = [], dist.all_reduce
    before_steps(monkeypatch, Pretraining, lambda _: sums.append([]))
    monkeypatch.setattr(dist, "all_reduce", lambda x, *a, **k: [s.append(x) for s in sums[-1:]] and own(x, *a, **k))
    train(world, tmp_path, "train.max_steps=6", "evaluate.online_probe=false")
    assert [[tuple(x.shape) for x in step] for step in sums[1:5]] == [[(1 + len(signals.WORDS),)]] * 4


def test_steps_without_update_end_a_run_between_two_lines_of_the_log(world, tmp_path):
    """Whose advice names another precision only where that would change something."""
    for precision, advice in (
        ("float64", "start anew"),
        ("bf16", "go on with parallel.precision=float32, or start anew"),
    ):
        last = f"the last {SKIPS_IN_A_ROW} steps up to {SKIPS_IN_A_ROW + 2} had gradients .* were harmed: {advice}"
        with pytest.raises(RunFailed, match=last):
            train(world, tmp_path / precision, "optimizer.base_lr=1e300", f"parallel.precision={precision}")
        rows = [json.loads(line) for line in (tmp_path / precision / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1]


def test_of_several_signals_the_last_counts(world):
    stop = StopSignal(world)
    none, hangup, term, person, file = np.eye(len(signals.WORDS))[[0, 0, 2, 3, 4]] * [[0], [3], [1], [1], [1]]
    said = [stop.loudest(counts) for counts in (none, hangup, hangup + term, term + person, hangup + person + file)]
    assert said == [None, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signals.FILE]
    stop.received = {signal.SIGTERM, signals.FILE}
    assert stop.message().tolist() == [0, 0, 1, 0, 1]
