"""Which keys of a recipe a run reads."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

# Who reads all keys alike, whatever they are for.
OWN = {*(f"engine.recipe.{name}" for name in ("describe", "identity", "keys", "load", "plain")), "dataclasses", "copy"}


def unread_keys(recipe: Any, run: Callable[[Any], object]) -> set[str]:
    """Dotted names of the keys that `run`, given the recipe, leaves unread."""
    sections = {name: part for name, part in vars(recipe).items() if dataclasses.is_dataclass(part)}
    read: dict[str, set[str]] = {name: set() for name in sections}
    run(dataclasses.replace(recipe, **{name: recording(part, read[name]) for name, part in sections.items()}))
    return {
        f"{name}.{key.name}"
        for name, part in sections.items()
        for key in dataclasses.fields(part)
        if key.name not in read[name]
    }


def recording(section: object, read: set[str]) -> object:
    """A copy of a recipe's section that notes which keys are read."""

    class Recording(type(section)):
        def __getattribute__(self, name: str):
            reader = sys._getframe(1).f_globals["__name__"]
            if reader not in OWN:
                read.add(name)
            return super().__getattribute__(name)

    twin = object.__new__(Recording)
    vars(twin).update(vars(section))
    return twin
