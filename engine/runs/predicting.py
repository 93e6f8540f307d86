"""Classes of any images, by the newest classifier of a run of linear classification or fine-tuning."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.checkpoint.load import read_tensors
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.state import RunState
from engine.data.decode import Reading
from engine.data.source import Root, Source
from engine.data.splits import open_all
from engine.data.workers import Workers
from engine.distributed.world import World, in_turn
from engine.errors import UserError
from engine.evaluation.rows import FileNames, Table, write_rows, written
from engine.evaluation.subject import Subject, open_subject
from engine.recipe.load import loads, task_of
from engine.recipe.sections import Finetune, Linear
from engine.runs.linear import own_tensors, preparation
from engine.weights.opening import checkpoint_folder, open_trunk
from engine.weights.weights import digest, fill_trunk
from models.shapes import TIMM

HEADER = ("name", "class", "probability")


def predict(
    run: Path, out: Path, data: Root, world: World, workers: int, checkpoint: str | None
) -> dict[str, int | str]:
    """Write the likeliest class of every image of `data` and its probability to the CSV `out`; all ranks call it.

    checkpoint: where the network of a linear run lies now, if not where it was.
    Returns {"images", "file"}. Raises UserError and RunFailed; then OUT is as it was.
    """
    source = open_all(data, world)
    names = FileNames(source, data)
    with Workers([source], workers, device=world.device) as readers:
        subject, classes = in_turn(world, lambda: open_classifier(run, checkpoint, world.device))
        with written(world, out) as (place,):
            count = write_rows(
                subject, source, "classes of data", world, readers, lambda: [Predictions(place, source, names, classes)]
            )
    return {"images": count, "file": str(out)}


class Predictions(Table):
    """A .csv file of HEADER, given logits."""

    def __init__(self, place: Path, source: Source, names: FileNames, classes: Sequence[str]):
        super().__init__(place, source, names, HEADER)
        self._classes = classes

    def line(self, row: int, name: str, label: str, output_D: np.ndarray) -> list[object]:
        share_C = torch.from_numpy(output_D).double().softmax(0)
        best = int(share_C.argmax())
        return [name, self._classes[best], f"{share_C[best]:.6f}"]


def open_classifier(run: Path, checkpoint: str | None, device: torch.device) -> tuple[Subject, Sequence[str]]:
    """The network of a run with its classifier, as its own evaluation uses it, and the names of its classes.

    Raises UserError where `run` is no such run, or its network is not where it was.
    """
    folder = checkpoint_folder(run) if run.exists() else None
    if folder is None:
        raise UserError(f"RUN ({run}) must be a run of `evaluate linear` or `evaluate finetune`; pass its directory")
    state = RunState.read(folder, read_manifest(folder))
    task = task_of(state.recipe)
    if task == "linear":
        subject, names = _of_linear(folder, state, checkpoint, device), ("classifier.weight", "classifier.bias")
    elif task == "finetune":
        if checkpoint is not None:
            raise UserError(f"--checkpoint ({checkpoint}) must be left out for a fine-tuned run, which has its network")
        subject, names = _of_finetune(folder, state, device), ("model.head.weight", "model.head.bias")
    else:
        raise UserError(f"RUN ({run}) must be of `evaluate linear` or `finetune`, and has no classifier; make one")
    head = dict(read_tensors(folder, names))
    network = nn.Sequential(subject.network, _linear(*(head[name] for name in names))).to(device).eval()
    return dataclasses.replace(subject, network=network), state.classes or _former_classes(folder)


def _linear(weight_CD: Tensor, bias_C: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight_CD.shape))
    layer.load_state_dict({"weight": weight_CD.float(), "bias": bias_C.float()})
    return layer


def _of_linear(folder: Path, state: RunState, checkpoint: str | None, device: torch.device) -> Subject:
    checkpoint, frozen = checkpoint or state.frozen.get("checkpoint"), state.frozen
    if checkpoint is None:
        raise UserError(f"--checkpoint (missing) must be given for {folder}, which does not say what it was made on")
    if not (checkpoint.startswith(TIMM) or Path(checkpoint).exists()):
        raise UserError(f"--checkpoint ({checkpoint}) must be where the network of {folder} lies now; pass its path")
    recipe = loads(state.recipe, f"recipe of {folder}", kind=Linear)
    heads = int(frozen["heads"]) if "heads" in frozen else None
    encoder = "momentum" if frozen.get("encoder") == "momentum" else "base"
    subject = open_subject(checkpoint, device, encoder=encoder, heads=heads, **preparation(recipe))
    if state.network != digest(own_tensors(subject.network)):
        raise UserError(f"CHECKPOINT ({checkpoint}) must be what the run was made on; pass that as --checkpoint")
    return subject


def _of_finetune(folder: Path, state: RunState, device: torch.device) -> Subject:
    weights = open_trunk(str(folder))
    about, recipe = weights.known(), loads(state.recipe, f"recipe of {folder}", kind=Finetune)
    form = about.image_size, about.mean, about.std, recipe.evaluate.crop_fraction, recipe.augment.interpolation
    return Subject(fill_trunk(weights).to(device), *form, reading=Reading.of(recipe.data))


def _former_classes(folder: Path) -> list[str]:
    """Of a run whose checkpoints do not say them: those of the table that it left."""
    file = folder.parent.parent / "classes.csv"
    if not file.exists():
        raise UserError(f"RUN ({file.parent}) must have its classes.csv, with the classes' names; put it back")
    with file.open(encoding="utf-8", newline="") as lines:
        return [row["class"] for row in csv.DictReader(lines)]
