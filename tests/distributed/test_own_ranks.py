"""`engine.run --ranks N`: the ranks of a node without torchrun, as a user meets them."""

import os
import signal
import time
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.launch import read_ranks, read_restarts
from engine.run import main
from tests.distributed.commands import (
    ON_LINUX,
    OWN_RANKS,
    QUICKSTART,
    TWO_RANKS,
    Command,
    Ended,
    checkpoint_sums,
    forked,
    overrides,
    ranks_of,
    resumed_at,
    run,
    stopped_at,
    timeless,
)

pytestmark = ON_LINUX


def test_ctrl_c_while_the_ranks_load_is_one_line(tmp_path):
    with Command(*OWN_RANKS, QUICKSTART, *overrides(tmp_path / "run"), start_new_session=True) as command:
        while len(ranks_of(command)) < 2:
            assert command.process.poll() is None
            time.sleep(0.05)
        os.killpg(command.process.pid, signal.SIGINT)
        ended = command.end()
    assert ended.code == 128 + signal.SIGINT, ended
    assert "Traceback" not in ended.err
    assert ended.err.count("stopped by SIGINT; nothing half done is left") == 1, ended


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, Ended, Ended, Ended]:
    """A run that Ctrl-C ends, which reaches all of a terminal's foreground processes; one whose rank is killed; the
    run's end."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with Command(*OWN_RANKS, QUICKSTART, *overrides(folder), start_new_session=True) as command:
        command.wait_for("step 3/")
        os.killpg(command.process.pid, signal.SIGINT)
        stopped = command.end()
    with Command(*OWN_RANKS, QUICKSTART, *overrides(folder)) as command:
        command.wait_for("\nstep ")
        os.kill(ranks_of(command)[1], signal.SIGKILL)
        killed = command.end()
    last = resumed_at(killed) + 3
    return folder, stopped, killed, forked(0, "--ranks=2", QUICKSTART, *overrides(folder, train__max_steps=last))


def test_ctrl_c_saves_once_and_the_same_command_goes_on(interrupted):
    _, stopped, killed, _ = interrupted
    assert stopped.code == 128 + signal.SIGINT, stopped
    assert "Traceback" not in stopped.err
    assert resumed_at(killed) == stopped_at(stopped) >= 3


def test_a_rank_that_is_killed_is_said_in_one_line(interrupted):
    """By the launcher, which knows how it ended; the other rank, if it lives to say so, has lost it."""
    _, _, killed, finished = interrupted
    assert killed.code == 1, killed
    *others, last = [line for line in killed.err.splitlines() if line.startswith("failed: ")]
    assert last == (
        "failed: rank 1 was ended by SIGKILL, often for want of memory; "
        "the newest checkpoint is kept: the same command goes on"
    )
    assert all(line.startswith("failed: another rank has ended, or its node is out of reach; ") for line in others)
    assert len(others) <= 1
    assert finished.code == 0


@pytest.mark.slow
def test_it_is_the_run_that_torchrun_makes(interrupted, tmp_path):
    folder, *_, finished = interrupted
    last = resumed_at(finished) + 3
    assert run(*TWO_RANKS, QUICKSTART, *overrides(tmp_path / "run", train__max_steps=last)).code == 0
    assert timeless(folder) == timeless(tmp_path / "run")


@pytest.mark.faults
def test_it_starts_again_as_often_as_asked(tmp_path):
    """A rank is killed, twice; then a person stops it, which nothing starts again."""
    restarting = [*OWN_RANKS, "--max-restarts", "2", QUICKSTART]
    folder, last = tmp_path / "run", 40
    # Then step 2 is saved when step 3 is said.
    saving = {"train__max_steps": last, "checkpoint__asynchronous": "false"}
    with Command(*restarting, *overrides(folder, **saving)) as command:
        command.wait_for("step 3/")
        os.kill(ranks_of(command)[1], signal.SIGKILL)
        command.wait_for("resumed ")
        first = ranks_of(command)[0]
        while "\nstep " not in command.said()[0].partition("resumed ")[2]:
            time.sleep(0.02)
        os.kill(first, signal.SIGKILL)
        ended = command.end()
    assert ended.code == 0, ended
    assert [line for line in ended.err.splitlines() if line.startswith("warning: rank")] == [
        f"warning: rank {rank} was ended by SIGKILL, often for want of memory; restart {n} of 2"
        for n, rank in ((1, 1), (2, 0))
    ]
    assert run(*OWN_RANKS, QUICKSTART, *overrides(tmp_path / "unbroken", train__max_steps=last)).code == 0
    assert timeless(folder) == timeless(tmp_path / "unbroken")
    assert checkpoint_sums(folder) == checkpoint_sums(tmp_path / "unbroken")
    with Command(*restarting, *overrides(folder), start_new_session=True) as command:
        command.wait_for("\nstep ")
        os.killpg(command.process.pid, signal.SIGINT)
        stopped = command.end()
    assert (stopped.code, stopped.out.count("resumed ")) == (128 + signal.SIGINT, 1), stopped


@pytest.mark.faults
def test_what_the_user_must_put_right_is_not_started_again(tmp_path):
    ended = run(*OWN_RANKS, "--max-restarts=3", QUICKSTART, *overrides(tmp_path / "run", data__root=tmp_path / "none"))
    assert (ended.code, len(ended.err.splitlines())) == (2, 2), ended


def test_a_mistake_that_only_the_ranks_see_is_one_line_and_status_2(tmp_path):
    ended = forked(0, "--ranks=2", QUICKSTART, *overrides(tmp_path / "run", data__root=tmp_path / "none"))
    assert ended.code == 2, ended
    assert ended.err.splitlines()[1:] == [
        f"error: data.root ({tmp_path}/none) must exist; pass data.root=/path/to/images"
    ], "after the word that PyTorch is loaded"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "", "\u0662"])
def test_what_is_no_number_of_ranks(text):
    with pytest.raises(UserError, match=r"^--ranks \(.*\) must be a number >= 1, or gpus; leave it out"):
        read_ranks(text)


def test_torchrun_has_started_the_ranks_already(monkeypatch):
    assert read_ranks("2") == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^--ranks \(2\) must be left out under torchrun"):
        read_ranks("2")


def test_restarts_are_a_number_and_go_with_ranks():
    assert read_restarts("0") == 0
    with pytest.raises(UserError, match=r"^--max-restarts \(-1\) must be a number >= 0; leave it out for none"):
        read_restarts("-1")
    with pytest.raises(UserError, match=r"^--max-restarts \(2\) must be left out without --ranks N; torchrun has"):
        main(["quickstart", "--max-restarts", "2"])
