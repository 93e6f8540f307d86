"""Schedules, against golden numbers."""

import json
from pathlib import Path

import pytest

from engine.training.schedule import MocoSchedule, Schedule

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("golden", json.loads((GOLDEN / "F_schedules.json").read_text()), ids=lambda g: g["recipe"])
def test_schedules(golden):
    keys = ("epochs", "warmup_epochs", "steps_per_epoch", "momentum")
    peak_lr = golden["base_lr"] * golden["global_batch"] / 256
    schedule = MocoSchedule(peak_lr=peak_lr, **{key: golden[key] for key in keys})
    assert schedule.steps_per_epoch == golden["images"] // golden["global_batch"]
    assert schedule.total_steps == golden["total_steps"]
    for step, lr, momentum in golden["rows"]:
        assert schedule.learning_rate_at(step) == pytest.approx(lr, rel=1e-12)
        assert schedule.momentum_at(step) == pytest.approx(momentum, rel=1e-12)


def test_without_warmup_the_first_step_has_the_peak():
    schedule = Schedule(peak_lr=0.2, epochs=2, warmup_epochs=0, steps_per_epoch=5)
    assert schedule.learning_rate_at(0) == 0.2
    all_warmup = Schedule(peak_lr=0.2, epochs=2, warmup_epochs=2, steps_per_epoch=5)
    assert all_warmup.learning_rate_at(9) == pytest.approx(0.2 * 0.9)
