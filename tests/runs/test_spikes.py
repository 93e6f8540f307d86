"""The alarm for gradients that leave their scale: what is a spike, and that a resume changes nothing about it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.runs.pretrain import Pretraining, pretrain
from engine.runs.spikes import AT_LEAST, SpikeAlarm
from engine.runs.tail import RECENT
from tests.distributed.trajectories import RECIPE, SMALL


def judged(norms: list[float], rows: list[dict]) -> list[dict]:
    """The rows and those of more logged steps, judged by an alarm that begins behind the first of them."""
    alarm, rows = SpikeAlarm(rows[-RECENT:]), list(rows)
    for norm in norms:
        alarm.judge(len(rows) + 1, norm)
        # A row has null for what is not finite.
        rows.append({"grad_norm": norm if abs(norm) < float("inf") else None, "spikes": alarm.count})
    return rows


def spikes(norms: list[float]) -> list[int]:
    return [row["spikes"] for row in judged(norms, [])]


@pytest.mark.parametrize(("norm", "found"), [(10.0, 0), (10.01, 1), (float("inf"), 0), (float("nan"), 0), (0.0, 0)])
def test_a_spike_is_more_than_ten_times_the_median(norm, found, capsys):
    usual = [1.0] * AT_LEAST
    assert spikes([*usual, norm, *usual]) == [0] * AT_LEAST + [found] * (AT_LEAST + 1)
    said = f"step {AT_LEAST + 1}: the norm of the gradients (10) is more than 10 times the median of the last "
    assert capsys.readouterr().err.count(f"{said}{AT_LEAST} logged steps (1): spike 1 of this run") == found


def test_without_a_history_nothing_is_a_spike():
    assert spikes([*[1.0] * (AT_LEAST - 1), 99.0, 99.0]) == [0] * AT_LEAST + [1]
    assert spikes([*[float("nan")] * RECENT, 1.0, 99.0])[-1] == 0


def test_of_spikes_in_a_row_the_first_is_said(capsys):
    assert spikes([*[1.0] * AT_LEAST, 99.0, 98.0, 97.0, 1.0, 99.0])[-1] == 4
    assert capsys.readouterr().err.count("the norm of the gradients (99) is") == 2


def test_the_scale_is_that_of_the_last_steps():
    assert spikes([*[1.0] * RECENT, *[100.0] * RECENT, 999.0, 1001.0])[-2:] == [RECENT // 2, RECENT // 2 + 1]


@settings(max_examples=50)
@given(norms=st.lists(st.sampled_from([1.0, 2.0, 50.0, float("nan")]), min_size=30, max_size=150), data=st.data())
def test_a_resumed_run_judges_as_an_unbroken_one(norms, data):
    stopped, said = data.draw(st.integers(0, len(norms))), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.runs.spikes.warn", said.append)
        unbroken, lines = judged(norms, []), said.copy()
        said.clear()
        assert judged(norms[stopped:], judged(norms[:stopped], [])) == unbroken
    assert said == lines


def test_a_run_says_and_counts_its_spikes(tmp_path, monkeypatch, capfd):
    """Stopped just before one and resumed, and with the alarm off."""
    measured = Pretraining.metrics

    def shaken(task, output):
        row = measured(task, output)
        return row | ({"grad_norm": 1e3 * row["grad_norm"]} if task.step in (3, 23, 25) else {})

    monkeypatch.setattr(Pretraining, "metrics", shaken)
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", "train.epochs=4", f"run.dir={tmp_path}"]
    with process_group() as world:
        for more in (["train.max_steps=22"], ["train.max_steps=24"], ["train.max_steps=26", "train.on_spike=null"]):
            pretrain(load(RECIPE, [*values, *more]), RECIPE, world)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row.get("spikes") for row in rows] == [0] * 22 + [1, 1, None, None]
    said = capfd.readouterr().err
    assert said.count("the norm of the gradients") == said.count("warning: step 23: the norm of the gradients") == 1
