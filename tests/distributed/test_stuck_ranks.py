"""Ranks that do not answer: they are named, the run ends, and goes on equal to the bit to one that nothing befell."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.commands import (
    ON_LINUX,
    OWN_RANKS,
    QUICKSTART,
    TWO_RANKS,
    Command,
    Ended,
    children_of,
    overrides,
    ranks_of,
    resumed_at,
    run,
    timeless,
)

pytestmark = [
    pytest.mark.faults,
    ON_LINUX,
]
THREE_RANKS = (*OWN_RANKS[:-1], "3")
LAST = 14
TIMEOUT = {"run__timeout_minutes": 0.1, "checkpoint__every_steps": 3, "train__global_batch_size": 33}


def befallen(folder: Path, rank: int, signum: int, seconds: float = 0, *, step: int) -> Ended:
    """A run of which a rank gets a signal in the step after `step`, and after so many seconds SIGCONT."""
    with Command(*THREE_RANKS, QUICKSTART, *overrides(folder, train__max_steps=LAST, **TIMEOUT)) as command:
        command.wait_for(f"step {step}/")
        pid = ranks_of(command)[rank]
        os.kill(pid, signum)
        if seconds:
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
        return command.end()


def test_a_rank_whose_images_do_not_come_says_so_and_which_steps_are_lost(tmp_path, unbroken):
    """It is in no place to save: others are in the next step. What is lost is made again."""
    with Command(*THREE_RANKS, QUICKSTART, *overrides(tmp_path, train__max_steps=LAST, **TIMEOUT)) as command:
        command.wait_for("step 4/")
        (worker,) = children_of(ranks_of(command)[1])
        os.kill(worker, signal.SIGSTOP)
        ended = command.end()
    assert ended.code == 1, ended
    last = timeless(tmp_path)[-1]["step"]
    saved = 3 * (last // 3)
    lost = f"step {last} is" if last == saved + 1 else f"steps {saved + 1} to {last} are"
    assert failures(ended)[0] == (
        "no image came from the loading processes for 0.1 minutes: the disk that holds the images may not answer; "
        f"checkpoint step_{saved:07} is kept, and the same command goes on" + f": {lost} made again" * (last > saved)
    )
    again = run(*THREE_RANKS, QUICKSTART, *overrides(tmp_path, train__max_steps=LAST, **TIMEOUT))
    assert (again.code, resumed_at(again)) == (0, saved)
    assert timeless(tmp_path) == unbroken


def failures(ended: Ended) -> list[str]:
    return [line.removeprefix("failed: ") for line in ended.err.splitlines() if line.startswith("failed: ")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(*THREE_RANKS, QUICKSTART, *overrides(folder, train__max_steps=LAST, **TIMEOUT)).code == 0
    return timeless(folder)


@pytest.mark.parametrize("rank", [2, 0])
def test_a_stuck_rank_is_named_and_the_run_goes_on(tmp_path, unbroken, rank):
    ended = befallen(tmp_path, rank, signal.SIGSTOP, step=4)
    assert ended.code == 1, ended
    assert failures(ended)[0] == (
        f"rank {rank} did not answer for 0.1 minutes; checkpoint step_0000003 is kept, and the same command goes on"
    )
    assert "Traceback" not in ended.err
    again = run(*THREE_RANKS, QUICKSTART, *overrides(tmp_path, train__max_steps=LAST, **TIMEOUT))
    assert again.code == 0
    assert resumed_at(again) == 3
    assert timeless(tmp_path) == unbroken


def test_a_rank_that_is_stuck_for_less_is_waited_for(tmp_path, unbroken):
    ended = befallen(tmp_path, 1, signal.SIGSTOP, 3, step=4)
    assert (ended.code, failures(ended)) == (0, []), ended
    assert timeless(tmp_path) == unbroken


def test_a_rank_whose_loading_fails_says_why(tmp_path):
    """At once, before the others who lose it; it is rank 1."""
    with Command(*OWN_RANKS, QUICKSTART, *overrides(tmp_path, train__max_steps=99)) as command:
        command.wait_for("step 5/")
        (worker,) = children_of(ranks_of(command)[1])
        os.kill(worker, signal.SIGKILL)
        ended = command.end()
    assert ended.code == 1
    assert failures(ended)[0].startswith("a loading process died (Killed"), ended.err
    assert "Traceback" not in ended.err


def test_a_rank_that_is_gone_is_one_line_of_the_others(tmp_path):
    """Under torchrun, whose own words are many."""
    with Command(*TWO_RANKS, QUICKSTART, *overrides(tmp_path, train__max_steps=99)) as command:
        command.wait_for("step 5/")
        rank = min(pid for pid in command.processes() if variable(pid, "LOCAL_RANK") == "1")  # before its workers
        os.kill(rank, signal.SIGKILL)
        ended = command.end()
    assert ended.code == 1
    assert len(failures(ended)) == 1, ended.err
    assert re.fullmatch(
        r"another rank has ended, or its node is out of reach; checkpoint step_00000\d\d is kept, and the same command "
        "goes on",
        failures(ended)[0],
    )


def variable(pid: int, name: str) -> str | None:
    """Of a process's environment; None too where it has ended."""
    with suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), None)
    return None
