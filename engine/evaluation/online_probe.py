"""A linear classifier that learns beside pre-training, from the features that its steps compute anyway.

It reads features that are detached and gives nothing back, so runs with it and without it are the same in all else.
They are features of augmented views, and each is seen once: its accuracy rises with that of engine.evaluate's linear
classifier, and stays below it.

Shapes: B images of this rank, Q queries, D features.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation.knn import accuracy
from engine.evaluation.linear import LinearClassifier, linear_step
from engine.training.schedule import Schedule
from models.norm import GlobalBatchNorm, set_batch_norm_group

PREFIX = "probe."  # how its tensors begin in a checkpoint
ROWS = 8192  # queries that are classified at a time
# The classifier's inputs have mean 0 and, over all D, a variance of at most 1. So the curvature of its loss is at most
# 1/2, and SGD with momentum 0.9 is stable below a rate of 2 * 1.9 / (1/2) = 7.6, for any trunk, width and batch.
PEAK_LR = 5.0


class OnlineProbe:
    """The classifier, the normalisation before it, and their step.

    Features are normalised without parameters, as their scale and mean change while the trunk learns: rows to one
    length, then BatchNorm over the global crop batch. (Most of a row's length may be common to all images, and a
    classifier of bare rows then learns slowly.) The learning rate follows half a cosine over the run's epochs, as the
    trunk's does, stepped once in each.

    Args:
        width: D.
        labels_N: of all training images, from 0 to classes - 1.
        dtype: in which it computes; features are converted.
        group: the ranks of the global batch.
    """

    def __init__(
        self,
        width: int,
        labels_N: np.ndarray,
        classes: int,
        schedule: Schedule,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ):
        self.labels_N, self.device = labels_N, device
        self.norm = GlobalBatchNorm(width, affine=False, views=2).to(device, dtype)
        set_batch_norm_group(self.norm, group)
        self.classifier = LinearClassifier(
            width,
            classes,
            peak_lr=PEAK_LR,
            epochs=schedule.epochs,
            steps_per_epoch=schedule.steps_per_epoch,
            seed=seed,
            device=device,
            dtype=dtype,
            group=group,
            kept=list(self.norm.buffers()),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""
        norm = {f"norm.{name}": buffer for name, buffer in self.norm.named_buffers()}
        return {PREFIX + name: tensor for name, tensor in (self.classifier.tensors() | norm).items()}

    def resume(self, step: int) -> None:
        """Go on after `step` steps of the run, with tensors that were loaded or with fresh ones."""
        self.classifier.update.step = step

    def learn(self, features: Tensor, shown_B: Tensor) -> None:
        """One update on this rank's features [2*B, D], of both views of the images shown_B (on the CPU).

        Does not wait for the device. Features that are not finite, on any rank, change nothing.
        """
        label_B = torch.from_numpy(self.labels_N[shown_B.numpy()]).to(self.device, non_blocking=True)
        batch = len(features) * self.norm.ranks
        self.classifier.update.begin()
        inputs = self._normalised(features, training=True)
        self.loss = linear_step(self.classifier, inputs, label_B.repeat(self.norm.views), batch)

    def describe(self) -> dict[str, Tensor]:
        """`probe_loss`: the cross entropy of the last step's global batch before its update, on the device, equal on
        all ranks."""
        return {"probe_loss": self.loss}

    def accuracy(self, query_QD: Tensor, label_Q: Tensor) -> dict[str, float]:
        """The share of queries that are classified rightly. Raises ValueError as `knn.accuracy`."""
        top = [self.classifier.predict(self._normalised(rows, training=False)) for rows in query_QD.split(ROWS)]
        found = accuracy(torch.cat(top), label_Q)
        return {"probe_top1": found["top1"], "probe_top5": found["top5"]}

    @torch.no_grad()
    def _normalised(self, features: Tensor, *, training: bool) -> Tensor:
        scale = features.shape[1] ** 0.5
        rows = F.normalize(features.to(self.classifier.weight_CD.dtype), dim=1) * scale
        return self.norm.train(training)(rows) / scale
