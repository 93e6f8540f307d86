"""A run directory belongs to one launch at a time."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from engine.distributed.world import World
from engine.errors import RunFailed, UserError
from engine.files import lock
from engine.runs import claim, directory
from engine.runs.directory import RunDirectory


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
        monkeypatch.setattr(claim, "SETTLE_SECONDS", 0.0)
        monkeypatch.setattr(directory, "LOCK_SECONDS", 0.0)
        with RunDirectory(tmp_path, world):
            assert f"warning: no file locks in {tmp_path}" in capsys.readouterr().err
            with (
                pytest.raises(UserError, match=f"process {os.getpid()} on .* delete that file if it is gone"),
                RunDirectory(tmp_path, world),
            ):
                pass
        with RunDirectory(tmp_path, world):
            pass


def test_what_a_killed_run_left_half_written_goes(tmp_path, world):
    for name in ("metrics.jsonl.tmp-0123abcd", "recipe.yaml.tmp-ffffffff", "notes.tmp", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "timm.tmp-00000000").mkdir()
    (tmp_path / "export.tmp-00000000").mkdir()  # another command's, which may live
    with RunDirectory(tmp_path, world):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", "notes.tmp", "metrics.jsonl", "export.tmp-00000000"}


def start(path: Path, world: World, error: type[Exception], *, row: str = "", left: str = "recipe.yaml") -> None:
    """A run's beginning, which an error ends."""
    with RunDirectory(path, world) as run:
        run.checkpoints.mkdir(exist_ok=True)
        (path / "metrics.jsonl").write_text(row)
        (path / left).touch()
        raise error("it cannot start")


def test_a_start_that_a_mistake_ends_leaves_what_was_there(tmp_path, world):
    with pytest.raises(UserError, match="cannot start"):
        start(tmp_path / "a/b/run", world, UserError, row='{"step": 0, "knn_top1": 0.1}\n')
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot start"):
        start(tmp_path / "begun", world, UserError, row='{"step": 1, "loss": 3.5}\n')
    with pytest.raises(KeyError, match="cannot start"):  # whoever looks for the fault wants to see what it made
        start(tmp_path / "fault", world, KeyError)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="cannot start"):
        start(tmp_path / "mine", world, UserError)
    assert all((tmp_path / name / "recipe.yaml").exists() for name in ("begun", "fault", "mine"))


def test_what_others_put_there_stays(tmp_path, world, monkeypatch):
    with pytest.raises(UserError, match="cannot start"):
        start(tmp_path / "run", world, UserError, left="notes.txt")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.0)
    loser = RunDirectory(tmp_path / "late", world)
    loser.made = [tmp_path / "late"]  # as where both launches saw that there was none
    with RunDirectory(tmp_path / "late", world):
        (tmp_path / "late/recipe.yaml").touch()
        with pytest.raises(UserError, match="must not be in use"):
            loser.__enter__()
        assert (tmp_path / "late/recipe.yaml").exists()


def test_parents_of_a_folder_that_cannot_be_made_go_again(tmp_path, world):
    with pytest.raises(UserError, match="must be a writable folder"):
        RunDirectory(tmp_path / "a" / ("x" * 300), world).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_restart_begins_no_new_run_where_one_was(tmp_path, world, monkeypatch):
    """torchrun keeps a folder for each of its starts, and names one of a rank's own files in it."""

    def start(attempt: int) -> Path:
        place = tmp_path / f"agent/attempt_{attempt}/0"
        place.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place / "error.json"))
        with RunDirectory(tmp_path / "run", world) as run:
            return run.path

    first = start(0)
    first.joinpath(".lock").unlink()
    first.rmdir()
    start(0)  # no restart
    start(1)  # the folder is there
    first.joinpath(".lock").unlink()
    first.rmdir()
    with pytest.raises(RunFailed, match="is gone, which was there before the launcher restarted its ranks: no new run"):
        start(2)
    assert not first.exists()


def test_a_folder_that_is_deleted_or_replaced_is_noticed(tmp_path, world):
    with RunDirectory(tmp_path / "run", world) as run:
        run.check_there()
        run.path.rename(tmp_path / "elsewhere")
        for _ in range(2):
            with pytest.raises(RunFailed, match="was deleted or replaced while the run went on"):
                run.check_there()
            run.path.mkdir(exist_ok=True)
