"""The paper's linear protocol, put together: recipe -> images, frozen network, classifier -> a run."""

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.state import RunState
from engine.data.decode import Crops, Reading
from engine.data.loader import Batch
from engine.data.splits import Splits, open_labelled_splits
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.errors import RunFailed
from engine.evaluation.linear import LinearClassifier, linear_step
from engine.evaluation.subject import Subject, open_subject_together
from engine.recipe.sections import Linear
from engine.runs.auto import settled
from engine.runs.changes import begun, readable
from engine.runs.log import Row
from engine.runs.run import run
from engine.runs.supervised import Supervised
from engine.training.update import Update
from engine.weights.weights import EncoderName, digest

ROWS = 8192  # features that are classified at a time


def linear(
    recipe: Linear, checkpoint: str, encoder: EncoderName, world: World, heads: int | None = None
) -> dict[str, float]:
    """Train a classifier on a CHECKPOINT's frozen trunk to the recipe's end; a run that is found goes on.

    All ranks call it together. Returns {"top1", "top5", "learning_rate"}: the best epoch's, and the first epoch's rate.

    Raises:
        UserError, RunFailed, Interrupted: engine.door turns them into words and exit codes.
    """
    started, written = time.perf_counter(), recipe
    recipe = settled(written, world)
    splits = open_labelled_splits(recipe.data, world, seed=recipe.run.seed, begun=begun(recipe, world))
    splits = readable(splits, recipe, world)
    subject = open_subject_together(checkpoint, world, encoder=encoder, heads=heads, **preparation(recipe))
    frozen = {"checkpoint": _lasting(checkpoint), "encoder": encoder} | ({"heads": str(heads)} if heads else {})
    task = LinearClassification(recipe, world, splits, subject, frozen)
    task.written = written
    row = run(task, started)
    return {"top1": row["linear_top1"], "top5": row["linear_top5"], "learning_rate": task.classifier.peak_lr}


def preparation(recipe: Linear) -> dict[str, Any]:
    """How images are made ready for the network, in the keywords of `open_subject`."""
    reading = Reading.of(recipe.data)
    return {"crop_fraction": recipe.evaluate.crop_fraction, "interpolation": "bilinear", "reading": reading}


def _lasting(checkpoint: str) -> str:
    """The same for a process in another folder."""
    path = Path(checkpoint)
    return str(path.resolve()) if path.exists() else checkpoint


class LinearClassification(Supervised):
    """A linear classifier on the features of a frozen trunk; `frozen`: which (RunState)."""

    monitor = "linear_top1"
    chosen = "the best"

    def __init__(self, recipe: Linear, world: World, splits: Splits, subject: Subject, frozen: dict[str, str]):
        crops = Crops(subject.image_size, recipe.augment.crop_min, views=1, reading=subject.reading)
        weights = digest(own_tensors(subject.network))
        super().__init__(recipe, world, splits, subject, weights, crops, keep_partial=True)
        self.frozen = frozen
        self.classifier = LinearClassifier(
            subject.width(world.device),
            len(self.classes),
            peak_lr=recipe.peak_lr,
            epochs=recipe.train.epochs,
            steps_per_epoch=self.order.steps_per_epoch,
            seed=recipe.run.seed,
            device=world.device,
            group=world.group,
        )

    def start(self, *, resumes: bool) -> None:
        """All is small enough to be there from the start."""

    @property
    def update(self) -> Update:
        return self.classifier.update

    def tensors(self) -> dict[str, Tensor]:
        return self.classifier.tensors()

    def train_step(self, batch: Batch) -> tuple[Tensor, float]:
        """The loss before the update, on the device, and the learning rate."""
        label_B, lr = self.labels(batch), self.classifier.learning_rate
        first = batch.step % self.order.steps_per_epoch * self.order.batch
        rows = min(self.order.batch, len(self.splits.train) - first)  # of all ranks; fewer in the last batch
        self.update.begin()
        return linear_step(self.classifier, self.encode(self.images(batch)), label_B, rows), lr

    def metrics(self, output: tuple[Tensor, float]) -> dict[str, Tensor | float]:
        return {"loss": output[0], "lr": output[1]}

    def evaluate(self) -> Row | None:
        self.check_skips_now()
        return super().evaluate()

    def state(self) -> RunState:
        self.check_skips_now()
        return replace(super().state(), frozen=self.frozen)

    def check_skips(self, skipped: int, in_a_row: int, step: int) -> None:
        """Raises RunFailed where a step was skipped: the protocol knows no such step."""
        if skipped:
            raise RunFailed(
                f"the loss of a step up to {step} is not finite; the newest checkpoint is kept: start anew with a "
                "lower optimizer.base_lr in another run.dir"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if not len(images):  # a rank may get nothing of a partial batch
            return images.new_zeros(0, self.classifier.weight_CD.shape[1])
        return self.subject.network(images).float()

    @property
    def evaluate_every(self) -> int:
        return self.order.steps_per_epoch

    @cached_property
    def val_features(self) -> tuple[Tensor, Tensor]:
        """Once, for the trunk is frozen."""
        return self.val_outputs(self.subject, "give an earlier CHECKPOINT")

    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        feature_ND, label_N = self.val_features
        top = [self.classifier.predict(rows.to(self.world.device)).cpu() for rows in feature_ND.split(ROWS)]
        return self.gathered({self.recipe.task: torch.cat(top)}, label_N)

    def reported(self, monitor_rows: list[Row]) -> Row:
        """The first row with the highest top-1 among finished epochs; where none was finished, among all rows."""
        finished = [row for row in monitor_rows if row["epoch"] % 1 == 0]
        return max(finished or monitor_rows, key=lambda row: row["linear_top1"])

    def finish(self, directory: Path) -> list[str]:
        """Raises RunFailed, on every rank, where the trunk is not what it was."""
        if any(all_gather(digest(own_tensors(self.subject.network)) != self.weights_digest, self.world.host_group)):
            raise RunFailed("the frozen trunk's weights or buffers changed, so the result is not reported")
        return []

    def opening(self) -> list[str]:
        classifier, size = self.classifier, self.subject.image_size
        network = f"{self.frozen['encoder']} encoder of {self.frozen['checkpoint']}"
        return [
            f"network   {network}, frozen: {classifier.weight_CD.shape[1]} features, images of {size}",
            self.data_line(),
            f"schedule  {self.epochs_in_words}, lr from {classifier.peak_lr:g}",
        ]


def own_tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return sorted([*network.named_parameters(), *network.named_buffers()])
