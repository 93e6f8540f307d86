"""From YAML to the checked recipe of a run, and back.

A recipe is what the user wrote; nothing here rewrites a value of it, and derived values live where they are used.
Reading one imports neither torch nor numpy, so that a mistake shows at once. Every complaint is a `UserError`.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import UserError, one_line, reason
from engine.recipe.keys import keys_of, read, show, wrong
from engine.recipe.paths import expand, is_path, typed
from engine.recipe.plain import parse, unparse
from engine.recipe.sections import RECIPES, SCHEMA, Data, Evaluate, Finetune, Model, Paths, Pretrain, Recipe
from engine.recipe.shipped import OF_A_RUN, is_run
from models.shapes import VIT_KEYS, may_freeze_patches, vit_shape

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)

# ---- reading and writing ---------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), kind: type[AnyRecipe] = Pretrain) -> AnyRecipe:
    """The checked recipe of a YAML file, after `dotted.key=value` overrides.

    The last of equal keys holds. A value is YAML, but a path stands as it is.

    A run directory stands for the recipe that it holds, whose run.dir it then is, wherever it has been moved to.

    Raises UserError for a file that cannot be read, is not YAML or not a mapping, for a task other than `kind`, for an
    unknown or missing key, and for a value of a wrong type, out of range or at odds with another.
    """
    origin, file = f"recipe ({one_line(path)})", Path(path)
    try:
        if is_run(file):
            file, overrides = file / OF_A_RUN, [f"run.dir={json.dumps(str(path))}", *overrides]
        text = file.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{origin} must be a readable file: {reason(error)}; pass the path of one") from None
    return loads(text, origin, overrides, kind)


def loads(text: str | bytes, origin: str, overrides: Sequence[str] = (), kind: type[AnyRecipe] = Pretrain) -> AnyRecipe:
    """`load` for YAML text; `origin` names it in errors."""
    raw = parse(text, origin)
    if not isinstance(raw, dict) or not raw:
        found = show(raw) if raw else "nothing"
        raise UserError(f"{origin} must be a mapping of keys to values; found {found}")
    for override in overrides:
        _apply(raw, override)
    recipe = _build(raw, kind)
    _check_combinations(recipe)
    return recipe


def task_of(text: object) -> str | None:
    """The task of a recipe's YAML; None where it says none that is known."""
    raw = parse(text, "recipe") if isinstance(text, str) else None
    task = raw.get("task") if isinstance(raw, dict) else None
    return task if isinstance(task, str) and task in RECIPES else None


def dump(recipe: Recipe) -> str:
    """YAML of every key that loads back to an equal recipe."""
    return unparse(dataclasses.asdict(recipe))


def located(recipe: AnyRecipe, recipe_file: str | Path) -> AnyRecipe:
    """The recipe with the paths of its data as `place` has them, for a copy of it that lies elsewhere."""
    sections = {"data": _placed(recipe.data, ("root", "val_root"), recipe_file)}
    if isinstance(recipe, Pretrain):
        sections["evaluate"] = _placed(recipe.evaluate, ("train_root", "val_root"), recipe_file)
    return dataclasses.replace(recipe, **sections)


def _placed(section: Data | Evaluate, keys: Iterable[str], recipe_file: str | Path) -> Any:
    written = {key: getattr(section, key) for key in keys}
    found = {key: place(paths, recipe_file) for key, paths in written.items() if paths is not None}
    return dataclasses.replace(section, **found)


def _apply(raw: dict, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override ({one_line(override)}) must be of the form dotted.key=value; write it so")
    *parents, leaf = dotted.split(".")
    for name in parents:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise UserError(f"{one_line(dotted)} is no key of the recipe; {name} holds a value and no keys")
    read_text = typed if is_path(dotted) else parse
    raw[leaf] = read_text(text, f"override ({one_line(override)})")


def _build(raw: dict, kind: type[AnyRecipe]) -> AnyRecipe:
    schema = raw.get("schema", 1)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        known = f"an integer from 1 to {SCHEMA}, the newest that this engine knows"
        raise wrong("schema", schema, known, "for a newer one, update the engine")
    _check_task(raw, kind)
    _check_names(raw, list(keys_of(kind)))
    return read(kind, raw, schema)


def _check_task(raw: dict, kind: type[Recipe]) -> None:
    task = raw.get("task")
    if not isinstance(task, str) or task not in RECIPES:
        found = show(task) if "task" in raw else "missing"
        raise UserError(f"task ({found}) must be one of {', '.join(RECIPES)}; set it at the top of the recipe")
    if RECIPES[task] is not kind:
        wanted = next(name for name, other in RECIPES.items() if other is kind)
        door = "run RECIPE" if task == "pretrain" else f"evaluate {task} CHECKPOINT --recipe RECIPE"
        raise UserError(
            f"task ({task}) must be {wanted} for this command; pass a recipe of that task, or this one to "
            f"`mocov3 {door}`"
        )


def _check_names(raw: dict, known: list[str]) -> None:
    sections = {name.partition(".")[0] for name in known}
    for name in _keys(raw):
        if name not in known and name not in sections:
            raise UserError(f"{one_line(name)} is no key of the recipe; {_advice(name, known)}")


def _keys(raw: dict) -> Iterable[str]:
    """Dotted names of what a recipe holds: the keys inside its sections, and what is no section itself."""
    for name, value in raw.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) and value else (name,)


def _advice(dotted: str, known: list[str]) -> str:
    """The nearest right key: the same name in another section, else the most similar name."""
    leaf = dotted.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    leaves = {name.rpartition(".")[2]: name for name in known}
    close = (
        difflib.get_close_matches(dotted, same, 1, cutoff=0)
        or difflib.get_close_matches(dotted, known, 1)
        or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1)]
    )
    return f"did you mean {close[0]}?" if close else "remove it"


# ---- values at odds with each other ----------------------------------------------------------------------------------


def _check_combinations(recipe: Recipe) -> None:
    _check_data(recipe.data)
    if isinstance(recipe, Pretrain | Finetune):
        _check_schedule_and_ranks(recipe)
    if isinstance(recipe, Pretrain):
        _check_pretrain(recipe)
    if isinstance(recipe, Finetune) and recipe.optimizer.min_lr > recipe.peak_lr:
        peak = f"at most the peak lr, base_lr * batch / 512 ({recipe.peak_lr:g})"
        raise wrong("optimizer.min_lr", recipe.optimizer.min_lr, peak)


def _check_pretrain(recipe: Pretrain) -> None:
    _check_model(recipe.model)
    if recipe.model.weights is not None and recipe.run.continue_from is not None:
        must = "null where run.continue_from is given, which brings heads and optimizer too"
        raise wrong("model.weights", recipe.model.weights, must, "pass one of the two")
    evaluate = recipe.evaluate
    if (evaluate.train_root is None) != (evaluate.val_root is None):
        missing, other = ("train_root", "val_root")[:: 1 if evaluate.train_root is None else -1]
        raise wrong(
            f"evaluate.{missing}",
            None,
            f"given with evaluate.{other}; it may be the same with train and val inside",
            f"pass evaluate.{missing}=/path/to/labelled",
        )
    sigma = recipe.augment.blur_sigma
    if sigma[0] > sigma[1]:
        raise wrong("augment.blur_sigma", sigma, "a list of the smallest and the largest sigma, in this order")


def _check_schedule_and_ranks(recipe: Pretrain | Finetune) -> None:
    train, parallel = recipe.train, recipe.parallel
    if train.warmup_epochs > train.epochs:
        raise wrong("train.warmup_epochs", train.warmup_epochs, f"at most train.epochs ({train.epochs})")
    if parallel.shard != "hybrid" and parallel.replicate != 1:
        do = "pass parallel.replicate=1 or parallel.shard=hybrid"
        raise wrong("parallel.replicate", parallel.replicate, f"1 under parallel.shard {parallel.shard}", do)


def _check_data(data: Data) -> None:
    if data.range is not None and data.range[0] >= data.range[1]:
        raise wrong("data.range", data.range, "a list of the values of black and of white, the smaller first")
    if data.source == "torchvision":
        if data.dataset is None:
            raise wrong("data.dataset", None, "the name of a class of torchvision.datasets")
        return
    if data.dataset is not None:
        raise wrong("data.dataset", data.dataset, f"null under data.source {data.source}")
    if data.source == "hf":
        if not set(data.dataset_options) <= {"image", "label"}:
            columns = "names of columns under image and label, under data.source hf"
            raise wrong("data.dataset_options", data.dataset_options, columns)
    elif data.dataset_options:
        raise wrong("data.dataset_options", data.dataset_options, f"{{}} under data.source {data.source}")


def _check_model(model: Model) -> None:
    name, resolved = model.name, shape(model)
    if model.freeze_patch_projection and not may_freeze_patches(name):
        raise wrong("model.freeze_patch_projection", True, f"false for {name}, which is no plain ViT")
    values = {f"model.{field}": getattr(model, field) for field in VIT_KEYS}
    for key, value in values.items():
        if name in ("vit", "vit_conv") and value is None:
            raise wrong(key, value, f"an integer >= 1 for {name}, which has no shape of its own")
    if resolved is not None:
        _check_shape(model.image_size, **resolved)
    elif given := [key for key, value in values.items() if value is not None]:
        do = f"pass {' '.join(f'{key}=null' for key in given)}"
        raise wrong(given[0], values[given[0]], f"null for {name}, whose shape is fixed", do)


def _check_shape(image_size: int, patch_size: int, dim: int, depth: int, heads: int, conv_stem: bool) -> None:
    if dim % heads:
        raise wrong("model.dim", dim, f"divisible by model.heads ({heads})")
    if dim % 4:
        raise wrong("model.dim", dim, "divisible by 4: sine and cosine of row and column")
    if not conv_stem and image_size % patch_size:
        raise wrong("model.image_size", image_size, f"divisible by model.patch_size ({patch_size})")
    if conv_stem and patch_size not in (2, 4, 8, 16, 32):
        raise wrong("model.patch_size", patch_size, "2, 4, 8, 16 or 32: each convolution of the stem halves")
    if conv_stem and dim % (patch_size // 2):
        raise wrong("model.dim", dim, f"divisible by {patch_size // 2}: the width of the stem doubles up to it")


def shape(model: Model) -> dict[str, Any] | None:
    """{patch_size, dim, depth, heads, conv_stem} of a ViT: the recipe's own values over those of the named network.

    None for networks that bring their shape (ResNets, timm's).
    """
    return vit_shape(model.name, **{name: getattr(model, name) for name in VIT_KEYS})


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raises UserError where `world_size` processes cannot run the recipe. For before any process group is made."""
    batch = recipe.train.global_batch_size
    if batch % world_size:
        do = f"start another number of processes or pass train.global_batch_size={-(-batch // world_size) * world_size}"
        raise wrong("train.global_batch_size", batch, f"divisible by the number of processes ({world_size})", do)
    replicas = recipe.parallel.replicate if isinstance(recipe, Pretrain | Finetune) else 1
    if world_size % replicas:
        raise wrong("parallel.replicate", replicas, f"a divisor of the number of processes ({world_size})")
    if isinstance(recipe, Pretrain):
        _check_micro_batch(recipe.train.micro_batch_size, batch // world_size)


def largest_micro_batch(limit: int, batch: int) -> int:
    """The most images of a micro-batch, up to a limit, that divide a process's batch; 0 where the limit is 0."""
    return next((size for size in range(min(limit, batch), 0, -1) if batch % size == 0), 0)


def _check_micro_batch(size: int | None, batch: int) -> None:
    if size is not None and batch % size:
        do = f"pass train.micro_batch_size={largest_micro_batch(size, batch)}, or null for all at once"
        raise wrong("train.micro_batch_size", size, f"a divisor of the images of a process ({batch})", do)


def locate(path: str, recipe_file: str | Path, key: str = "path") -> Path:
    """A path that a recipe names, expanded: relative to the working directory, else to the recipe file's folder.

    Where nothing is at either place it is the one in the working directory; the caller says that it is missing.
    key: what messages call it.
    """
    file, here = Path(recipe_file), expand(path, key)
    beside = (file if file.is_dir() else file.parent) / here
    # Not Path.exists, which raises where a folder may not be looked into.
    return beside if os.access(beside, os.F_OK) and not os.access(here, os.F_OK) else here


def place(paths: Paths, recipe_file: str | Path) -> Paths:
    """Paths for a copy of the recipe that lies elsewhere: absolute, or as written where `~` or `$VAR` is in one."""
    if not isinstance(paths, str):
        return tuple(_place(path, recipe_file) for path in paths)
    return _place(paths, recipe_file)


def _place(path: str, recipe_file: str | Path) -> str:
    return path if expand(path) != Path(path) else str(locate(path, recipe_file).absolute())
