"""Every way to ask a run of two ranks to stop, one after the other: it ends equal to the bit to one nobody stopped."""

import os
import signal
from pathlib import Path

import pytest

from tests.distributed.commands import (
    ON_LINUX,
    ONE_PROCESS,
    OWN_RANKS,
    QUICKSTART,
    TWO_RANKS,
    Command,
    Ended,
    overrides,
    ranks_of,
    resumed_at,
    run,
    stopped_at,
    timeless,
)

pytestmark = [
    pytest.mark.faults,
    ON_LINUX,
]


def stopped(folder: Path, act, *after: str, launch: tuple = OWN_RANKS, **values) -> Ended:
    with Command(*launch, QUICKSTART, *overrides(folder, **values)) as command:
        for text in after:
            command.wait_for(text)
        act(command)
        ended = command.end()
    assert "Traceback" not in ended.err, ended.err
    assert ended.out.count("stopped by ") == 1
    assert ended.out.splitlines()[-1].endswith("; the same command goes on")
    return ended


def to_launcher(signum: int):
    return lambda command: command.process.send_signal(signum)


def to_rank(rank: int, signum: int):
    return lambda command: os.kill(ranks_of(command)[rank], signum)


def test_a_run_that_is_stopped_in_every_way_equals_one_that_is_not(tmp_path):
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    evaluates = {"evaluate__knn_every_epochs": 1, "data__workers": 1}

    ended = stopped(folder, to_rank(1, signal.SIGUSR1), "step 2/")
    assert (ended.code, (folder / "REQUEUE").exists()) == (128 + signal.SIGUSR1, True)
    step = stopped_at(ended)

    ended = stopped(folder, to_launcher(signal.SIGTERM), "resumed ")
    assert (ended.code, (folder / "REQUEUE").exists()) == (128 + signal.SIGTERM, True)
    assert resumed_at(ended) == step

    ended = stopped(folder, to_launcher(signal.SIGHUP), "\nstep ")
    assert (ended.code, (folder / "REQUEUE").exists()) == (128 + signal.SIGHUP, True)
    assert resumed_at(ended) <= step + 1
    step = stopped_at(ended)

    ended = stopped(folder, lambda _: (folder / "STOP").touch(), "\nstep ", launch=TWO_RANKS)
    assert (ended.code, (folder / "REQUEUE").exists(), (folder / "STOP").exists()) == (0, False, False)
    assert resumed_at(ended) == step
    step = stopped_at(ended)

    ended = stopped(folder, to_launcher(signal.SIGINT), "resumed ", **evaluates, train__max_steps=step)
    assert (ended.code, (folder / "REQUEUE").exists()) == (128 + signal.SIGINT, False)

    for place in (folder, whole):
        assert run(*OWN_RANKS, QUICKSTART, *overrides(place, train__max_steps=step + 2, **evaluates)).code == 0
    assert timeless(folder) == timeless(whole)


def test_nohup_keeps_a_run_from_the_hangup_of_its_terminal(tmp_path):
    with Command("nohup", *ONE_PROCESS, QUICKSTART, *overrides(tmp_path / "run", train__max_steps=6)) as command:
        command.wait_for("step 2/")
        command.process.send_signal(signal.SIGHUP)
        assert command.end().code == 0
