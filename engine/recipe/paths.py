"""Paths that a recipe names: on the command line as they are typed, in the recipe as they were written.

`~` and `$VAR` stay in the recipe and are expanded where a path is opened: on another machine a run finds its own.
"""

import errno
import os
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

from engine.errors import UserError, listed, one_line, reason
from engine.recipe.keys import keys_of, wrong
from engine.recipe.plain import parse
from engine.recipe.ranges import PATH
from engine.recipe.sections import RECIPES, Paths, Recipe

_PATHS = frozenset(
    name for kind in RECIPES.values() for name, field in keys_of(kind).items() if field.metadata["key"].rule is PATH
)
# What a run that goes on needs too; `run.continue_from` and `model.weights` are looked at where one begins.
_NEEDED = {"run.dir", "data.root", "data.val_root", "evaluate.train_root", "evaluate.val_root"}
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_AS_YAML = re.compile(r"null||\[.*\]|'.+'|'{2}|\".*\"", re.DOTALL)


def is_path(dotted: str) -> bool:
    """Whether the key names a path."""
    return dotted in _PATHS


def typed(text: str, origin: str) -> Any:
    """A path from the command line: what stands there, also where YAML would cut it short or take it for a number.

    `null`, nothing, a list in brackets and what is wholly in quotes are read as YAML.
    """
    return parse(text, origin) if _AS_YAML.fullmatch(text) else text


def each(paths: Paths | None) -> tuple[str, ...]:
    """The paths of a key that takes one or several."""
    if paths is None:
        return ()
    return (paths,) if isinstance(paths, str) else paths


def named(paths: Paths) -> str:
    """One path or several, in words."""
    return listed(each(paths), most=5)


def check_paths(recipe: Recipe) -> None:
    """Raises UserError where what a run needs from its start on, its directory or images, can be at no such path."""
    for key in filter(_NEEDED.__contains__, keys_of(type(recipe))):
        for path in each(attrgetter(key)(recipe)):
            expand(path, key)
    try:
        expand(recipe.run.dir).lstat()
    except OSError as error:
        if error.errno in _NO_PATH:
            raise wrong("run.dir", recipe.run.dir, f"the path of a folder: {reason(error)}") from None


def expand(path: str, key: str = "path") -> Path:
    """A path with `~` and `$VAR` expanded, unless there is something of the very name.

    key: what messages call it.

    Raises:
        UserError: a user or a variable in it does not exist.
    """
    found = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 (Path raises where there is no such user)
    if found == path and not found.startswith("~") and "$" not in found:
        return Path(path)
    if os.path.lexists(path):
        return Path(path)
    must = f"{key} ({one_line(path)}) must name"
    if (user := found.partition("/")[0]).startswith("~"):
        whom = f"a user that exists, unlike {user[1:]};" if user[1:] else "a home that is known; set HOME, or"
        raise UserError(f"{must} {whom} write the path out")
    if (unknown := _first_variable(found)) is not None:
        raise UserError(f"{must} variables that are set; set {unknown}, or write the path out")
    return Path(found)


def _first_variable(text: str) -> str | None:
    found = re.search(r"\$(\w+|\{[^}]*\})", text)
    return found and found[0]
