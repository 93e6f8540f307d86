"""A run outlives a disk that is full for a while: it ends as if nothing had been, or says in one line what was lost."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.checkpoint.manifest import read_manifest
from tests.distributed.commands import rows, timeless
from tests.distributed.launch import on_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the signal of a file that grows too large")

STEPS = "train.max_steps=12"
MONITORED = ["evaluate.knn_every_epochs=1", "evaluate.knn_bank=6"]  # after steps 0, 7 and 12


RUNS = {
    "unbroken": {"overrides": MONITORED},
    "first": {"overrides": [*MONITORED, "checkpoint.max_failures=4"], "full": [6, 8], "ranks": [0]},  # three saves
    "last": {"full": [11, 12]},
    "gone": {"gone": 5},
}
MORE = {
    "unbroken": RUNS["unbroken"],
    "other": {"overrides": [*MONITORED, "checkpoint.asynchronous=false"], "full": [6, 7], "ranks": [1]},
    "often": {"overrides": ["checkpoint.max_failures=2"], "full": [5, 12], "ranks": [1]},
}
OTHER, OFTEN = (pytest.param((MORE, name), marks=pytest.mark.faults) for name in ("other", "often"))


class Launched(NamedTuple):
    folder: Path  # of all runs
    ends: dict[str, str]  # how each ended
    said: list[str]  # on stderr


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Callable[[dict], Launched]:
    """Runs on two ranks, in one launch for all of them."""

    @functools.cache
    def launched(more: bool) -> Launched:
        folder = tmp_path_factory.mktemp("runs")
        runs = [
            {"dir": str(folder / name), "ranks": [0, 1], **run, "overrides": [STEPS, *run.get("overrides", [])]}
            for name, run in (MORE if more else RUNS).items()
        ]
        out, err = on_ranks(2, "tests.distributed.full_disk", json.dumps(runs))
        ends = next(json.loads(line) for line in out.splitlines() if line.startswith("{"))
        return Launched(folder, ends, err.splitlines())

    return lambda runs: launched(runs is MORE)


@pytest.fixture
def launched(launch, request) -> tuple[str, Launched]:
    """One of the runs, and all of its launch."""
    runs, name = request.param
    return name, launch(runs)


@pytest.mark.parametrize("launched", [(RUNS, "first"), OTHER], indirect=True)
def test_a_run_goes_on_and_ends_equal_to_the_bit(launched):
    name, (folder, ends, said) = launched
    assert ends["unbroken"] == ends[name] == "done"
    whole, broken = (folder / run / "checkpoints" for run in ("unbroken", name))
    newest = (whole / "latest").read_text().strip()
    assert newest == (broken / "latest").read_text().strip() == "step_0000012"
    one, other = (read_manifest(at / newest) for at in (whole, broken))
    assert one.files == other.files
    assert timeless(folder / name) == timeless(folder / "unbroken")
    assert [row for row in rows(folder / name) if "knn_top1" in row] == [
        row for row in rows(folder / "unbroken") if "knn_top1" in row
    ]
    failed = {"first": (6, 7, 8), "other": (6, 7)}[name]
    for step in range(2, 13, 2):
        assert (broken / f"step_{step:07d}").exists() == (step not in failed)
    for count, step in enumerate(failed, start=1):
        line = next(line for line in said if f"{name}/checkpoints/step_{step:07d}) was not saved" in line)
        assert "the previous checkpoint, step_0000004, is intact: " in line
        assert "[Errno 27] File too large: '" in line
        assert f"makes up for it ({count} in a row failed, and " in line
    assert not [path.name for path in broken.iterdir() if ".tmp-" in path.name]


def test_the_log_waits_in_memory(launch):
    folder, _, said = launch(RUNS)
    lines = [line for line in said if f"{folder / 'first'}/metrics.jsonl c" in line]
    assert len(lines) == 2
    assert "could not be written (File too large); training goes on, and what it lacks stays in memory" in lines[0]
    assert lines[1].endswith("can be written again, and lacks nothing")
    board = EventAccumulator(str(folder / "first/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))


def test_best_names_a_checkpoint_that_is_there(launch):
    folder = launch(RUNS).folder
    best = {row["step"]: row["knn_top1"] for row in rows(folder / "first") if "knn_top1" in row}
    assert best.keys() == {0, 7, 12}
    assert (folder / "first/checkpoints/best").read_text() == "step_0000012\n"


@pytest.mark.parametrize(
    ("launched", "failed", "whole"),
    [((RUNS, "last"), 12, 10), pytest.param(*OFTEN.values, 8, 4, marks=OFTEN.marks)],
    indirect=["launched"],
)
def test_a_save_that_nothing_makes_up_for_ends_the_run(launched, failed, whole):
    name, (_, ends, _) = launched
    where = (
        f"/{name}/checkpoints/step_{failed:07d}) was not saved, the previous checkpoint, step_{whole:07d}, is intact: "
    )
    assert ends[name].startswith("SaveFailed: checkpoint (")
    assert where in ends[name]
    assert ends[name].endswith("; put this right, and the same command goes on")
    assert "\n" not in ends[name]


def test_a_folder_that_is_deleted_ends_the_run(launch):
    folder, ends, _ = launch(RUNS)
    assert ends["gone"].startswith(
        f"RunFailed: run.dir ({folder / 'gone'}) was deleted or replaced while the run went on"
    )
    assert not (folder / "gone").exists()
