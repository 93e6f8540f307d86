"""The recipes that are shipped, and the words in which a recipe is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.recipe.load import load, task_of
from engine.recipe.sections import RECIPES, Recipe

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
TASK = {name: task_of(path.read_text()) for name, path in FILES.items()}
PRETRAIN = [name for name, task in TASK.items() if task == "pretrain"]
QUICK, CONV, RESNET = (FILES[name] for name in ("quickstart", "quickstart_conv", "resnet50_100ep"))


def shipped(name: str, overrides: Sequence[str] = ()) -> Recipe:
    return load(FILES[name], overrides, RECIPES[TASK[name]])


def complaint(*overrides: str, path: str | Path = QUICK) -> str:
    """The words of the UserError that a recipe with these overrides ends in; one line, always."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)
