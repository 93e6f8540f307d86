"""A signal stops a run after the step in which all ranks know of it, whatever the step's gradients are."""

import json
import os
import signal

import pytest
import torch.distributed as dist

from engine.distributed.signals import SIGNALS, StopSignal
from engine.distributed.world import process_group
from engine.errors import Interrupted, RunFailed
from engine.recipe.load import load
from engine.runs.linear import LinearClassification, linear
from engine.runs.pretrain import Pretraining, pretrain
from engine.runs.task import SKIPS_IN_A_ROW
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import CHECKPOINT, linear_recipe

FEW = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", "log.every_steps=100", "checkpoint.every_steps=100"]


@pytest.fixture(scope="module")
def world():
    with process_group() as world:
        yield world


def train(world, directory, *overrides):
    pretrain(load(RECIPE, [*FEW, f"run.dir={directory}", *overrides]), RECIPE, world)


def before_steps(monkeypatch, task, act) -> None:
    """Call act(number of the step) before each step."""
    step = task.train_step
    monkeypatch.setattr(task, "train_step", lambda self, batch: act(self.step + 1) or step(self, batch))


def signal_before(wanted: int, signum: int):
    return lambda step: os.kill(os.getpid(), signum) if step == wanted else None


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "lr", [4e-3, 1e300]
)  # the second makes gradients that are not finite from step 3 on, as the first rate is 0
def test_a_signal_is_heard_one_step_later_and_the_state_is_saved(world, tmp_path, monkeypatch, signum, lr):
    before_steps(monkeypatch, Pretraining, signal_before(5, signum))
    with pytest.raises(Interrupted) as stop:
        train(world, tmp_path, f"optimizer.base_lr={lr}")
    assert stop.value.signum == signum
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_0000006"
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)


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
    assert [[tuple(x.shape) for x in step] for step in sums[1:5]] == [[(1 + len(SIGNALS),)]] * 4


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
    assert [stop.loudest(counts) for counts in ((0, 0), (3, 0), (0, 1), (2, 1))] == [0, 2, 15, 15]
    stop.received = signal.SIGTERM
    assert stop.message().tolist() == [0, 1]
