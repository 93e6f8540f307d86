"""The log of a run: what a resume keeps and how much of it it reads, and that no step is logged twice."""

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import files
from engine.errors import UserError
from engine.pictures.curves import read_run
from engine.recipe.load import dump, load
from engine.runs.log import MetricsLog
from engine.runs.tail import RECENT
from engine.weights.opening import _metrics
from tests.recipe.shipped import QUICK


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def log_steps(log: MetricsLog, steps: range) -> None:
    """A run with a kNN row every second step, before step 1 too."""
    for step in steps:
        if step:
            log.loss_row(step, {"loss": step / 7, "lr": 1e-3})
        if step % 2 == 0:
            log.monitor_row(step, {"knn_top1": step / 100, "knn_k": 20})


def test_rows_are_lines_with_step_first_and_json_numbers(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log.loss_row(1, {"loss": float("nan"), "lr": 0.1, "note": "ä", "norm": float("-inf"), "skipped": 0})
    line = (tmp_path / "metrics.jsonl").read_bytes()  # before close: a row is on its way to the disk at once
    log.close()
    assert line == b'{"step": 1, "loss": null, "lr": 0.1, "note": "\\u00e4", "norm": null, "skipped": 0}\n'


def test_no_step_has_two_rows_of_a_kind(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log_steps(log, range(0, 3))
    log_steps(log, range(0, 3))
    log.close()
    log = MetricsLog(tmp_path, 2)
    log_steps(log, range(0, 4))
    log.close()
    assert [(row["step"], "knn_top1" in row) for row in rows_of(tmp_path)] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
    ]


@settings(max_examples=25)
@given(stopped=st.integers(0, 8), resumed=st.integers(-1, 8), torn=st.integers(0, 40), data=st.data())
def test_resume_keeps_lines_up_to_its_checkpoint_byte_for_byte(tmp_path_factory, stopped, resumed, torn, data):
    """Whatever came after the checkpoint, and wherever the last line was torn: the log of a run without a stop."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    log = MetricsLog(whole, -1)
    log_steps(log, range(0, 10))
    log.close()
    expected = (whole / "metrics.jsonl").read_bytes()
    lines = expected.splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= resumed]
    later = [line for line in lines if resumed < json.loads(line)["step"] <= stopped]
    tail = data.draw(st.sampled_from([b"", lines[-1][:torn], b"\0" * torn, b'\xff{"step"']))
    (broken / "metrics.jsonl").write_bytes(b"".join(kept + later) + tail)

    log = MetricsLog(broken, resumed)
    assert (broken / "metrics.jsonl").read_bytes() == b"".join(kept)
    log_steps(log, range(max(resumed, 0), 10))
    log.close()
    assert (broken / "metrics.jsonl").read_bytes() == expected
    assert {path.name for path in broken.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_knn_row_lost_between_checkpoint_and_log_is_made_once(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log_steps(log, range(0, 4))
    log.loss_row(4, {"loss": 1.0})  # the checkpoint of step 4 was saved, then the run stopped
    log.close()
    for expected in (False, True):
        log = MetricsLog(tmp_path, 4)
        assert log.has_monitor_row(2)
        assert log.has_monitor_row(4) is expected
        log.monitor_row(4, {"knn_top1": 0.5})
        log.sync()
        log.close()
    assert [row["step"] for row in rows_of(tmp_path) if "knn_top1" in row] == [0, 2, 4]


def test_a_line_that_is_no_row_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in (b"not json\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\n"):
        content = b'{"step": 1, "loss": 2}\n' + bad + b'{"step": 2, "loss": 2}\n'
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"metrics.jsonl line 2 \(.*\) must be"):
            MetricsLog(tmp_path, 1)
        assert path.read_bytes() == content


def test_a_damaged_row_of_the_monitor_is_named_wherever_it_is(tmp_path):
    """At the start, and not when the run is over."""
    rows = "".join(f'{{"step": {step}, "loss": 2}}\n' for step in range(1, 2000))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn_top1": 0.\n' + rows)
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 \(.*\) must be"):
        MetricsLog(tmp_path, 1999)


@pytest.mark.parametrize("steps", [[3, 1, 2, 5, 4], [1, 2, 9, 3, 4], [4, 4, 4]])
def test_a_log_that_does_not_ascend_is_read_from_its_beginning(tmp_path, steps):
    lines = [b'{"step": %d, "loss": 1}\n' % step for step in steps]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"ste')
    MetricsLog(tmp_path, 4).close()
    kept = [line for line, step in zip(lines, steps, strict=True) if step <= 4]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_a_log_that_is_read_from_its_beginning_gives_as_many_losses(tmp_path):
    """Whatever rows lie between them."""
    steps = [2, 1, *range(3, 400)]
    rows = [{"step": s} | ({"loss": 1.0} if s % 3 == 0 else {"knn_top1": 0.5}) for s in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = MetricsLog(tmp_path, 399)
    assert [row["step"] for row in log.recent] == [*range(399 - 3 * (RECENT - 1), 400, 3)]
    log.close()


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Raises where the body held more bytes at a time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, peak


def test_a_long_log_is_neither_read_nor_held_whole(tmp_path, monkeypatch):
    """Of 40,000 rows in 10 MB, with the monitor's among them: what a resume, closing words, exports and comparisons ask
    for. Rows are counted as they are made of lines."""
    made, row_on = [], files.row_on
    for module in ("files", "runs.tail", "weights.opening"):
        monkeypatch.setattr(f"engine.{module}.row_on", lambda *line: made.append(0) or row_on(*line))
    steps, health = 40_000, {f"metric_{number}": number / 7 for number in range(8)}
    (tmp_path / "recipe.yaml").write_text(dump(load(QUICK)))
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "epoch": step / 100, "loss": 1.0, **health}) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, "knn_top1": step / steps}) + "\n")
    whole = path.read_bytes()

    with little_memory(2 << 20):
        log = MetricsLog(tmp_path, steps - 500)
    assert len(made) < 500 + 300 + RECENT + steps // 1000
    assert whole.startswith(path.read_bytes())
    assert [row["step"] for row in log.recent] == [*range(steps - 500 - RECENT + 1, steps - 500 + 1)]
    made.clear()
    with little_memory(2 << 20):
        assert [log.best_step(lambda _: True), len(log.monitor_rows)] == [steps - 1000, steps // 1000 - 1]
        log.monitor_row(steps, {"knn_top1": 1.0})
        assert [log.best_step(lambda _: True), len(log.monitor_rows)] == [steps, steps // 1000]
    assert not made
    log.close()
    made.clear()
    with little_memory(2 << 20):
        assert _metrics(path, steps) == {"epoch": (steps - 500) / 100, "knn_top1": 1.0}
    assert len(made) == 2
    with little_memory(64 * steps):
        assert len(read_run(tmp_path).columns["loss"][0]) == steps - 500


def test_a_knn_row_is_known_by_its_top1(tmp_path):
    log = MetricsLog(tmp_path, -1)
    with pytest.raises(ValueError, match="knn_top1"):
        log.monitor_row(1, {"top1": 0.1})
    log.close()


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path / "run", -1, enabled=False)
    log_steps(log, range(0, 4))
    log.picture("views/1", torch.zeros(3, 4, 4, dtype=torch.uint8), 1)
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    log = MetricsLog(tmp_path, -1)
    log_steps(log, range(0, 7))
    log.picture("views/1", torch.full((3, 4, 5), 200, dtype=torch.uint8), 1)
    log.close()
    log = MetricsLog(tmp_path, 4)
    log_steps(log, range(4, 9))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in board.Scalars("evaluate/knn_top1")] == [0, 2, 4, 6, 8]
    assert board.Scalars("train/loss")[-1].value == pytest.approx(8 / 7)
    assert (board.Images("views/1")[0].width, board.Images("views/1")[0].height) == (5, 4)
