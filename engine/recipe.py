"""The recipe of a run: its keys, its checks, its identity.

A recipe is what the user wrote; nothing here rewrites a value of it, and derived values live where they are used.
Reading one imports neither torch nor numpy, so that a mistake shows at once. Every complaint is a `UserError`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from engine.schema import Rule, UserError, key, one_line, parse, read_section, show, unparse, wrong
from models.shapes import VIT_SHAPES

PLAIN_VITS = ("vit", "vit_small", "vit_base", "vit_large", "vit_huge")
CONV_VITS = ("vit_conv", "vit_conv_small", "vit_conv_base")
SHAPE_KEYS = ("patch_size", "dim", "depth", "heads")
# How timm's plain vision transformers begin; whoever builds a timm trunk looks at the network itself.
TIMM_VIT = re.compile(r"timm/(aimv2|beit3|deit|eva|flexivit|test_vit|vit)")

POSITIVE = Rule(" > 0", lambda value: value > 0)
NOT_NEGATIVE = Rule(" >= 0", lambda value: value >= 0)
AT_LEAST_1 = Rule(" >= 1", lambda value: value >= 1)
AT_LEAST_2 = Rule(" >= 2", lambda value: value >= 2)
FRACTION = Rule(" from 0 to 1", lambda value: 0 <= value <= 1)
HUE = Rule(" from 0 to 0.5", lambda value: 0 <= value <= 0.5)
CROP = Rule(" > 0 and <= 1", lambda value: 0 < value <= 1)
TEXT = Rule(", in quotes if it looks like a number", lambda value: bool(value) and value.isprintable())
NETWORK = Rule(
    f": {', '.join((*PLAIN_VITS, *CONV_VITS))}, resnet50 or timm/<name>",
    lambda value: value in (*PLAIN_VITS, *CONV_VITS, "resnet50") or re.fullmatch(r"timm/[\w.-]+", value) is not None,
)
ARGUMENTS = Rule(", each a keyword argument", lambda value: all(name.isidentifier() for name in value))

section = dataclasses.dataclass(frozen=True, kw_only=True)


@section
class Run:
    dir: str = key(TEXT)
    seed: int = key(NOT_NEGATIVE)


@section
class Model:
    """null for patch_size, dim, depth and heads means the named network's own; `shape` resolves them."""

    name: str = key(NETWORK)
    image_size: int = key(AT_LEAST_1)
    patch_size: int | None = key(AT_LEAST_1, default=None)
    dim: int | None = key(AT_LEAST_1, default=None)
    depth: int | None = key(AT_LEAST_1, default=None)
    heads: int | None = key(AT_LEAST_1, default=None)
    freeze_patch_projection: bool = key()
    projector_hidden_dim: int = key(AT_LEAST_1, default=4096)
    output_dim: int = key(AT_LEAST_1, default=256)


@section
class Moco:
    """momentum: m0, where the cosine schedule of the momentum encoder starts on its way to 1."""

    temperature: float = key(POSITIVE)
    momentum: float = key(FRACTION)


@section
class Optimizer:
    """base_lr: per 256 images; the peak lr is base_lr * global batch / 256."""

    name: Literal["adamw", "lars"] = key()
    base_lr: float = key(POSITIVE)
    weight_decay: float = key(NOT_NEGATIVE)


@section
class Train:
    """max_steps ends the run early and changes nothing else: schedules follow epochs.

    A batch has two images or more: BatchNorm in training and a loss with negatives need them.
    """

    global_batch_size: int = key(AT_LEAST_2)
    epochs: int = key(AT_LEAST_1)
    warmup_epochs: float = key(NOT_NEGATIVE)
    max_steps: int | None = key(AT_LEAST_1, default=None)


@section
class Data:
    """val_root null: look for `train` and `val` inside root. max_bad_fraction: unreadable images that a run bears."""

    source: Literal["folder", "shards", "torchvision"] = key()
    root: str = key(TEXT)
    val_root: str | None = key(TEXT, default=None)
    dataset: str | None = key(TEXT, default=None)
    dataset_options: dict = key(ARGUMENTS, default_factory=dict)
    workers: int = key(NOT_NEGATIVE)
    max_bad_fraction: float = key(FRACTION)


@section
class Augment:
    """Pairs of probabilities are [view 1, view 2]; sigma in pixels; mean and std per channel of images in 0..1."""

    crop_min: float = key(CROP)
    brightness: float = key(NOT_NEGATIVE)
    contrast: float = key(NOT_NEGATIVE)
    saturation: float = key(NOT_NEGATIVE)
    hue: float = key(HUE)
    jitter_probability: float = key(FRACTION)
    grayscale_probability: float = key(FRACTION)
    blur_sigma: tuple[float, float] = key(POSITIVE)
    blur_probability: tuple[float, float] = key(FRACTION)
    solarize_probability: tuple[float, float] = key(FRACTION)
    flip_probability: float = key(FRACTION)
    mean: tuple[float, float, float] = key()
    std: tuple[float, float, float] = key(POSITIVE)


@section
class Checkpoint:
    every_steps: int = key(AT_LEAST_1)
    keep: int = key(AT_LEAST_1)


@section
class Log:
    every_steps: int = key(AT_LEAST_1)


@section
class Evaluate:
    """crop_fraction: side of the centre crop over the shorter side of the resized image; 1 sees the whole width."""

    knn_every_epochs: int = key(NOT_NEGATIVE)
    crop_fraction: float = key(CROP, default=0.875)


@section
class Parallel:
    """replicate: number of replicas under hybrid; 1 in the other modes."""

    compile: bool = key()
    precision: Literal["bf16", "float32", "float64"] = key()
    shard: Literal["full", "grad_op", "hybrid", "replicate"] = key()
    replicate: int = key(AT_LEAST_1)


@section
class Pretrain:
    """The recipe of `task: pretrain`. `load` checks it; one that is put together by hand is not checked."""

    task: Literal["pretrain"] = "pretrain"
    run: Run
    model: Model
    moco: Moco
    optimizer: Optimizer
    train: Train
    data: Data
    augment: Augment
    checkpoint: Checkpoint
    log: Log
    evaluate: Evaluate
    parallel: Parallel


TASKS = {"pretrain": Pretrain}

FREE_ON_RESUME = frozenset(
    ["run.dir", "data.root", "data.val_root", "data.workers", "train.max_steps"]
    + [
        f"{name}.{field.name}"
        for name, kind in (("checkpoint", Checkpoint), ("log", Log), ("evaluate", Evaluate), ("parallel", Parallel))
        for field in dataclasses.fields(kind)
    ]
)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Pretrain:
    """The checked recipe of a YAML file, after `dotted.key=value` overrides (value: YAML; of equal keys the last).

    Raises UserError for a file that cannot be read, is not YAML or not a mapping, for an unknown or missing key, and
    for a value of a wrong type, out of range or at odds with another.
    """
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"recipe ({one_line(path)}) must be a readable file: {reason}; pass the path of one") from None
    return loads(text, f"recipe ({one_line(path)})", overrides)


def loads(text: str | bytes, origin: str, overrides: Sequence[str] = ()) -> Pretrain:
    """`load` for YAML text; `origin` names it in errors."""
    raw = parse(text, origin)
    if not isinstance(raw, dict) or not raw:
        found = show(raw) if raw else "nothing"
        raise UserError(f"{origin} must be a mapping of keys to values; found {found}")
    for override in overrides:
        _apply(raw, override)
    recipe = _build(raw)
    _check_combinations(recipe)
    return recipe


def dump(recipe: Pretrain) -> str:
    """YAML that loads back to an equal recipe."""
    return unparse(dataclasses.asdict(recipe))


def _apply(raw: dict, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override ({one_line(override)}) must be of the form dotted.key=value; write it so")
    *parents, leaf = dotted.split(".")
    for name in parents:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise UserError(f"{one_line(dotted)} is no key of the recipe; {name} holds a value and no keys")
    raw[leaf] = parse(text, f"override ({one_line(override)})")


def _build(raw: dict) -> Pretrain:
    task = raw.get("task")
    if not isinstance(task, str) or task not in TASKS:
        found = show(task) if "task" in raw else "missing"
        raise UserError(f"task ({found}) must be one of {', '.join(TASKS)}; set it at the top of the recipe")
    kinds = {field.name: field.type for field in dataclasses.fields(TASKS[task]) if field.name != "task"}
    known = [f"{name}.{field.name}" for name, kind in kinds.items() for field in dataclasses.fields(kind)]
    for name in _keys(raw):
        if name not in known and name not in kinds and name != "task":
            raise UserError(f"{one_line(name)} is no key of the recipe; {_advice(name, known)}")
    for name in kinds:
        if not isinstance(raw.get(name, {}), dict):
            raise wrong(name, raw[name], "a mapping", f"write its keys below it, as {name}: {{key: value}}")
    return TASKS[task](task=task, **{name: read_section(name, kind, raw.get(name, {})) for name, kind in kinds.items()})


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


def _check_combinations(recipe: Pretrain) -> None:
    _check_model(recipe.model)
    _check_data(recipe.data)
    train, sigma, parallel = recipe.train, recipe.augment.blur_sigma, recipe.parallel
    if train.warmup_epochs > train.epochs:
        raise wrong("train.warmup_epochs", train.warmup_epochs, f"at most train.epochs ({train.epochs})")
    if sigma[0] > sigma[1]:
        raise wrong("augment.blur_sigma", sigma, "a list of the smallest and the largest sigma, in this order")
    if parallel.shard != "hybrid" and parallel.replicate != 1:
        do = "pass parallel.replicate=1 or parallel.shard=hybrid"
        raise wrong("parallel.replicate", parallel.replicate, f"1 under parallel.shard {parallel.shard}", do)


def _check_data(data: Data) -> None:
    if data.source == "torchvision":
        if data.dataset is None:
            raise wrong("data.dataset", None, "the name of a class of torchvision.datasets")
        return
    if data.dataset is not None:
        raise wrong("data.dataset", data.dataset, f"null under data.source {data.source}")
    if data.dataset_options:
        raise wrong("data.dataset_options", data.dataset_options, f"{{}} under data.source {data.source}")


def _check_model(model: Model) -> None:
    name, resolved = model.name, shape(model)
    if model.freeze_patch_projection and name not in PLAIN_VITS and not TIMM_VIT.match(name):
        raise wrong("model.freeze_patch_projection", True, f"false for {name}, which is no plain ViT")
    for field in SHAPE_KEYS:
        value = getattr(model, field)
        if name in ("vit", "vit_conv") and value is None:
            raise wrong(f"model.{field}", value, f"an integer >= 1 for {name}, which has no shape of its own")
        if resolved is None and value is not None:
            raise wrong(f"model.{field}", value, f"null for {name}, whose shape is fixed")
    if resolved is not None:
        _check_shape(model.image_size, **resolved)


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

    None for networks that bring their shape (resnet50, timm/*).
    """
    if model.name not in PLAIN_VITS + CONV_VITS:
        return None
    named = VIT_SHAPES.get(model.name, {"conv_stem": model.name in CONV_VITS})
    return named | {name: getattr(model, name) for name in SHAPE_KEYS if getattr(model, name) is not None}


def check_world(recipe: Pretrain, world_size: int) -> None:
    """Raises UserError where `world_size` processes cannot run the recipe. For before any process group is made."""
    batch, replicas = recipe.train.global_batch_size, recipe.parallel.replicate
    if batch % world_size:
        do = f"start another number of processes or pass train.global_batch_size={-(-batch // world_size) * world_size}"
        raise wrong("train.global_batch_size", batch, f"divisible by the number of processes ({world_size})", do)
    if world_size % replicas:
        raise wrong("parallel.replicate", replicas, f"a divisor of the number of processes ({world_size})")


# ---- identity and files ----------------------------------------------------------------------------------------------


def flatten(recipe: Pretrain) -> dict[str, Any]:
    """{dotted key: value} of the whole recipe, `task` included; data.dataset_options is one value."""
    sections = dataclasses.asdict(recipe)
    task = sections.pop("task")
    return {"task": task} | {f"{name}.{leaf}": value for name, part in sections.items() for leaf, value in part.items()}


def fingerprint(recipe: Pretrain) -> str:
    """sha256, in hex, of every key that a resume may not change."""
    bound = {name: value for name, value in flatten(recipe).items() if name not in FREE_ON_RESUME}
    return hashlib.sha256(json.dumps(bound, sort_keys=True, allow_nan=False).encode()).hexdigest()


def resume_differences(old: Pretrain, new: Pretrain) -> list[str]:
    """`key (old -> new)` for each key that differs though a resume may not change it; empty: it may go on."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name} ({show(before[name])} -> {show(after[name])})"
        for name in before
        if name not in FREE_ON_RESUME and before[name] != after[name]
    ]


def locate(path: str, recipe_file: str | Path) -> Path:
    """A path that a recipe names: relative to the working directory, else to the recipe file's folder.

    Where nothing is at either place it is the one in the working directory; the caller says that it is missing.
    """
    here, beside = Path(path), Path(recipe_file).parent / path
    return beside if os.path.exists(beside) and not os.path.exists(here) else here
