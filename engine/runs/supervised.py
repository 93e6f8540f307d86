"""What training with labels needs, whichever part of the network learns.

Shapes: B images of this rank, Q validation images of all ranks, S side of an image, C classes.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.checkpoint.state import RunState
from engine.data.augment import Flip
from engine.data.decode import Crops
from engine.data.loader import Batch
from engine.data.source import Source
from engine.data.splits import Splits
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.errors import UserError
from engine.evaluation.features import features
from engine.evaluation.knn import accuracy
from engine.evaluation.subject import Subject
from engine.logger import say
from engine.pictures.confusion import by_class, confusion_picture
from engine.recipe.paths import named
from engine.recipe.sections import Finetune, Linear
from engine.runs.log import Row
from engine.runs.task import Task


class Supervised(Task):
    """The common half of a task with labels.

    Args:
        subject: the images' form, and the network that is trained or whose features are.
        weights_digest: of the weights that the run starts from (`digest`).
    """

    chosen: ClassVar[str]  # which row of the monitor is the result, in words

    def __init__(
        self,
        recipe: Linear | Finetune,
        world: World,
        splits: Splits,
        subject: Subject,
        weights_digest: str,
        crops: Crops,
        **order: Any,
    ):
        flip = Flip(recipe.augment.flip_probability, subject.mean, subject.std, recipe.run.seed, subject.dtype)
        super().__init__(recipe, world, splits, crops, flip, mean=subject.mean, std=subject.std, **order)
        self.subject, self.weights_digest = subject, weights_digest
        self.labels_N, self.classes = splits.train.labels, splits.train.classes

    @abstractmethod
    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        """Of all ranks' validation images, on the CPU: the likeliest classes [Q, min(5, C)] and the labels [Q].

        A network's classes stand under the name with which its keys in the monitor begin, the task's first.
        """

    def labels(self, batch: Batch) -> Tensor:
        """Of the images that the batch shows, on the device."""
        return torch.from_numpy(self.labels_N[batch.shown_B.numpy()]).to(self.world.device, non_blocking=True)

    # ---- evaluation

    def evaluate(self) -> Row | None:
        """Top-1 and top-5 on the validation images; None before the first step."""
        if self.step == 0:
            return None
        predictions, label_Q = self.predict()
        row = {}
        for name, prediction_QT in predictions.items():
            row |= {f"{name}_{top}": share for top, share in accuracy(prediction_QT, label_Q).items()}
        self.newest = predictions[self.recipe.task][:, 0], label_Q
        return row

    def val_outputs(self, subject: Subject, remedy: str) -> tuple[Tensor, Tensor]:
        """This rank's outputs of the subject's network, and labels, of the validation images."""
        more = {"at_batch": self.at_batch}
        output_ND, _, label_N = features(subject, self.splits.val, None, self.world, self.workers, remedy, **more)
        return output_ND, label_N

    def gathered(self, predictions: dict[str, Tensor], label_N: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Every rank's rows, given this rank's."""
        parts, labels = zip(*all_gather((predictions, label_N), self.world.host_group), strict=True)
        return {name: torch.cat([part[name] for part in parts]) for name in predictions}, torch.cat(labels)

    def shown(self) -> Mapping[str, bytes]:
        """classes.csv and confusion.png."""
        files = {"classes.csv": by_class(*self.newest, self.classes).encode()}
        try:
            files["confusion.png"] = confusion_picture(*self.newest, self.classes)
        except UserError as error:  # matplotlib is an extra
            say(f"confusion.png is left out: {error}")
        return files

    # ---- words

    def data_line(self) -> str:
        train, val = self.splits.train, self.splits.val
        images = f"{len(train):,} training images of {len(self.classes)} classes in {train.found_in}"
        return f"data      {images}, {len(val):,} for val"

    def result(self, monitor_rows: list[Row], last: Row | None) -> str:
        if not monitor_rows:
            raise UserError(f"metrics.jsonl of {self.recipe.run.dir} must have the rows of the run; start it again")
        row = self.reported(monitor_rows)
        top1, top5 = (row[f"{self.recipe.task}_{top}"] for top in ("top1", "top5"))
        return f"top-1 {top1:.2%}, top-5 {top5:.2%} at epoch {row['epoch']:g}, {self.chosen}"

    # ---- checkpoints

    def images_bound(self) -> dict[str, tuple[Source, str]]:
        data = self.recipe.data
        key, root = ("data.root", data.root) if data.val_root is None else ("data.val_root", data.val_root)
        return super().images_bound() | {"val": (self.splits.val, f"{key} ({named(root)})")}

    def state(self) -> RunState:
        return replace(super().state(), network=self.weights_digest, classes=list(self.classes))

    def check_resume(self, state: RunState) -> None:
        super().check_resume(state)
        if state.network != self.weights_digest:
            raise UserError(
                f"run.dir ({self.recipe.run.dir}) holds a run on another network; give it its own CHECKPOINT, or pass "
                "another run.dir"
            )
