"""What is seen of a run while it trains: lines of the log, lines beside a bar, time and memory in metrics.jsonl."""

import json
import re
import sys
import time

import pytest

from engine.recipe.load import load
from engine.runs import watching
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL

LINE = re.compile(
    r"step (\d)/4  loss [\d.]+  [\d,]+ images/s  epoch ([\d.]+) of 3  (\d+)%  lr [-\de.]+  [\d.]+ GB"
    r"(  \d:\d\d:\d\d left)?  rankme ([\d.]+) -> ([\d.]+) of 16"
)


@pytest.fixture
def lines(world, tmp_path, capfd):
    """Those of the steps of a small run, two to an epoch."""

    def found(name, *more):
        values = [*SMALL, "data.dataset_options={size: 17, image_size: [3, 36, 40], num_classes: 4}", *more]
        values += ["model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={tmp_path / name}", "train.max_steps=4"]
        pretrain(load(RECIPE, values), RECIPE, world)
        said = capfd.readouterr().out.splitlines()
        return [LINE.search(line).groups() for line in said if " images/s  " in line]

    return found


def test_each_logged_step_has_its_place_and_the_way_of_rankme(lines, tmp_path):
    began = time.time()
    found = lines("run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(step, epoch, share) for step, epoch, share, *_ in found] == [
        *(("1", "0.5", "25"), ("2", "1.0", "50"), ("3", "1.5", "75"), ("4", "2.0", "100"))
    ]
    assert [left is not None for *_, left, _, _ in found] == [False, True, True, False]
    assert [now for *_, now in found] == [f"{row['rankme']:.1f}" for row in rows]
    assert {first for *_, first, _ in found} == {f"{rows[0]['rankme']:.1f}"}
    times = [row["unix_time"] for row in rows]
    assert began - 1 < times[0] <= times[-1] <= time.time() + 1
    assert all(0.01 < row["memory_gb"] < 1000 for row in rows)


def test_a_terminal_gets_a_line_for_each_epoch_beside_its_bar(lines, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [step for step, *_ in lines("bar")] == ["2", "4"]


def test_the_time_left_is_by_the_pace_of_this_launch(monkeypatch, world):
    now = iter((100.0, 160.0, 130.0))

    class Task:
        most_rankme = 8

    task = Task()
    task.world, task.recipe = world, load(RECIPE)
    monkeypatch.setattr(watching.time, "time", lambda: next(now))
    watch = watching.Watch(task, 100, {"rankme": 2.0})
    row = {"loss": 1.0, "images_per_second": 5.0, "epoch": 3.0, "lr": 0.5, "rankme": None}
    texts = [watch.line(step, row | watch.measure()) for step in (10, 40, 70)]
    assert [text.partition(" GB")[2] for text in texts] == ["", "  0:02:00 left", "  0:00:15 left"]
