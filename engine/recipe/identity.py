"""Which recipes are one run: what a resume may change, and a fingerprint of all else."""

import hashlib
import json
from operator import attrgetter
from typing import Any

from engine.recipe.keys import keys_of, show
from engine.recipe.sections import Recipe

FREE_SECTIONS = frozenset({"checkpoint", "log", "evaluate", "parallel"})
FREE_KEYS = frozenset(
    {
        *("schema", "run.dir", "run.timeout_minutes", "data.root", "data.val_root", "data.workers"),
        *("data.classes", "data.max_bad_fraction", "data.accept_changes"),
        *("train.max_steps", "train.micro_batch_size", "train.on_spike"),
    }
)


def is_free(dotted: str) -> bool:
    """Whether a resume may change the key."""
    return dotted in FREE_KEYS or dotted.partition(".")[0] in FREE_SECTIONS


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} of the whole recipe; data.dataset_options is one value."""
    return {name: attrgetter(name)(recipe) for name in keys_of(type(recipe))}


def fingerprint(recipe: Recipe) -> str:
    """sha256, in hex, of every key that a resume may not change.

    A key that came with a later schema counts only where it differs from what older recipes have: runs that were begun
    before it go on.
    """
    keys = keys_of(type(recipe))
    bound = {
        name: value
        for name, value in flatten(recipe).items()
        if not is_free(name) and not keys[name].metadata["key"].is_as_before(value)
    }
    return hashlib.sha256(json.dumps(bound, sort_keys=True, allow_nan=False).encode()).hexdigest()


def resume_differences(old: Recipe, new: Recipe) -> list[str]:
    """`key (old -> new)` for each key that differs though a resume may not change it; empty: it may go on."""
    if old.task != new.task:
        return [f"task ({old.task} -> {new.task})"]
    before, after = flatten(old), flatten(new)
    return [
        f"{name} ({show(before[name])} -> {show(after[name])})"
        for name in before
        if not is_free(name) and before[name] != after[name]
    ]
