"""Nothing damaged is loaded: it is set aside, said, and the newest whole checkpoint is taken."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.load import load, newest_valid, read_tensors
from engine.checkpoint.manifest import NAME, Damaged, checksum, own_checksum, read_manifest, verify
from engine.checkpoint.save import SaveFailed, save
from engine.errors import UserError
from tests.checkpoint.examples import SHA, blank, example_state, example_tensors, reseal


def expect_fallback(checkpoints: Path, capsys, reason: str) -> None:
    damaged = checkpoints / "step_0000500"
    with pytest.raises(UserError) as caught:
        load(damaged, blank(example_tensors()))
    assert "\n" not in str(caught.value)
    assert str(damaged) in str(caught.value)
    assert newest_valid(checkpoints) == checkpoints / "step_0000250"
    said = capsys.readouterr().err
    assert reason in said
    assert "step_0000500.damaged-1" in said
    assert not damaged.exists()
    assert (checkpoints / "step_0000500.damaged-1").exists()
    load(checkpoints / "step_0000250", blank(example_tensors()))
    assert read_manifest(checkpoints / "step_0000250").step == 250


def test_what_is_repaired_is_taken_again(checkpoints, capsys):
    """A file that was put back, in what a start had set aside; the newest of two, and no older one."""
    newest = checkpoints / "step_0000500"
    (newest / ".metadata").rename(checkpoints / "mislaid")
    shutil.copytree(newest, checkpoints / "step_0000100.damaged-1")
    assert newest_valid(checkpoints) == checkpoints / "step_0000250"
    assert newest_valid(checkpoints) == checkpoints / "step_0000250"  # looked at again, and not said again
    assert capsys.readouterr().err.count("damaged") == 2  # in one line
    shutil.copytree(checkpoints / "step_0000500.damaged-1", checkpoints / "step_0000900.damaged-1")
    for name in ("step_0000500.damaged-1", "step_0000900.damaged-1", "step_0000100.damaged-1"):
        shutil.copy(checkpoints / "mislaid", checkpoints / name / ".metadata")
    reseal(checkpoints / "step_0000100.damaged-1", step=100)
    assert newest_valid(checkpoints) == newest
    assert "step_0000500, which was set aside as step_0000500.damaged-1, is whole again" in capsys.readouterr().err
    left = {path.name for path in checkpoints.glob("*.damaged-*")}
    assert left == {"step_0000100.damaged-1", "step_0000900.damaged-1"}  # older; and of another step than it says
    load(newest, blank(example_tensors()))
    assert newest_valid(checkpoints) == newest


def test_of_one_step_the_whole_one_is_taken(checkpoints, capsys):
    newest = checkpoints / "step_0000500"
    shutil.copytree(newest, checkpoints / "step_0000500.damaged-1")
    (newest / ".metadata").unlink()
    assert newest_valid(checkpoints) == newest
    assert sorted(path.name for path in checkpoints.glob("*.damaged-*")) == ["step_0000500.damaged-2"]


FILES = ["MANIFEST.json", ".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_truncated_file(checkpoints, capsys, name, kept):
    file = checkpoints / "step_0000500" / name
    content = file.read_bytes().rstrip()
    file.write_bytes(content[: min(int(kept * len(content)), len(content) - 1)])
    expect_fallback(checkpoints, capsys, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(checkpoints, capsys, name):
    (checkpoints / "step_0000500" / name).unlink()
    expect_fallback(checkpoints, capsys, name)


@settings(max_examples=150)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(saved, tmp_path_factory, name, where, bit):
    folder = shutil.copytree(saved / "step_0000500", tmp_path_factory.mktemp("flip") / "step_0000500")
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
    except UserError:
        return
    finally:
        shutil.rmtree(folder.parent)
    # White space of the manifest may change, what it says may not.
    assert name == NAME
    assert manifest == read_manifest(saved / "step_0000500")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}', b"null", b'{"step": true, "files": []}'],
)
def test_a_manifest_that_is_none(checkpoints, capsys, content):
    (checkpoints / "step_0000500" / NAME).write_bytes(content)
    expect_fallback(checkpoints, capsys, NAME)


def test_a_newer_format(checkpoints, capsys):
    reseal(checkpoints / "step_0000500", format=2)
    expect_fallback(checkpoints, capsys, "format is 2")


def test_an_extra_data_file(checkpoints, capsys):
    (checkpoints / "step_0000500" / "__7_0.distcp").write_bytes(b"x")
    expect_fallback(checkpoints, capsys, "__7_0.distcp is not in MANIFEST.json")


def test_a_step_under_another_name(checkpoints, capsys):
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert "manifest is of step 500" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: p.symlink_to("nowhere")])
def test_things_with_a_checkpoint_s_name(checkpoints, capsys, make):
    make(checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert os.path.lexists(checkpoints / "step_0000900.damaged-1")
    make(checkpoints / "step_0000900")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    assert os.path.lexists(checkpoints / "step_0000900.damaged-1")
    assert os.path.lexists(checkpoints / "step_0000900.damaged-2")


def test_folders_without_checkpoints(tmp_path, capsys):
    assert newest_valid(tmp_path / "nothing") is None
    assert newest_valid(tmp_path) is None
    (tmp_path / "latest").write_bytes(b"\xffstep_0000006\n")
    assert newest_valid(tmp_path) is None
    assert "names '\ufffdstep_0000006', which is not there" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="must be a readable folder"):
        newest_valid(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(SaveFailed, match="File exists"):
        save(tmp_path / "file", {}, example_state(1), recipe_sha256=SHA)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9_999_999, 10_000_000):
        save(tmp_path, {}, example_state(step), recipe_sha256=SHA)
    assert newest_valid(tmp_path) == tmp_path / "step_10000000"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "MANIFEST.json", "nul\0"])
def test_a_manifest_that_leaves_the_folder(checkpoints, capsys, name):
    folder = checkpoints / "step_0000500"
    (checkpoints / "secret").write_text("x")
    content = json.loads((folder / NAME).read_text())
    content["files"][name] = {"bytes": 1, "sha256": checksum(checkpoints / "secret")["sha256"]}
    content["manifest_sha256"] = own_checksum(content)
    (folder / NAME).write_text(json.dumps(content))
    expect_fallback(checkpoints, capsys, "no file of this folder")


@pytest.mark.parametrize("name", FILES)
def test_links_and_pipes_in_the_place_of_files(checkpoints, capsys, name):
    folder = checkpoints / "step_0000500"
    (folder / name).rename(checkpoints / "elsewhere")
    (folder / name).symlink_to(checkpoints / "elsewhere")
    twin = shutil.copytree(checkpoints / "step_0000250", checkpoints / "step_0000900")
    (twin / name).unlink()
    os.mkfifo(twin / name)
    with pytest.raises(UserError, match="not a plain file"):
        read_manifest(twin)
    expect_fallback(checkpoints, capsys, "not a plain file")


def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    """A network file system that stumbles costs no checkpoint."""
    folder = save(tmp_path, {"x": torch.ones(2)}, example_state(3), recipe_sha256="r")

    def stumble(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("engine.checkpoint.manifest.checksum", stumble)
        with pytest.raises(UserError, match="must be readable: Stale file handle; run the same command again"):
            newest_valid(tmp_path)
    assert newest_valid(tmp_path) == folder


def settle(monkeypatch) -> list[str]:
    """As if the files of a checkpoint had been written long ago. Returns what will be hashed, which grows."""
    hashed = []

    def noted(path: Path):
        hashed.append(path.name)
        return checksum(path)

    monkeypatch.setattr("engine.checkpoint.manifest.checksum", noted)
    monkeypatch.setattr("engine.checkpoint.manifest.SETTLED", -1e9)
    return hashed


def test_weights_that_are_opened_several_times_are_compared_once(checkpoints, monkeypatch):
    """Fine-tuning reads them three times and more, and each time the optimizer's state would be hashed too."""
    folder = checkpoints / "step_0000500"
    hashed = settle(monkeypatch)
    for names in (["model.bias"], None, ["model.weight"]):
        list(read_tensors(folder, names))
    assert sorted(hashed) == [".metadata", "__0_0.distcp"]
    list(read_tensors(checkpoints / "step_0000250"))
    load(folder, blank(example_tensors()))
    assert len(hashed) == 6, "another checkpoint, and what a run resumes from, are compared"


def test_a_file_does_not_settle_while_it_is_compared(checkpoints, monkeypatch):
    """Hashing takes longer than that where a checkpoint is large."""
    hashed, now, looked = [], time.time, time.time()

    def slow(path: Path):
        hashed.append(path.name)
        monkeypatch.setattr(time, "time", lambda: now() + 100)
        return checksum(path)

    monkeypatch.setattr("engine.checkpoint.manifest.checksum", slow)
    for file in (checkpoints / "step_0000500").iterdir():
        os.utime(file, (looked, looked))
    for _ in range(2):
        monkeypatch.setattr(time, "time", now)
        list(read_tensors(checkpoints / "step_0000500"))
    assert len(hashed) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("settled", [True, False])
def test_what_was_opened_and_is_damaged_then_is_refused(checkpoints, monkeypatch, name, settled):
    """Of the same size and time, too; and at once after it was written, when no time tells."""
    folder = checkpoints / "step_0000500"
    if settled:
        settle(monkeypatch)
    else:  # a clock that does not move on
        now = time.time_ns()
        monkeypatch.setattr("engine.checkpoint.manifest._trace", lambda _: (now,))
    file, times = folder / name, (folder / name).stat()
    list(read_tensors(folder))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(Damaged, match=r"checksum|cannot be read"):
            read_tensors(folder)


def test_what_was_damaged_and_is_mended_is_read(checkpoints, monkeypatch):
    folder = checkpoints / "step_0000500"
    settle(monkeypatch)
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[:-1] + b"?")
    with pytest.raises(Damaged, match=r"\.metadata does not match its checksum"):
        read_tensors(folder)
    (folder / ".metadata").write_bytes(content)
    assert dict(read_tensors(folder)).keys() == example_tensors().keys()
