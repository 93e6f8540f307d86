"""The house keeps its order: what may import what, and every recipe key is read."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from engine.distributed.world import process_group
from engine.recipe.load import check_world, load
from engine.runs.pretrain import pretrain
from tests.runs.reading import unread_keys

ROOT = Path(__file__).parents[1]
TOPS = ("engine", "models", "tests")
# The law of arrows: a room imports rooms to its left, and models. A room is a folder or a file of engine/; all other
# files there are doors.
ROOMS = (
    *("errors", "torch_internals", "logger", "files", "recipe", "distributed", "own_models", "data", "checkpoint"),
    *("training", "weights", "evaluation", "pictures", "runs", "benchmarks", "door", "cli", "launch", "doors"),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, at the top or later."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if (ROOT / (n.replace(".", "/") + ".py")).exists() else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return {name for name in found if name.split(".")[0] in ("engine", "models", "tests")}


def room(name: str) -> int:
    """The place of a module of engine in the order of rooms."""
    part = name.split(".")[1]
    return ROOMS.index(part if part in ROOMS else "doors")


def may_import(name: str, other: str) -> bool:
    if other.startswith("models.") or other == "engine":  # the package says its version and imports nothing
        return True
    if name.startswith("models.") or other.startswith("tests"):
        return False
    return name.split(".")[:2] == other.split(".")[:2] or room(other) < room(name)


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "models").rglob("*.py")), *sorted((ROOT / "engine").rglob("*.py"))], ids=module_name
)
def test_arrows_go_one_way(path):
    wrong = [other for other in imports(path) if not may_import(module_name(path), other)]
    assert not wrong, f"{module_name(path)} must not import {wrong}"


ROOM_FOLDERS = [ROOT / "models", *sorted(path.parent for path in (ROOT / "engine").glob("*/**/__init__.py"))]


@pytest.mark.parametrize("folder", ROOM_FOLDERS, ids=lambda folder: folder.name)
def test_a_rooms_table_names_its_files(folder):
    """One line for each file, and nothing else."""
    rows = re.findall(r"^\| `([\w./]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert sorted(rows) == sorted(files | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")})


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        others = [name for name in imports(path) if name.rpartition(".")[2].startswith("test_")]
        assert not others, f"{module_name(path)} must not import {others}"


@pytest.mark.parametrize("path", sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py")), ids=module_name)
def test_no_name_is_defined_twice(path):
    """The second would silently take the place of the first."""
    tree = parsed(path)
    for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        plain = [n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.decorator_list]
        twice = [name for name, count in Counter(node.name for node in plain).items() if count > 1]
        assert not twice, f"{module_name(path)} defines {twice} twice"


def test_every_key_is_read(tmp_path):
    """A run reads every key of its recipe: none is there for show. All recipes have the same keys."""
    recipe_file, few = ROOT / "recipes/quickstart.yaml", ROOT / "recipes/data/fashion_mnist/val.tar"
    values = [f"run.dir={tmp_path}/run", f"data.root={few}", f"data.val_root={few}"]
    recipe = load(recipe_file, [*values, "train.max_steps=1", "data.workers=0"])

    def run(watched) -> None:
        check_world(watched, 1)
        with process_group() as world:
            pretrain(watched, recipe_file, world)

    # Read by engine.recipe.load.shape, whose result builds the network.
    assert unread_keys(recipe, run) <= {f"model.{key}" for key in ("patch_size", "dim", "depth", "heads")}
