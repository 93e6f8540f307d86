"""What training a classifier on labelled images needs, whichever part of the network learns: the task's common half,
and its way through the trainer's loop from the run directory to the result."""

import hashlib
import io
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from engine.checkpoint.load import load, newest_valid
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.retain import clean
from engine.data.augment import Flip
from engine.data.decode import Crops
from engine.data.loader import Batch, train_batches
from engine.data.order import Order
from engine.data.splits import Splits
from engine.distributed.agreement import agreement, gather, share
from engine.distributed.world import World
from engine.errors import UserError
from engine.evaluation.features import features
from engine.evaluation.subject import Subject
from engine.pictures.confusion import by_class, confusion_picture
from engine.recipe.identity import fingerprint
from engine.recipe.load import dump
from engine.recipe.sections import Finetune, Linear
from engine.runs import report
from engine.runs.bad_images import BadImages
from engine.runs.directory import RunDirectory, check_same_recipe
from engine.runs.log import MetricsLog
from engine.runs.trainer import Plan, Trainer

PICTURED = 8  # images of which TensorBoard shows the crop
TOP = 5  # guesses that are looked at


class Supervised(ABC):
    """The common half of a trainer's task (engine.runs.trainer.Task) with labels.

    Args:
        subject: the images' form, and the network that is trained or whose features are.
        weights_digest: of the weights that the run starts from.
    """

    metric: ClassVar[str]  # begins the monitor's keys
    chosen: ClassVar[str]  # which row of the monitor is the result, in words
    keeps_partial: ClassVar[bool]  # whether the last, partial batch of an epoch is used

    def __init__(self, recipe: Linear | Finetune, world: World, sources: Splits, subject: Subject, weights_digest: str):
        self.recipe, self.world, self.sources, self.subject = recipe, world, sources, subject
        self.weights_digest = weights_digest
        self.directory = Path(recipe.run.dir)
        self.log: MetricsLog | None = None  # comes with the run directory, in `run`
        self.labels_N = torch.from_numpy(sources.train.labels)
        self.classes = sources.train.classes
        self.bad_images = BadImages(recipe.data.max_bad_fraction, world)
        self.order = self.make_order()
        self.steps_per_epoch = self.order.steps_per_epoch
        self.augment = Flip(recipe.augment.flip_probability, subject.mean, subject.std, recipe.run.seed, subject.dtype)

    # ---- what the two tasks differ in

    @property
    @abstractmethod
    def step(self) -> int: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds."""

    @abstractmethod
    def train_step(self, batch: Batch) -> Any: ...

    @abstractmethod
    def describe(self, output: Any) -> dict[str, float]: ...

    @abstractmethod
    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        """Of all ranks' validation images, on the CPU: the likeliest classes [Q, min(5, C)] and the labels [Q].

        A network's classes stand under the name with which its keys in the monitor begin, `metric` first.
        """

    @abstractmethod
    def reported(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The monitor's row that is the result."""

    @abstractmethod
    def opening(self) -> list[str]:
        """What is derived from the recipe, the data and the launch, in lines."""

    def make_order(self) -> Order:
        images, batch = len(self.sources.train), self.images_per_step
        return Order(self.recipe.run.seed, images, batch, keep_partial=self.keeps_partial)

    def make_crops(self) -> Crops:
        return Crops(self.subject.image_size, self.recipe.augment.crop_min, views=1)

    # ---- the trainer's side

    @property
    def images_per_step(self) -> int:
        return self.recipe.train.global_batch_size

    def plan(self) -> Plan:
        recipe, total = self.recipe, self.recipe.train.epochs * self.steps_per_epoch
        return Plan(
            last_step=min(total, recipe.train.max_steps or total),
            log_every=recipe.log.every_steps,
            checkpoint_every=recipe.checkpoint.every_steps,
            keep=recipe.checkpoint.keep,
            evaluate_every=self.steps_per_epoch,
        )

    def batches(self, last_step: int) -> Iterator[Batch]:
        return train_batches(
            self.sources.train,
            self.order,
            self.make_crops(),
            range(self.step, last_step),
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def images(self, batch: Batch) -> Tensor:
        """Normalised [B, 3, S, S] on the device."""
        crops, sample_B = (t.to(self.world.device, non_blocking=True) for t in (batch.crops, batch.sample_B))
        return self.augment(crops, sample_B, batch.epoch)

    def labels(self, batch: Batch) -> Tensor:
        """Of the images that the batch shows, on the device."""
        return self.labels_N[batch.shown_B].to(self.world.device, non_blocking=True)

    def row(self, loss: float, lr: float) -> dict[str, float]:
        """The metrics of a step that both tasks have."""
        epochs = -(-self.step // self.steps_per_epoch)  # begun
        bad_images = self.bad_images.check(epochs * len(self.sources.train))
        return {"epoch": self.step / self.steps_per_epoch, "loss": loss, "lr": lr, "bad_images": bad_images}

    def evaluate(self) -> dict[str, float] | None:
        """Of the validation images; before the first step there is nothing to know."""
        if self.step == 0:
            return None
        predictions, label_Q = self.predict()
        row = {"epoch": self.step / self.steps_per_epoch}
        for name, prediction_QT in predictions.items():
            right_QT = prediction_QT == label_Q[:, None]
            row[f"{name}_top1"] = right_QT[:, 0].double().mean().item()
            row[f"{name}_top5"] = right_QT.any(1).double().mean().item()
        if self.world.is_first and self.reported([*self.monitor_rows(), row]) is row:
            self.show_classes(predictions[self.metric][:, 0], label_Q)
        return row

    def val_outputs(self, subject: Subject, remedy: str) -> tuple[Tensor, Tensor]:
        """This rank's outputs of the subject's network, and labels, of the validation images."""
        workers = self.recipe.data.workers
        output_ND, _, label_N = features(subject, self.sources.val, None, self.world, workers, remedy)
        return output_ND, label_N

    def gathered(self, predictions: dict[str, Tensor], label_N: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The rows of all ranks, of one."""
        parts, labels = zip(*gather((predictions, label_N), self.world.host_group), strict=True)
        return {name: torch.cat([part[name] for part in parts]) for name in predictions}, torch.cat(labels)

    def show_classes(self, prediction_Q: Tensor, label_Q: Tensor) -> None:
        """classes.csv and confusion.png of the epoch that is the result so far."""
        replace_file(self.directory / "classes.csv", by_class(prediction_Q, label_Q, self.classes).encode())
        try:
            png = confusion_picture(prediction_Q, label_Q, self.classes)
        except UserError as error:
            say(self.world, [f"confusion.png is left out: {error}"])
            return
        replace_file(self.directory / "confusion.png", png)
        self.log.images("confusion", pil_to_tensor(Image.open(io.BytesIO(png)).convert("RGB")), self.step)

    def picture(self, batch: Batch) -> Tensor:
        """uint8 [3, H, W]: what the network sees, one column per image."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.subject.mean, self.subject.std))
        pixels = ((self.images(batch)[:PICTURED].cpu() * std + mean) * 255).clamp(0, 255).byte()
        return pixels.permute(1, 2, 0, 3).flatten(2)

    def monitor_rows(self) -> list[dict[str, float]]:
        """What metrics.jsonl says of validation images, oldest first."""
        with (self.directory / "metrics.jsonl").open() as file:
            return [row for row in map(json.loads, file) if f"{self.metric}_top1" in row]

    def data_line(self) -> str:
        train, val, classes = self.sources.train, self.sources.val, len(self.classes)
        return f"data      {len(train):,} training images of {classes} classes, {len(val):,} for val"

    # ---- checkpoints

    def checkpoint(self) -> dict[str, Any]:
        state = self.begun_with() | {
            "step": self.step,
            "recipe": dump(self.recipe),
            "bad_images": self.bad_images.count(),
        }
        return {"tensors": self.tensors(), "state": state, "recipe_sha256": fingerprint(self.recipe)}

    def begun_with(self) -> dict[str, str]:
        """What a resume must find as it was, beside the recipe."""
        return {
            "train": self.sources.train.fingerprint,
            "val": self.sources.val.fingerprint,
            "network": self.weights_digest,
        }

    def resume(self, saved: dict[str, Any]) -> None:
        self.bad_images.total = saved["bad_images"]


def digest(values: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of tensors in their order: name, shape, type and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in values:
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def run(task: Supervised, started: float) -> Mapping[str, float]:
    """Train a task to its recipe's end in its run directory; a run that is found there goes on.

    All ranks call it together. `started`: on the performance counter. Returns where the time went, in seconds.

    Raises:
        UserError, RunFailed, Interrupted: engine.cli turns them into words and exit codes.
    """
    recipe, world = task.recipe, task.world
    with RunDirectory(task.directory, world) as directory:
        clean(directory.checkpoints, world.host_group)
        found = newest_valid(directory.checkpoints, world.host_group)
        if found is None:
            directory.check_fresh(recipe)
        else:
            check_resume(found, task)
            task.resume(load(found, task.tensors(), group=world.host_group))
        directory.write_recipe(recipe)
        with agreement(world.host_group):
            monitor = f"{task.metric}_top1"
            task.log = MetricsLog(directory.path, task.step if found else -1, monitor=monitor, enabled=world.is_first)
        say(world, task.opening())
        if found is not None:
            report.resumed(world, found, task.step, task.plan())
        trainer = Trainer(task, task.plan(), world=world, checkpoints=directory.checkpoints, log=task.log)
        trainer.seconds["start-up"] = time.perf_counter() - started
        trainer.run()
        task.log.close()
        return trainer.seconds


def check_resume(checkpoint: Path, task: Supervised) -> None:
    """Raises UserError, on every rank, where a checkpoint was begun with another recipe, network or other images."""
    directory = f"run.dir ({task.recipe.run.dir})"
    with agreement(task.world.host_group):
        manifest = read_manifest(checkpoint)
        check_same_recipe(manifest, task.recipe)
        begun, now = manifest.state, task.begun_with()
        if begun["network"] != now["network"]:
            raise UserError(
                f"{directory} holds a run on another network; give it its own CHECKPOINT, or pass another run.dir"
            )
        for name in ("train", "val"):
            if begun[name] != now[name]:
                raise UserError(f"--{name} must hold the images that {directory} began with; or pass another run.dir")


# ---- words -----------------------------------------------------------------------------------------------------------


def say(world: World, lines: list[str]) -> None:
    if world.is_first:
        print("\n".join(lines), flush=True)


def closing(task: Supervised, seconds: Mapping[str, float]) -> dict[str, float]:
    """Result and files; the result's row, from rank 0, on every rank."""
    row: dict[str, float] = {}
    with agreement(task.world.host_group):
        if task.world.is_first:
            rows = task.monitor_rows()
            if not rows:
                raise UserError(f"{task.directory / 'metrics.jsonl'} must have the rows of the run; start it anew")
            row = task.reported(rows)
            top1, top5 = (row[f"{task.metric}_{top}"] for top in ("top1", "top5"))
            say(
                task.world,
                [
                    f"result    top-1 {top1:.2%}, top-5 {top5:.2%} at epoch {row['epoch']:g}, {task.chosen}",
                    f"time      {', '.join(f'{what} {spent:.0f} s' for what, spent in seconds.items())}",
                    f"files     {task.directory}: classes.csv, confusion.png, metrics.jsonl, tensorboard/",
                ],
            )
    return share(row, task.world.host_group)


def replace_file(path: Path, content: bytes) -> None:
    """A reader finds the old file or the new one."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
