"""Which checkpoints stay, and what killed runs leave behind."""

import shutil

import pytest
import torch

from engine.checkpoint import layout
from engine.checkpoint.load import newest_valid
from engine.checkpoint.retain import clean, retain
from engine.checkpoint.save import save
from tests.checkpoint.examples import SHA, example_state


def test_retain_spares_what_is_new_or_named(tmp_path):
    for step in range(1, 7):
        save(tmp_path, {"x": torch.ones(1)}, example_state(step), recipe_sha256=SHA)
    layout.point(tmp_path, "best", tmp_path / "step_0000002")
    layout.point(tmp_path, "latest", tmp_path / "step_0000003")
    (tmp_path / "step_0000001.damaged-1").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    removed = retain(tmp_path, 2)
    assert [path.name for path in removed] == ["step_0000004", "step_0000001"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_0000002", "step_0000003", "step_0000005", "step_0000006",
        "step_0000001.damaged-1", "notes.txt", "latest", "best", ".lock",
    }  # fmt: skip
    assert retain(tmp_path, 2) == []
    with pytest.raises(ValueError, match="keep"):
        retain(tmp_path, 0)


def test_retain_spares_archives_beside_the_newest(tmp_path):
    for step in range(1, 10):
        save(tmp_path, {"x": torch.ones(1)}, example_state(step), recipe_sha256=SHA)
        retain(tmp_path, 2, lambda step: step % 4 == 0)
    assert sorted(path.name[-1] for path in tmp_path.glob("step_*")) == ["4", "7", "8", "9"]


def test_clean_removes_leftovers_and_nothing_else(checkpoints, capsys):
    kept = {path.name for path in checkpoints.iterdir()} | {
        "step_0000001.damaged-1",
        "step_0000001.tmp-mine",
        "a.tmp-00000000",
    }
    (checkpoints / "step_0000001.damaged-1").mkdir()
    (checkpoints / "step_0000001.tmp-mine").mkdir()
    (checkpoints / "a.tmp-00000000").mkdir()
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000750.tmp-0123abcd")
    shutil.copytree(checkpoints / "step_0000500", checkpoints / "step_0000100.removed-0123abcd")
    (checkpoints / "latest.tmp-0123abcd").write_text("x")
    assert newest_valid(checkpoints) == checkpoints / "step_0000500"
    with layout.writing(checkpoints):
        assert clean(checkpoints) == []
    assert "another process is writing" in capsys.readouterr().err
    assert len(clean(checkpoints)) == 3
    assert {path.name for path in checkpoints.iterdir()} == kept
    assert clean(checkpoints / "nothing") == []
    assert not (checkpoints / "nothing").exists()
    assert clean(checkpoints / "latest") == []
    assert "must be a readable folder" in capsys.readouterr().err
