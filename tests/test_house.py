"""The house keeps its order: what may import what, and every recipe key is read."""

import ast
import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest

from engine.distributed import process_group
from engine.recipe import check_world, load
from engine.training.pretrain import pretrain

ROOT = Path(__file__).parents[1]
TOPS = ("engine", "models", "tests")
FOUNDATION = {
    f"engine.{name}"
    for name in ("schema", "tasks", "recipe", "front_door", "agree", "distributed", "training.schedule")
}
# The one place that sees everything: the loop, and what puts a run or a measurement together around it.
ASSEMBLY = {
    f"engine.training.{name}"
    for name in ("trainer", "pretrain", "monitor", "report", "run_directory", "sources", "bad_images")
} | {f"engine.evaluation.{name}" for name in ("images", "subject", "measure", "supervised", "probe", "finetune")}
DOORS = {f"engine.{path.stem}" for path in (ROOT / "engine").glob("*.py")} - FOUNDATION - {"engine.encoders"}
# Parts that may see a neighbour (beside modules of their own folder, outside of training).
NEIGHBOURS = {
    "engine.training.step": {f"engine.training.{name}" for name in ("guard", "loss", "optim", "schedule")},
    "engine.training.guard": {"engine.training.optim"},
    "engine.training.finetune_step": {"engine.training.guard", "engine.training.optim"},
    "engine.training.health": {"engine.training.step"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at the top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if (ROOT / (n.replace(".", "/") + ".py")).exists() else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return {name for name in found if name.split(".")[0] in ("engine", "models", "tests")}


def may_import(name: str, other: str) -> bool:
    if other.startswith("models."):
        return True
    if name.startswith("models.") or other.startswith("tests"):
        return False
    if name in FOUNDATION:
        return other in FOUNDATION
    if name in DOORS or other in FOUNDATION:
        return True
    if name in ASSEMBLY or name == "engine.encoders":
        return other not in DOORS
    same_folder = name.rpartition(".")[0] == other.rpartition(".")[0] != "engine.training"
    return same_folder or other in NEIGHBOURS.get(name, ())


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "models").rglob("*.py")), *sorted((ROOT / "engine").rglob("*.py"))], ids=module_name
)
def test_arrows_go_one_way(path):
    wrong = [other for other in imports(path) if not may_import(module_name(path), other)]
    assert not wrong, f"{module_name(path)} must not import {wrong}"


@pytest.mark.parametrize("path", sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py")), ids=module_name)
def test_no_name_is_defined_twice(path):
    """The second would silently take the place of the first."""
    tree = ast.parse(path.read_text())
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        plain = [n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.decorator_list]
        twice = [name for name, count in Counter(node.name for node in plain).items() if count > 1]
        assert not twice, f"{module_name(path)} defines {twice} twice"


def recording(section: object, read: set[str]) -> object:
    """A copy of a recipe's section that notes which keys the engine reads, beside the recipe's own module."""

    class Recording(type(section)):
        def __getattribute__(self, name: str):
            if sys._getframe(1).f_globals["__name__"] not in ("engine.recipe", "engine.schema", "dataclasses", "copy"):
                read.add(name)
            return super().__getattribute__(name)

    twin = object.__new__(Recording)
    vars(twin).update(vars(section))
    return twin


def test_every_key_is_read(tmp_path):
    """A run reads every key of its recipe: none is there for show. All recipes have the same keys."""
    recipe_file = ROOT / "recipes/quickstart.yaml"
    recipe = load(recipe_file, [f"run.dir={tmp_path}/run", "train.max_steps=1", "data.workers=0"])
    sections = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name != "task"}
    read = {name: set() for name in sections}
    watched = dataclasses.replace(recipe, **{n: recording(s, read[n]) for n, s in sections.items()})
    check_world(watched, 1)
    shape_keys = {"patch_size", "dim", "depth", "heads"}  # read by engine.recipe.shape, whose result builds the network
    with process_group() as world:
        pretrain(watched, recipe_file, world)
    for name, section in sections.items():
        unread = {leaf.name for leaf in dataclasses.fields(section)} - read[name]
        assert unread <= (shape_keys if name == "model" else set()), (name, unread)
