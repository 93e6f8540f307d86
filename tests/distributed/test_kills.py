"""A run may be hit at any moment, and started and stopped as often as one likes: nothing is lost, nothing is left."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.commands import (
    ON_LINUX,
    ONE_PROCESS,
    OWN_RANKS,
    QUICKSTART,
    TWO_RANKS,
    Command,
    overrides,
    ranks_of,
)
from tests.distributed.launch import ROOT, environment, results

pytestmark = [
    pytest.mark.faults,
    ON_LINUX,
]
CYCLES = 20


def test_blows_at_random_moments_change_nothing(tmp_path):
    """A hundred are for who asks for them: the command's own count."""
    command = [sys.executable, "-m", "tests.distributed.kills", tmp_path, "--count", "10", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["blows"], found["different"]) == (10, 0)


def temporary(folder: Path) -> dict[str, str]:
    """An environment in which temporary files lie in the folder."""
    folder.mkdir()
    return environment(TMPDIR=str(folder))


def test_starts_and_stops_leave_no_process_and_no_file(tmp_path):
    """Every stop of ranks and of one process; `Command.end` sees that no process and no shared memory is left."""
    place, run = temporary(tmp_path / "temporary"), tmp_path / "run"
    stops = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, None]
    for launcher, signum in itertools.product((OWN_RANKS, ONE_PROCESS), stops):
        with Command(*launcher, QUICKSTART, *overrides(run), env=place) as command:
            command.wait_for("\nstep ")
            (run / "STOP").touch() if signum is None else command.process.send_signal(signum)
            ended = command.end()
        assert ended.code == (0 if signum is None else 128 + signum), ended
        assert not list((tmp_path / "temporary").iterdir()), (launcher, signum)


def test_ranks_that_are_killed_leave_what_torchrun_itself_leaves(tmp_path):
    """Its folder for logs."""
    place = temporary(tmp_path / "temporary")
    with Command(*TWO_RANKS, QUICKSTART, *overrides(tmp_path / "run"), env=place) as command:
        command.wait_for("step 3/")
        os.kill(command.process.pid, signal.SIGKILL)
        command.end()
    left = {path.name.partition("_")[0] for path in (tmp_path / "temporary").iterdir()}
    assert left == {"torchelastic"}
    with Command(*OWN_RANKS, QUICKSTART, *overrides(tmp_path / "run"), env=place) as command:
        command.wait_for("\nstep ")
        os.kill(ranks_of(command)[1], signal.SIGKILL)
        assert command.end().code == 1
    left = {path.name.partition("_")[0] for path in (tmp_path / "temporary").iterdir()}
    assert left == {"torchelastic"}


def test_starts_and_stops_in_one_process_leave_no_thread_and_no_descriptor(tmp_path):
    first, *_, last = results(1, "tests.distributed.cycles", tmp_path, CYCLES)
    assert first == last
