"""Files that are there completely or not at all, locks, and the reader of metrics.jsonl."""

import ast
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.files import (
    aside,
    draft,
    lock,
    newest_lines,
    publish,
    read_rows,
    remove,
    replace_file,
    sweep,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    file = tmp_path / "a.txt"
    replace_file(file, "alt \u00fc\n")
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    file = tmp_path / "a.txt"
    replace_file(file, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))
    )
    monkeypatch.setattr(Path, "replace", lambda *paths: (done.append("renamed"), replace(*paths))[1])
    replace_file(tmp_path / "a.txt", "new")
    assert done[0].startswith(f"{tmp_path}/a.txt.tmp-")
    assert done[1:] == ["renamed", str(tmp_path)]


def test_a_folder_is_published_once_it_is_whole(tmp_path):
    with draft(tmp_path / "out") as place:
        place.mkdir()
        (place / "x").touch()
        publish(place, tmp_path / "out")
    with draft(tmp_path / "other") as place:
        place.mkdir()
        (place / "x").touch()
    assert names(tmp_path) == ["out"]


def test_remove_takes_a_link_and_not_what_it_names(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    remove(tmp_path / "link")
    remove(tmp_path / "link")
    assert names(tmp_path) == ["kept"]
    assert aside(tmp_path / "kept", "removed").name.startswith("kept.removed-")


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / ".lock"
    with lock(path, "in use") as held:
        assert held
        with pytest.raises(UserError, match="in use"), lock(path, "in use"):
            pass
    with lock(path, "in use") as held:
        assert held


def test_a_lock_waits_and_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    holder = (
        f"import fcntl, time; f = open({str(path)!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(9)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use"), lock(path, "in use", seconds=0.3):
            pass
        process.kill()
        with lock(path, "in use", seconds=10) as held:
            assert held


def test_a_lock_ends_with_its_body_whatever_was_forked_in_it(tmp_path):
    """A loading process, which begins while a checkpoint is written, has the lock's file open too."""
    with lock(tmp_path / ".lock", "in use"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with lock(tmp_path / ".lock", "in use") as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_no_locks_here_is_told_from_other_errors(tmp_path, monkeypatch, number):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"), lock(tmp_path / ".lock", "in use"):
            pass
    else:
        with lock(tmp_path / ".lock", "in use") as held:
            assert not held


def test_rows_are_complete_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": null}\n{"step": 2}\n{"step": 3')
    assert list(read_rows(file)) == [{"step": 1, "loss": None}, {"step": 2}]
    assert list(read_rows(file, "loss")) == [{"step": 1, "loss": None}]
    file.write_bytes(b"")
    assert list(read_rows(file)) == []
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "absent.jsonl"))


@settings(max_examples=50)
@given(st.lists(st.text("ab\r", max_size=9), max_size=9), st.text("ab", max_size=9), st.integers(1, 12))
def test_lines_from_the_end_are_those_from_the_beginning(tmp_path_factory, lines, torn, block):
    """However many bytes are read at once."""
    file = tmp_path_factory.getbasetemp() / "lines"
    expected, at = [], 0
    for line in lines:
        expected.append((f"{line}\n".encode(), at))
        at += len(line) + 1
    file.write_bytes(b"".join(line for line, _ in expected) + torn.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.files._BLOCK", block)
        assert list(newest_lines(file)) == expected[::-1]


@pytest.mark.parametrize("line", [b"", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff", b'{"step": 1'])
def test_a_damaged_row_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 .* must be a JSON object with a step"):
        list(read_rows(file))


def test_no_other_file_flushes_or_locks():
    engine = Path(__file__).parents[1] / "engine"
    for path in sorted(engine.rglob("*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"fsync", "fdatasync", "flock", "lockf"} or path == engine / "files.py", path


def test_a_draft_that_cannot_be_removed_hides_nothing(tmp_path, monkeypatch, capsys):
    def fail(_: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("engine.files.remove", fail)
    with pytest.raises(UserError, match="what happened"), draft(tmp_path / "a"):
        raise UserError("what happened")  # before anything was written: nothing to remove
    assert capsys.readouterr().err == ""

    def write_and_fail() -> None:
        with draft(tmp_path / "a") as place:
            place.write_text("")
            raise UserError("what happened")

    with pytest.raises(UserError, match="what happened"):
        write_and_fail()
    assert "could not be removed: [Errno 30]" in capsys.readouterr().err


@pytest.mark.parametrize("is_folder", [False, True])
def test_drafts_are_swept_of_writers_that_are_gone_alone(tmp_path, is_folder):
    """One is killed, one lives; a file of the user's may have such a name, as far as it goes."""
    code = """if True:
        import sys
        from pathlib import Path
        from engine.files import shared_draft
        with shared_draft(Path(sys.argv[1]), is_folder=bool(sys.argv[2:])) as place:
            (place / "a" if place.is_dir() else place).write_bytes(b"half")
            print(place.name, flush=True)
            sys.stdin.read()
        """
    command = [sys.executable, "-c", code, tmp_path / "x.index"]
    writers = [
        subprocess.Popen([*command, "folder"] if is_folder else command, stdin=-1, stdout=-1, text=True)
        for _ in range(2)
    ]
    drafts = [writer.stdout.readline().strip() for writer in writers]
    mine = ["a.index.tmp-0123abcd.txt", "a.index.tmp-mine", "a.txt.tmp-0123abcd", "x.index"]
    for name in mine:
        (tmp_path / name).touch()
    other = tmp_path / "d.index.tmp-0123abcd"
    other.touch() if is_folder else other.mkdir()
    writers[0].kill()
    writers[0].communicate()
    sweep(tmp_path, ".index", folders=is_folder)
    assert names(tmp_path) == sorted([*mine, other.name, drafts[1]])
    writers[1].communicate()
    assert names(tmp_path) == sorted([*mine, other.name])
    sweep(tmp_path / "none", ".index", folders=is_folder)
