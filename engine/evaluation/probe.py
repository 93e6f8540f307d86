"""The paper's linear protocol, put together: recipe -> images, frozen network, classifier -> the trainer's loop."""

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from engine.agree import agreement, gather, share
from engine.checkpoint.load import load, newest_valid
from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.retain import clean
from engine.data.augment import Augment
from engine.data.loader import Batch, train_batches
from engine.data.sampler import steps_per_epoch
from engine.distributed import World
from engine.evaluation.confusion import by_class, confusion_picture
from engine.evaluation.images import open_labelled
from engine.evaluation.linear import LinearProbe, linear_step
from engine.evaluation.measure import features
from engine.evaluation.subject import Subject, open_subject
from engine.front_door import RunFailed
from engine.recipe import UserError, dump, fingerprint, loads, resume_differences
from engine.tasks import Linear
from engine.training import report
from engine.training.bad_images import BadImages
from engine.training.metrics import MetricsLog
from engine.training.run_directory import RunDirectory
from engine.training.sources import Sources
from engine.training.trainer import Plan, Trainer
from engine.weights.weights import EncoderName

PICTURED = 8  # images of which TensorBoard shows the crop
ROWS = 8192  # features that are classified at a time


def probe(recipe: Linear, checkpoint: str, encoder: EncoderName, world: World) -> dict[str, float]:
    """Train a classifier on a CHECKPOINT's frozen trunk to the recipe's end; a run that is found goes on.

    All ranks call it together. Returns {"top1", "top5", "learning_rate"}: the best epoch's, and the first epoch's rate.

    Raises:
        UserError, RunFailed, Interrupted: engine.front_door turns them into words and exit codes.
    """
    started = time.perf_counter()
    data = recipe.data
    sources = open_labelled(
        data.root,
        data.val_root or data.root,
        world,
        kind=data.source,
        dataset=data.dataset,
        dataset_options=data.dataset_options,
    )
    subject = open_subject(checkpoint, world, encoder=encoder, crop_fraction=recipe.evaluate.crop_fraction)
    frozen = digest(subject.network)
    with RunDirectory(Path(recipe.run.dir), world) as directory:
        clean(directory.checkpoints, world.host_group)
        found = newest_valid(directory.checkpoints, world.host_group)
        step = 0 if found is None else check_resume(found, recipe, sources, frozen, world)
        directory.write_recipe(recipe)
        with agreement(world.host_group):
            log = MetricsLog(directory.path, step if found else -1, monitor="linear_top1", enabled=world.is_first)
        task = Probing(recipe, world, sources, subject, frozen, directory.path, log)
        if found is not None:
            task.resume(load(found, task.probe.tensors(), group=world.host_group))
        opening(task, checkpoint)
        if found is not None:
            report.resumed(world, found, step, task.plan())
        trainer = Trainer(task, task.plan(), world=world, checkpoints=directory.checkpoints, log=log)
        trainer.seconds["start-up"] = time.perf_counter() - started
        trainer.run()
        log.close()
        check_frozen(subject.network, frozen, world)
        return closing(task, trainer.seconds)


def check_resume(checkpoint: Path, recipe: Linear, sources: Sources, frozen: str, world: World) -> int:
    """The step of a checkpoint that this recipe, these images and this network (its digest) may go on from.

    Raises:
        UserError: on every rank, where the run was begun with others.
    """
    step, run = 0, f"run.dir ({recipe.run.dir})"
    with agreement(world.host_group):
        manifest = read_manifest(checkpoint)
        step, state = manifest.step, manifest.state
        begun = loads(state["recipe"], f"recipe of {checkpoint}", kind=Linear)
        differences = resume_differences(begun, recipe)
        if differences:
            other = ", ".join(differences)
            raise UserError(f"{run} holds a run with other values: {other}; go on with its own, or pass another --out")
        if state["network"] != frozen:
            raise UserError(f"{run} holds a run on another network; give it its own CHECKPOINT, or pass another --out")
        for name, source in (("train", sources.train), ("val", sources.val)):
            if state[name] != source.fingerprint:
                raise UserError(f"--{name} must hold the images that {run} began with; or pass another --out")
    return step


def digest(network: nn.Module) -> str:
    """sha256 of every parameter and buffer: name, shape, type and bits."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


def check_frozen(network: nn.Module, before: str, world: World) -> None:
    """Raises RunFailed, on every rank, where the network is not what it was."""
    if any(gather(digest(network) != before, world.host_group)):
        raise RunFailed("the frozen trunk's weights or buffers changed, so the result is not reported")


class Probing:
    """The trainer's task (engine.training.trainer.Task): a linear classifier on a frozen trunk's features."""

    def __init__(
        self,
        recipe: Linear,
        world: World,
        sources: Sources,
        subject: Subject,
        frozen: str,
        directory: Path,
        log: MetricsLog,
    ):
        self.recipe, self.world, self.sources, self.subject, self.frozen = recipe, world, sources, subject, frozen
        self.directory, self.log = directory, log
        self.labels_N = torch.from_numpy(sources.train.labels)
        self.bad_images = BadImages(recipe.data.max_bad_fraction, world)
        self.probe = LinearProbe(
            subject.width(world.device),
            len(sources.train.classes),
            peak_lr=recipe.optimizer.base_lr * recipe.train.global_batch_size / 256,
            epochs=recipe.train.epochs,
            steps_per_epoch=steps_per_epoch(len(sources.train), recipe.train.global_batch_size, keep_partial=True),
            seed=recipe.run.seed,
            device=world.device,
            group=world.group,
        )
        self.augment = Augment(
            brightness=0,
            contrast=0,
            saturation=0,
            hue=0,
            jitter_probability=0,
            grayscale_probability=0,
            blur_sigma=(0, 0),
            blur_probability=(0, 0),
            solarize_probability=(0, 0),
            flip_probability=recipe.augment.flip_probability,
            mean=subject.mean,
            std=subject.std,
            seed=recipe.run.seed,
        )

    @property
    def step(self) -> int:
        return self.probe.step

    @property
    def images_per_step(self) -> int:
        return self.recipe.train.global_batch_size

    def plan(self) -> Plan:
        recipe, total = self.recipe, self.probe.epochs * self.probe.steps_per_epoch
        return Plan(
            last_step=min(total, recipe.train.max_steps or total),
            log_every=recipe.log.every_steps,
            checkpoint_every=recipe.checkpoint.every_steps,
            keep=recipe.checkpoint.keep,
            evaluate_every=self.probe.steps_per_epoch,
        )

    def resume(self, saved: dict[str, Any]) -> None:
        self.probe.step = saved["step"]
        self.bad_images.total = saved["bad_images"]

    def batches(self, last_step: int) -> Iterator[Batch]:
        return train_batches(
            self.sources.train,
            seed=self.recipe.run.seed,
            global_batch_size=self.recipe.train.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            first_step=self.step,
            last_step=last_step,
            workers=self.recipe.data.workers,
            image_size=self.subject.image_size,
            crop_min=self.recipe.augment.crop_min,
            pin_memory=self.world.device.type == "cuda",
            views=1,
            keep_partial=True,
        )

    def train_step(self, batch: Batch) -> tuple[Tensor, float]:
        """The loss before the update, on the device, and the learning rate."""
        self.bad_images.meet(batch.bad)
        lr = self.probe.learning_rate
        label_B = self.labels_N[batch.shown_B].to(self.world.device, non_blocking=True)
        first = batch.step % self.probe.steps_per_epoch * self.images_per_step
        rows = min(self.images_per_step, len(self.sources.train) - first)  # of all ranks; fewer in the last batch
        return linear_step(self.probe, self.encode(self.crops(batch)), label_B, rows), lr

    def crops(self, batch: Batch) -> Tensor:
        """Normalised [B, 3, S, S] on the device."""
        crops, sample_B = (t.to(self.world.device, non_blocking=True) for t in (batch.crops, batch.sample_B))
        return self.augment(crops, sample_B, batch.epoch)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if not len(images):  # a rank may get nothing of a partial batch
            return images.new_zeros(0, self.probe.weight_CD.shape[1])
        return self.subject.network(images).float()

    def describe(self, output: tuple[Tensor, float]) -> dict[str, float]:
        loss, lr = output[0].item(), output[1]
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss at step {self.step} is not finite; the newest checkpoint is kept: start anew with a lower "
                "optimizer.base_lr in another --out"
            )
        epochs = -(-self.step // self.probe.steps_per_epoch)  # begun
        bad_images = self.bad_images.check(epochs * len(self.sources.train))
        return {"epoch": self.step / self.probe.steps_per_epoch, "loss": loss, "lr": lr, "bad_images": bad_images}

    def evaluate(self) -> dict[str, float] | None:
        """Of the validation images; before the first step there is nothing to know."""
        if self.step == 0:
            return None
        prediction_QT, label_Q = self.predict()
        right_QT = prediction_QT == label_Q[:, None]
        row = {
            "epoch": self.step / self.probe.steps_per_epoch,
            "linear_top1": right_QT[:, 0].double().mean().item(),
            "linear_top5": right_QT.any(1).double().mean().item(),
        }
        if self.world.is_first and best([*monitor_rows(self.directory), row]) is row:
            self.show_classes(prediction_QT[:, 0], label_Q)
        return row

    @cached_property
    def val_features(self) -> tuple[Tensor, Tensor]:
        """This rank's features and labels of the validation images: once, for the trunk is frozen."""
        feature_ND, _, label_N = features(self.subject, self.sources.val, None, self.world, self.recipe.data.workers)
        return feature_ND, label_N

    def predict(self) -> tuple[Tensor, Tensor]:
        """The likeliest classes [Q, min(5, C)] and the labels [Q] of all ranks' validation images, on the CPU."""
        feature_ND, label_N = self.val_features
        top = [self.probe.predict(rows.to(self.world.device)).cpu() for rows in feature_ND.split(ROWS)]
        parts = gather((torch.cat(top), label_N), self.world.host_group)
        prediction, label = zip(*parts, strict=True)
        return torch.cat(prediction), torch.cat(label)

    def show_classes(self, prediction_Q: Tensor, label_Q: Tensor) -> None:
        """classes.csv and confusion.png of the best epoch so far."""
        classes = self.sources.train.classes
        picture = confusion_picture(prediction_Q, label_Q, classes)
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        replace_file(self.directory / "confusion.png", encoded.getvalue())
        replace_file(self.directory / "classes.csv", by_class(prediction_Q, label_Q, classes).encode())
        self.log.images("confusion", pil_to_tensor(picture), self.step)

    def picture(self, batch: Batch) -> Tensor:
        """uint8 [3, H, W]: what the network sees, one column per image."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.subject.mean, self.subject.std))
        pixels = ((self.crops(batch)[:PICTURED].cpu() * std + mean) * 255).clamp(0, 255).byte()
        return pixels.permute(1, 2, 0, 3).flatten(2)

    def checkpoint(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "recipe": dump(self.recipe),
            "train": self.sources.train.fingerprint,
            "val": self.sources.val.fingerprint,
            "network": self.frozen,
            "bad_images": self.bad_images.count(),
        }
        return {"tensors": self.probe.tensors(), "state": state, "recipe_sha256": fingerprint(self.recipe)}


# ---- words -----------------------------------------------------------------------------------------------------------


def opening(task: Probing, checkpoint: str) -> None:
    """What is derived from the recipe, the data and the launch."""
    if not task.world.is_first:
        return
    probe, train = task.probe, task.sources.train
    print(f"network   {checkpoint}, frozen: {probe.weight_CD.shape[1]} features, images of {task.subject.image_size}")
    print(
        f"data      {len(train):,} training images of {len(train.classes)} classes, {len(task.sources.val):,} for val"
    )
    print(f"schedule  {probe.epochs} epochs of {probe.steps_per_epoch:,} steps, lr from {probe.peak_lr:g}", flush=True)


def closing(task: Probing, seconds: Mapping[str, float]) -> dict[str, float]:
    """Result and files; the best epoch's row, from rank 0, on every rank."""
    row: dict[str, float] = {}
    with agreement(task.world.host_group):
        if task.world.is_first:
            rows = monitor_rows(task.directory)
            if not rows:
                raise UserError(f"{task.directory / 'metrics.jsonl'} must have the rows of the run; start it anew")
            row = best(rows)
            epoch, top1, top5 = (row[key] for key in ("epoch", "linear_top1", "linear_top5"))
            print(f"result    top-1 {top1:.2%}, top-5 {top5:.2%} at epoch {epoch:g}, the best")
            print(f"time      {', '.join(f'{what} {spent:.0f} s' for what, spent in seconds.items())}")
            print(f"files     {task.directory}: classes.csv, confusion.png, metrics.jsonl, tensorboard/", flush=True)
    row = share(row, task.world.host_group)
    return {"top1": row["linear_top1"], "top5": row["linear_top5"], "learning_rate": task.probe.peak_lr}


def monitor_rows(directory: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of validation images, oldest first."""
    with (directory / "metrics.jsonl").open() as file:
        return [row for row in map(json.loads, file) if "linear_top1" in row]


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    """The first of those with the highest top-1. An early end inside an epoch counts where no epoch was finished."""
    finished = [row for row in rows if row["epoch"] % 1 == 0]
    return max(finished or rows, key=lambda row: row["linear_top1"])


def replace_file(path: Path, content: bytes) -> None:
    """A reader finds the old file or the new one."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
