"""What a recipe may say: each key in words."""

import dataclasses
from typing import NamedTuple

from engine.recipe.identity import is_free
from engine.recipe.keys import describe, is_required, keys_of, show
from engine.recipe.sections import RECIPES


class KeyDoc(NamedTuple):
    """must: type and range; default: as a recipe writes it, None where the key is required."""

    name: str
    must: str
    default: str | None
    meaning: str
    is_free: bool  # a resume may change it


def describe_keys(task: str) -> list[KeyDoc]:
    """Every key of the recipes of a task, in their order."""
    return [
        KeyDoc(name, describe(field), _default(field), field.metadata["key"].doc, is_free(name))
        for name, field in keys_of(RECIPES[task]).items()
    ]


def _default(field: dataclasses.Field) -> str | None:
    if is_required(field):
        return None
    return show(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
