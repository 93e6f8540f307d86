"""Damage, a disk that refuses, a clock that goes back, one bad rank: a run ends as it should, or says why it does not.

Two ranks; what fills a disk's bytes is in test_full_disk.
"""

import errno
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.commands import checkpoint_sums, rows, timeless
from tests.distributed.launch import torchrun
from tests.distributed.mishaps import BAD_STEP, FLIPPED

pytestmark = pytest.mark.faults


class Launched(NamedTuple):
    folder: Path
    ends: dict[str, str]
    out: str
    err: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Launched:
    folder = tmp_path_factory.mktemp("runs")
    done = torchrun(2, "tests.distributed.mishaps", folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    ends = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return Launched(folder, ends, done.stdout, done.stderr)


@pytest.mark.parametrize("name", ["flipped", "no_inodes", "read_only", "clock"])
def test_it_ends_equal_to_the_bit(launched, name):
    assert set(launched.ends[name].split()) == {"done"}
    assert launched.ends["whole"] == launched.ends["clock, resumed"] == "done"
    one, other = launched.folder / name, launched.folder / "whole"
    assert timeless(one) == timeless(other)
    assert checkpoint_sums(one) == checkpoint_sums(other)


def test_a_flipped_byte_costs_one_checkpoint(launched):
    at = launched.folder / "flipped/checkpoints"
    resumed = [f"resumed   {at}/step_00000{step:02}" for step in (4, 6, 8, 10)]
    assert [line.partition("  ")[2].split(" at step")[0] for line in launched.out.splitlines() if str(at) in line] == (
        resumed
    )
    said = [line for line in launched.err.splitlines() if f"{at}/" in line and "damaged-1" in line]
    assert len(said) == len(FLIPPED)
    for line, name in zip(said, FLIPPED, strict=True):
        assert name in line


@pytest.mark.parametrize(("name", "number"), [("no_inodes", errno.ENOSPC), ("read_only", errno.EROFS)])
def test_what_the_disk_refuses_is_said(launched, name, number):
    why, at = os.strerror(number), launched.folder / name / "checkpoints"
    lines = [line for line in launched.err.splitlines() if f"{at}/step" in line and "was not saved" in line]
    assert len(lines) == 2
    assert all(why in line for line in lines)
    assert not [path.name for path in at.iterdir() if ".tmp-" in path.name]
    never = launched.folder / "never"
    assert launched.ends[f"{name} at the start"].startswith(
        f"UserError: run.dir ({never}) must be a writable folder: {why}; pass run.dir="
    )
    assert not never.exists()


def test_speed_is_a_number_whatever_the_clock_says(launched):
    speeds = [row["images_per_second"] for row in rows(launched.folder / "clock")]
    assert len(speeds) == 12
    assert all(math.isfinite(speed) and speed > 0 for speed in speeds)


def test_one_bad_rank_costs_one_step_of_all(launched):
    one, other = (launched.folder / name for name in ("bad rank", "bad ranks"))
    assert launched.ends["bad rank"] == "done"
    assert [row["skipped_steps"] for row in rows(one)] == [int(row["step"] >= BAD_STEP) for row in rows(one)]
    assert checkpoint_sums(one) == checkpoint_sums(other)
