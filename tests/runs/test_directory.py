"""A run directory belongs to one launch at a time."""

import errno
import fcntl
import os

import pytest

from engine.distributed.world import process_group
from engine.errors import UserError
from engine.files import lock
from engine.runs import directory
from engine.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def world():
    with process_group() as world:
        yield world


def test_it_is_held_until_the_end(tmp_path, world, monkeypatch, capsys):
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.0)
    with RunDirectory(tmp_path / "run", world):
        with (
            pytest.raises(UserError, match="must not be in use by another launch"),
            RunDirectory(tmp_path / "run", world),
        ):
            pass
        with pytest.raises(UserError, match="in use"), lock(tmp_path / "run/.lock", "in use"):
            pass
    with RunDirectory(tmp_path / "run", world), pytest.raises(UserError, match="must be a writable folder"):
        RunDirectory(tmp_path / "run/.lock", world).__enter__()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_told_from_a_broken_one(tmp_path, world, monkeypatch, capsys, number):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    if number == errno.EIO:
        with (
            pytest.raises(UserError, match="must be a writable folder: Input/output error"),
            RunDirectory(tmp_path, world),
        ):
            pass
    else:
        with RunDirectory(tmp_path, world):
            assert f"warning: no file locks in {tmp_path}" in capsys.readouterr().err


def test_what_a_killed_run_left_half_written_goes(tmp_path, world):
    for name in ("metrics.jsonl.tmp-0123abcd", "recipe.yaml.tmp-ffffffff", "notes.tmp", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "timm.tmp-00000000").mkdir()
    (tmp_path / "export.tmp-00000000").mkdir()  # another command's, which may live
    with RunDirectory(tmp_path, world):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "notes.tmp", "metrics.jsonl", "export.tmp-00000000"}
