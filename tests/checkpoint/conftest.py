"""Folders of checkpoints."""

import shutil
from pathlib import Path

import pytest

from engine.checkpoint.save import save
from tests.checkpoint.examples import SHA, example_state, example_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the steps 250 and 500."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (250, 500):
        save(checkpoints, example_tensors(), example_state(step), recipe_sha256=SHA)
    return checkpoints


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")
