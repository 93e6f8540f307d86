"""On a file system without locks a second launch is refused where another may be alive, and only there."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.files import lock
from engine.runs import claim
from engine.runs.claim import claimed


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(claim, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(claim, "RETRY_SECONDS", 0.05)


def write(path: Path, seconds: float = 0.0, **other: object) -> None:
    """The words of a launch like this one's but for `other`, which touched the file so long ago."""
    path.write_text(json.dumps(claim._self() | other))
    then = time.time() - seconds
    os.utime(path, (then, then))


def enter(path: Path, *, locked: bool = False) -> None:
    with claimed(path, locked):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_another_hosts_launch_counts_as_alive_while_it_touches(tmp_path):
    path = tmp_path / ".lock"
    write(path, 20, host="gpu07", process=77)
    with pytest.raises(
        UserError,
        match=rf"^run.dir \({tmp_path}\) must not be in use by another launch: process 77 on gpu07 touched "
        rf"{path} 2\d s ago; stop it, delete that file if it is gone, or pass another run.dir$",
    ):
        enter(path)
    assert json.loads(path.read_text())["host"] == "gpu07", "it keeps its name"
    write(path, 1000, host="gpu07")
    enter(path)
    assert path.read_text() == "", "a launch that ends in good order leaves nothing to wait for"
    write(path, 20, namespace="pid:[7]")  # another container of this host's name
    with pytest.raises(UserError, match="must not be in use"):
        enter(path)
    path.unlink()
    path.touch()  # of a version that said nothing
    enter(path)


def test_the_clock_is_the_file_systems(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    write(path, 20, host="gpu07")
    monkeypatch.setattr(time, "time", lambda: 10.0)
    with pytest.raises(UserError, match=r"2\d s ago"):
        enter(path)


def test_a_process_of_this_host_is_alive_or_not(tmp_path):
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        write(path, 1000, process=process.pid, born=claim._born(process.pid))
        with pytest.raises(UserError, match=f"process {process.pid} on .* touched .* 1000 s ago"):
            enter(path)
        write(path, process=process.pid, born="1")  # a later process of the number
        enter(path)
        write(path, process=process.pid, born=claim._born(process.pid))
        process.kill()  # the rank of a killed launch, which needs a moment to notice it
        with claimed(path, locked=False, seconds=30):
            pass


def test_words_that_nobody_understands_are_somebodys(tmp_path):
    path = tmp_path / ".lock"
    for words in ("{", "[]", '{"host": 3}'):
        path.write_text(words)
        with pytest.raises(UserError, match="must not be in use"):
            enter(path)
    with claimed(path, locked=True):  # locks decide where there are any
        pass


def test_a_holder_touches_its_file_and_says_who_takes_it(tmp_path, capsys):
    path = tmp_path / ".lock"
    path.touch()

    def wait_for(holds) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with claimed(path, locked=False):
        os.utime(path, (5.0, 5.0))
        wait_for(lambda: path.stat().st_mtime > 5.0)
        assert json.loads(path.read_text())["born"]
        write(path, host="gpu07")
        wait_for(lambda: "has another launch's name: two write in" in capsys.readouterr().err)
    assert json.loads(path.read_text())["host"] == "gpu07", "what is not ours stays"
    with claimed(path, locked=True):
        path.unlink()
        wait_for(lambda: f"{path} could not be touched" in capsys.readouterr().err)


def test_of_two_that_come_at_once_one_enters(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    path.touch()
    monkeypatch.setattr(claim.time, "sleep", lambda _: write(path, host="gpu07"))  # it wrote a moment later
    with pytest.raises(UserError, match="on gpu07 touched"):
        enter(path)
    assert json.loads(path.read_text())["host"] == "gpu07"


def test_a_lock_leaves_what_its_file_says(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    path.write_text("words")
    with lock(path, "in use") as held:
        assert held
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with lock(path, "in use") as held:
        assert not held
    assert path.read_text() == "words"
