"""The recipe of a run on labelled images as a command asks for it: a file, and what the command says in its place."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.distributed.launcher import ranks
from engine.errors import UserError
from engine.recipe.keys import wrong
from engine.recipe.load import AnyRecipe, check_world, load, locate

ROOTS = {"data.root": "--train", "data.val_root": "--val"}


def request(kind: type[AnyRecipe], file: Path, said: Mapping[str, Any], overrides: Sequence[str]) -> AnyRecipe:
    """The recipe of `file` with what is `said` ({dotted key: value}; None: nothing), and then the overrides.

    Without roots the recipe's own are taken, which `locate` finds. With roots and without a source, it is what lies
    there; but a torchvision dataset's root looks like any folder, so a recipe of one knows better than a guess.

    Raises:
        UserError: for the recipe, for one root without the other, and where the launch's ranks do not suit.
    """
    said = {key: value for key, value in said.items() if value is not None}
    recipe = load(file, _overrides(said, overrides), kind)
    missing, given = sorted(ROOTS, key=lambda key: key in said)
    if given in said and missing not in said:
        pass_both = "pass both, or none for the recipe's own"
        raise UserError(f"{ROOTS[missing]} (missing) must be given with {ROOTS[given]}; {pass_both}")
    if given not in said:
        own = {key: getattr(recipe.data, key.removeprefix("data.")) for key in ROOTS}
        said |= {key: str(locate(root, file)) for key, root in own.items() if root is not None}
    elif "data.source" not in said and recipe.data.source != "torchvision":
        from engine.data.opening import guess_kind  # loads PyTorch, and a mistake in the recipe should show before

        said["data.source"] = guess_kind(Path(said["data.root"]))
    recipe = load(file, _overrides(said, overrides), kind)
    check_world(recipe, ranks())
    return recipe


def _overrides(said: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    # JSON is YAML: no path is taken for another kind of value.
    return [*(f"{key}={json.dumps(value)}" for key, value in said.items()), *overrides]


def read_share(text: str, key: str) -> float:
    """The fraction, above 0 and up to 1, that a percentage as "1%" says. Raises UserError, which calls it `key`."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)%", text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise wrong(key, text, "a percentage above 0% and up to 100%, as 1%", f"pass {key}=1%")
    return share
