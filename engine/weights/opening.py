"""Any CHECKPOINT opened, for every front door, as named weights.

A CHECKPOINT is a run directory, a checkpoint directory, an exported file or folder, weights of others or
`timm/<name>`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from engine.checkpoint.layout import POINTERS, read_pointer
from engine.checkpoint.load import read_tensors
from engine.checkpoint.manifest import NAME as MANIFEST
from engine.checkpoint.manifest import Manifest, read_manifest
from engine.checkpoint.state import RunState
from engine.errors import UserError, did_you_mean, one_line, reason
from engine.files import newest_lines, row_on
from engine.logger import note, warn
from engine.recipe.load import loads, task_of
from engine.recipe.sections import Pretrain
from engine.weights.config import cut_of_timm
from engine.weights.hub import unreachable
from engine.weights.read import own_words, read_weights
from engine.weights.weights import BASE, About, EncoderName, Weights, base_shapes, check_names, declared, renaming
from models.architecture import Architecture, by_shape, moco_shapes, trunk_shapes
from models.shapes import TIMM

MODEL = "model."  # how the networks' tensors begin in a sharded checkpoint


def open_trunk(
    checkpoint: str, encoder: EncoderName = "base", *, untrained: bool = False, heads: int | None = None
) -> Weights:
    """One trunk's weights of a CHECKPOINT, or what they were before training; says what is ignored.

    heads: as in `open_weights`. Raises UserError.
    """
    weights = open_weights(checkpoint, heads)
    for line in weights.notes:
        note(line)
    return _untrained(weights) if untrained else weights.trunk(encoder)


def open_weights(checkpoint: str, heads: int | None = None) -> Weights:
    """The weights of a CHECKPOINT; no tensor but positions is read yet.

    heads: of a ViT whose file does not tell its number of them. Raises UserError, also where it tells another.
    """
    weights = _opened(checkpoint, heads)
    if heads is not None and weights.about is not None:
        known = by_shape(weights.about.architecture).arguments.get("heads", "left out")
        if known != heads:
            raise UserError(f"--heads ({heads}) must be {known} for CHECKPOINT ({checkpoint}); leave it out")
    return weights


def _opened(checkpoint: str, heads: int | None) -> Weights:
    path = Path(checkpoint)
    try:
        if checkpoint.startswith(TIMM) and not path.exists():
            return _from_timm(checkpoint)
        if not checkpoint or not path.exists():  # "" would be the working directory
            raise UserError(
                f"CHECKPOINT ({checkpoint}) must exist; pass a run, a checkpoint, an export, a file or timm/<name>"
            )
        sharded = checkpoint_folder(path)
        return read_weights(path, heads) if sharded is None else _from_shards(sharded)
    except OSError as error:
        raise UserError(f"CHECKPOINT ({checkpoint}) must be readable: {reason(error)}; pass another path") from error
    except ValueError as error:  # models' word on a network that cannot be
        raise UserError(f"CHECKPOINT ({checkpoint}) must hold a network that can be built: {error}") from error


def _untrained(weights: Weights) -> Weights:
    """The trunk before training, as a run of its recipe begins. Raises UserError where that began with weights."""
    about, shapes = weights.known(), weights.trunk("base").shapes
    seed = _seed(loads(about.recipe, "recipe of the checkpoint"), weights.origin) if about.recipe else 0
    with torch.device("meta"):
        trunk = about.architecture.build()

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """In the network's order and with counts as reals: runs know by a digest of this what they began with."""
        draw, wanted = trunk.initial_values(seed), set(names)
        for inner, tensor in (*trunk.module.named_parameters(), *trunk.module.named_buffers()):
            if BASE + inner in wanted:
                count = inner.endswith("num_batches_tracked")
                yield BASE + inner, torch.zeros(tensor.shape) if count else draw(inner, tensor.shape)

    return Weights(about, shapes, read, "the untrained network")


def _seed(recipe: Pretrain, origin: str) -> int:
    """What initial weights were drawn by. Raises UserError where none were."""
    for key, value in {"model.weights": recipe.model.weights, "run.continue_from": recipe.run.continue_from}.items():
        if value is not None:
            raise UserError(
                f"--baseline (initial) must be left out for {origin}, which began with the weights of "
                f"{key} ({one_line(value)}); pass those as CHECKPOINT"
            )
    return recipe.run.seed


def checkpoint_folder(path: Path) -> Path | None:
    """The checkpoint that a path means; None where it is no sharded one."""
    if path.name in POINTERS and path.is_file():
        return path.parent / (read_pointer(path.parent, path.name) or "")
    if (path / MANIFEST).exists():
        return path
    for checkpoints in (path / "checkpoints", path):
        if name := read_pointer(checkpoints, "latest") if checkpoints.is_dir() else None:
            return checkpoints / name
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").exists():
        raise UserError(
            f"CHECKPOINT ({path}) must be a run with a checkpoint; it has none yet: run it, or pass another"
        )
    return None


def _from_shards(folder: Path) -> Weights:
    manifest = read_manifest(folder)
    state = RunState.read(folder, manifest)
    if (finetuned := own_words(state.about)) is not None:
        return _from_finetuned(folder, manifest, finetuned)
    if task_of(state.recipe) == "linear":
        raise UserError(
            f"CHECKPOINT ({folder}) must have a network, and a run of task linear has a classifier alone; "
            "pass the CHECKPOINT that it was made on"
        )
    recipe = loads(state.recipe, f"recipe of {folder}")
    about = _about(recipe, state, _metrics(folder.parent.parent / "metrics.jsonl", state.step))
    expected = moco_shapes(about.architecture, recipe.model.projector_hidden_dim, recipe.model.output_dim)
    names = {name.removeprefix(MODEL): name for name in manifest.tensors if name.startswith(MODEL)}
    return _stored(folder, manifest, about, names, expected)


def _about(recipe: Pretrain, state: RunState, metrics: Mapping[str, float]) -> About:
    return About(
        declared(recipe.model),
        recipe.model.image_size,
        recipe.augment.mean,
        recipe.augment.std,
        recipe=state.recipe,
        step=state.step,
        epoch=int(metrics["epoch"]) if "epoch" in metrics else None,
        knn_top1=metrics.get("knn_top1"),
        licence=state.licence,
    )


def _from_finetuned(folder: Path, manifest: Manifest, about: About) -> Weights:
    """The trunk of a fine-tuned network and, as its momentum encoder, that of its moving average where it has one."""
    theirs = {f"{MODEL}trunk.": "base.trunk.", "ema.trunk.": "momentum.trunk."}
    names = {
        ours + name.removeprefix(prefix): name
        for prefix, ours in theirs.items()
        for name in manifest.tensors
        if name.startswith(prefix)
    }
    trunk = trunk_shapes(about.architecture)
    encoders = {name.split(".")[0] for name in names} | {"base"}
    expected = {f"{encoder}.trunk.{name}": shape for encoder in sorted(encoders) for name, shape in trunk.items()}
    return _stored(folder, manifest, about, names, expected)


def _stored(
    folder: Path, manifest: Manifest, about: About, names: dict[str, str], expected: dict[str, torch.Size]
) -> Weights:
    """What a checkpoint holds of a network; names: {ours: the checkpoint's}."""
    found = {ours: torch.Size(manifest.tensors[name]["shape"]) for ours, name in names.items()}
    check_names(found, expected, str(folder))
    return Weights(about, expected, renaming(partial(read_tensors, folder), names), str(folder))


def _metrics(file: Path, step: int) -> dict[str, float]:
    """`epoch` and `knn_top1`, the newest up to a step; those that the metrics beside the run's checkpoints have."""
    newest: dict[str, float] = {}
    try:
        for line, start in newest_lines(file) if file.is_file() else ():
            missing = [key for key in ("epoch", "knn_top1") if key not in newest]
            if not missing:
                break
            if any(key.encode() in line for key in missing):
                row = row_on(line, f"{file} at byte {start}")
                newest |= {key: row[key] for key in missing if key in row and row["step"] <= step}
    except UserError as error:  # the weights are sound all the same
        warn(f"epoch and kNN of the run are not known: {error}")
        return {}
    return newest


def _from_timm(checkpoint: str) -> Weights:
    """A model of timm; its published weights are fetched when they are read."""
    name = checkpoint.removeprefix(TIMM)
    if not timm.is_model(name):
        models = [*timm.list_models(), *timm.list_pretrained()]
        raise UserError(
            f"CHECKPOINT ({checkpoint}) must be a timm model or a path; "
            + did_you_mean(checkpoint, map(TIMM.__add__, models), "do `timm.list_models()` to see them")
        )
    with torch.device("meta"):
        config = _create(checkpoint, pretrained=False).pretrained_cfg
    image_size = config["input_size"][-1]
    architecture = Architecture("timm", {"name": name, "image_size": image_size})
    cut = cut_of_timm(config, image_size)
    about = About(
        architecture,
        image_size,
        tuple(config["mean"]),
        tuple(config["std"]),
        licence=config.get("license"),
        stated_crop=cut.fraction,
        interpolation=cut.interpolation,
    )

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        if why := unreachable(config):
            raise _unfetched(checkpoint, why)
        tensors = _create(checkpoint, pretrained=True).state_dict()
        return ((name, tensors[name.removeprefix(BASE)]) for name in names)

    return Weights(about, base_shapes(architecture), read, checkpoint, cut.notes(checkpoint))


def _create(checkpoint: str, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(checkpoint.removeprefix(TIMM), pretrained=pretrained, num_classes=0)
    except Exception as error:  # whatever the network, the hub or its cache has to say
        raise _unfetched(checkpoint, one_line(error)[:300]) from error


def _unfetched(checkpoint: str, why: str) -> UserError:
    return UserError(
        f"CHECKPOINT ({checkpoint}) must have published weights that can be fetched: {why}; mend that, pass a "
        "file of them, or --baseline initial for random weights where a command takes it"
    )
