"""The paper's linear protocol, put together: recipe -> images, frozen network, classifier -> the trainer's loop."""

import math
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.loader import Batch
from engine.data.splits import Splits, open_labelled_splits
from engine.distributed.agreement import gather
from engine.distributed.world import World
from engine.errors import RunFailed
from engine.evaluation.linear import LinearProbe, linear_step
from engine.evaluation.subject import Subject, open_subject_together
from engine.recipe.sections import Linear
from engine.runs.supervised import Supervised, closing, digest, run
from engine.weights.weights import EncoderName

ROWS = 8192  # features that are classified at a time


def probe(recipe: Linear, checkpoint: str, encoder: EncoderName, world: World) -> dict[str, float]:
    """Train a classifier on a CHECKPOINT's frozen trunk to the recipe's end; a run that is found goes on.

    All ranks call it together. Returns {"top1", "top5", "learning_rate"}: the best epoch's, and the first epoch's rate.

    Raises:
        UserError, RunFailed, Interrupted: engine.cli turns them into words and exit codes.
    """
    started = time.perf_counter()
    sources = open_labelled_splits(recipe.data, world, seed=recipe.run.seed)
    subject = open_subject_together(checkpoint, world, encoder=encoder, crop_fraction=recipe.evaluate.crop_fraction)
    task = Probing(recipe, world, sources, subject, checkpoint)
    seconds = run(task, started)
    check_frozen(subject.network, task.weights_digest, world)
    row = closing(task, seconds)
    return {"top1": row["linear_top1"], "top5": row["linear_top5"], "learning_rate": task.probe.peak_lr}


def own_tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return sorted([*network.named_parameters(), *network.named_buffers()])


def check_frozen(network: nn.Module, before: str, world: World) -> None:
    """Raises RunFailed, on every rank, where the network is not what it was."""
    if any(gather(digest(own_tensors(network)) != before, world.host_group)):
        raise RunFailed("the frozen trunk's weights or buffers changed, so the result is not reported")


class Probing(Supervised):
    """The trainer's task (engine.runs.trainer.Task): a linear classifier on a frozen trunk's features."""

    metric = "linear"
    chosen = "the best"
    keeps_partial = True

    def __init__(self, recipe: Linear, world: World, sources: Splits, subject: Subject, checkpoint: str):
        super().__init__(recipe, world, sources, subject, digest(own_tensors(subject.network)))
        self.name = checkpoint
        self.probe = LinearProbe(
            subject.width(world.device),
            len(self.classes),
            peak_lr=recipe.optimizer.base_lr * recipe.train.global_batch_size / 256,
            epochs=recipe.train.epochs,
            steps_per_epoch=self.steps_per_epoch,
            seed=recipe.run.seed,
            device=world.device,
            group=world.group,
        )

    @property
    def step(self) -> int:
        return self.probe.step

    def tensors(self) -> dict[str, Tensor]:
        return self.probe.tensors()

    def resume(self, saved: dict[str, Any]) -> None:
        super().resume(saved)
        self.probe.step = saved["step"]

    def train_step(self, batch: Batch) -> tuple[Tensor, float]:
        """The loss before the update, on the device, and the learning rate."""
        self.bad_images.meet(batch.bad)
        label_B, lr = self.labels(batch), self.probe.learning_rate
        first = batch.step % self.steps_per_epoch * self.images_per_step
        rows = min(self.images_per_step, len(self.sources.train) - first)  # of all ranks; fewer in the last batch
        return linear_step(self.probe, self.encode(self.images(batch)), label_B, rows), lr

    def describe(self, output: tuple[Tensor, float]) -> dict[str, float]:
        loss, lr = output[0].item(), output[1]
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss at step {self.step} is not finite; the newest checkpoint is kept: start anew with a lower "
                "optimizer.base_lr in another run.dir"
            )
        return self.row(loss, lr)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if not len(images):  # a rank may get nothing of a partial batch
            return images.new_zeros(0, self.probe.weight_CD.shape[1])
        return self.subject.network(images).float()

    @cached_property
    def val_features(self) -> tuple[Tensor, Tensor]:
        """Once, for the trunk is frozen."""
        return self.val_outputs(self.subject, "give an earlier CHECKPOINT")

    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        feature_ND, label_N = self.val_features
        top = [self.probe.predict(rows.to(self.world.device)).cpu() for rows in feature_ND.split(ROWS)]
        return self.gathered({self.metric: torch.cat(top)}, label_N)

    def reported(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The first of those with the highest top-1. An early end inside an epoch counts where none was finished."""
        finished = [row for row in rows if row["epoch"] % 1 == 0]
        return max(finished or rows, key=lambda row: row["linear_top1"])

    def opening(self) -> list[str]:
        probe, size = self.probe, self.subject.image_size
        return [
            f"network   {self.name}, frozen: {probe.weight_CD.shape[1]} features, images of {size}",
            self.data_line(),
            f"schedule  {probe.epochs} epochs of {probe.steps_per_epoch:,} steps, lr from {probe.peak_lr:g}",
        ]
