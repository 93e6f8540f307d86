"""A file that grows loses nothing and doubles nothing, whatever the system refuses and when."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runs import growing
from engine.runs.growing import GrowingFile

PIECES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"?") + b"\n"), max_size=4)
DISKS = st.sampled_from(["well", "short", "torn", "full", "sync", "truncate"])


class Disk:
    """In the place of a file of the system: what befalls a write, as its `mood` is."""

    def __init__(self, file, moods: list[str]):
        self.file, self.moods = file, moods

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data) -> int:
        if self.moods[0] in ("full", "truncate"):
            raise OSError(errno.ENOSPC, "No space left on device")
        half = len(data) // 2
        if self.moods[0] == "torn" and half == 0:
            raise OSError(errno.EIO, "Input/output error")
        return self.file.write(data[:half] if self.moods[0] in ("torn", "short") and half else data)


@settings(max_examples=200)
@given(st.lists(st.tuples(DISKS, PIECES, st.booleans()), max_size=6), st.binary(max_size=5))
def test_it_has_what_was_added_in_order(tmp_path_factory, chapters, before):
    path = tmp_path_factory.mktemp("grow") / "lines"
    path.write_bytes(before)
    moods, added, durable = ["well"], before, before
    file = GrowingFile(path)
    file.sync()
    file._file = Disk(file._file, moods)
    fsync, truncate = os.fsync, os.ftruncate

    def forget(handle: int) -> None:
        """What the kernel could not bring to the disk it forgets, and says so once."""
        if moods[0] == "sync":
            moods[0] = "well"
            os.truncate(path, len(durable))
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    def cut(handle: int, size: int) -> None:
        if moods[0] == "truncate":
            raise OSError(errno.EROFS, "Read-only file system")
        truncate(handle, size)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", forget)
        patched.setattr(growing.os, "ftruncate", cut)
        for mood, pieces, syncs in chapters:
            moods[0] = mood
            for piece in pieces:
                file.add(piece)
                added += piece
            if pieces and mood in ("well", "short"):
                assert path.read_bytes() == added
            if mood != "truncate":
                assert added.startswith(path.read_bytes())
                assert path.read_bytes() == before or path.read_bytes().endswith(b"\n"), "no half line stays"
            if syncs:
                with suppress(OSError):
                    file.sync()
                    durable = added
        moods[0] = "well"
        file.sync()
    file.close()
    assert path.read_bytes() == added
    assert not file._pieces


def test_one_that_cannot_be_opened_is_opened_later(tmp_path, capsys):
    (tmp_path / "folder").write_text("in the way")
    file = GrowingFile(tmp_path / "folder/lines")
    file.add(b"1\n")
    file.add(b"2\n")
    assert file.failures == 2
    (tmp_path / "folder").unlink()
    file.add(b"3\n")
    file.close()
    assert Path(tmp_path / "folder/lines").read_bytes() == b"1\n2\n3\n"
    said = capsys.readouterr().err
    assert said.count("could not be written (") == said.count("can be written again, and lacks nothing") == 1
