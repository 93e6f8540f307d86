"""Every way to ask a run of two ranks to stop, one after the other: it ends equal to the bit to one nobody stopped."""

import os
import signal
import time
from contextlib import suppress
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
from tests.distributed.launch import environment

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
    assert ended.out.count("\nstopped by ") == 1
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


def has_compiler(command: Command) -> bool:
    """Whether a process of the command is compiling C++."""
    return any(b"cc1plus" in cmdline(pid) for pid in command.processes())


def cmdline(pid: int) -> bytes:
    with suppress(OSError):  # it has ended meanwhile
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_a_compilation_is_stopped_at_once_and_leaves_what_the_next_run_compiles_from(tmp_path):
    """By Ctrl-C, which a terminal sends to all processes of the command, and by a scheduler."""
    folder, env = tmp_path / "run", environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"))
    arguments = [QUICKSTART, *overrides(folder, parallel__compile="true", model__depth=1, train__max_steps=1)]
    for signum, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        with Command(*ONE_PROCESS, *arguments, env=env, start_new_session=True) as command:
            command.wait_for("compiling the network")
            while not has_compiler(command) and command.process.poll() is None:
                time.sleep(0.05)
            send(command.process.pid, signum)
            ended = command.end()
        assert ended.code == 128 + signum, ended
        said = f"stopped by {signum.name} before a step was made; nothing is lost; the same command goes on"
        assert ended.out.splitlines()[-1] == said, ended
        assert "Traceback" not in ended.err, ended.err
        assert (folder / "REQUEUE").exists() == (signum == signal.SIGTERM)
    assert run(*ONE_PROCESS, *arguments, env=env).code == 0
