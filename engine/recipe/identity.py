"""Which recipes are one run: what a resume may change, and a fingerprint of all else."""

import dataclasses
import hashlib
import json
from typing import Any

from engine.recipe.keys import show
from engine.recipe.sections import Recipe

FREE_SECTIONS = frozenset({"checkpoint", "log", "evaluate", "parallel"})
FREE_KEYS = frozenset({"run.dir", "data.root", "data.val_root", "data.workers", "train.max_steps"})


def is_free(dotted: str) -> bool:
    """Whether a resume may change the key."""
    return dotted in FREE_KEYS or dotted.partition(".")[0] in FREE_SECTIONS


def flatten(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} of the whole recipe, `task` included; data.dataset_options is one value."""
    sections = dataclasses.asdict(recipe)
    task = sections.pop("task")
    return {"task": task} | {f"{name}.{leaf}": value for name, part in sections.items() for leaf, value in part.items()}


def fingerprint(recipe: Recipe) -> str:
    """sha256, in hex, of every key that a resume may not change."""
    bound = {name: value for name, value in flatten(recipe).items() if not is_free(name)}
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
