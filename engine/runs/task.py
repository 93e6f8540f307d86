"""What a run trains: the common half of every recipe's task, and the questions on which tasks differ.

Shapes: V views, B images of this rank, S side of an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.checkpoint.load import load
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.state import RunState
from engine.data.augment import denormalise
from engine.data.bad_images import BadImages
from engine.data.contents import sample
from engine.data.decode import Crops
from engine.data.jpeg import PILLOW, with_version, without_version
from engine.data.loader import Batch, train_batches
from engine.data.order import Order
from engine.data.rules import RULES
from engine.data.source import Source
from engine.data.splits import Splits
from engine.data.workers import Workers
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.world import World
from engine.errors import RunFailed, UserError
from engine.evaluation.features import AtBatch
from engine.recipe.load import dump
from engine.recipe.paths import named
from engine.recipe.sections import Parallel, Recipe
from engine.runs.auto import taken
from engine.runs.log import Row
from engine.runs.on_host import on_host
from engine.runs.plan import Plan
from engine.runs.upload import uploaded
from engine.training.activation_checkpoint import stronger
from engine.training.update import Update

PICTURED = 8  # images of which TensorBoard shows what the networks see
SKIPS_IN_A_ROW = 10  # steps without update after which a run has failed


class Task(ABC):
    """A recipe's task on its images. Every method is called on all ranks together, unless it says otherwise.

    The constructor does what can be refused cheaply; `start` makes weights, once the run directory has been found to
    suit.

    Args:
        crops: what is cut out of an image.
        augment: turns crops, samples and epoch into images (engine.data.augment).
        mean, std: of the images that the networks take, per channel.
        keep_partial: the last, partial batch of an epoch is used.
        repeats: how often an image comes in a row.
    """

    monitor: ClassVar[str]  # the key by which a row of the monitor is known
    # How tensors begin that a checkpoint may have where the run has not, or the other way round.
    optional: ClassVar[tuple[str, ...]] = ()
    most_rankme = 0  # that `rankme` of a row can be; of tasks whose rows have it
    recipe_file = Path()  # a relative path of its data that is not in the working directory lies beside this

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        splits: Splits,
        crops: Crops,
        augment: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        keep_partial: bool = False,
        repeats: int = 1,
    ):
        self.written: Recipe = recipe  # with what it leaves to the machine (engine.runs.auto), which `recipe` has not
        self.recipe, self.world, self.splits, self.crops, self.augment = recipe, world, splits, crops, augment
        self.mean, self.std = mean, std
        batch = recipe.train.global_batch_size
        self.order = Order(recipe.run.seed, len(splits.train), batch, keep_partial, repeats)
        self.workers = Workers(())  # until `reading`
        self.bad_images = BadImages(recipe.data.max_bad_fraction, world)
        self.at_batch: AtBatch | None = None  # of an evaluation; it may raise on all ranks together
        self.licence: str | None = None  # of imported weights, which binds what is made of them
        self.continued_from: str | None = None  # the checkpoint of another run that this one began with
        self.parallel: Parallel | None = getattr(recipe, "parallel", None)
        self.contents: dict[str, dict[str, str]] = {}  # checksums of some images of each split (`look_at_images`)
        self.changes: dict[str, str] = {}  # of images since the run began, by split, in words (engine.runs.changes)
        self.accepted: dict[str, str] = {}  # those with which it ever went on
        self.began_with: tuple[dict, dict] = ({}, {})  # fingerprint and checksums of such splits (`RunState`)
        self.refused: str | None = None  # an operation of the step that has no deterministic form here

    # ---- on which tasks differ

    @abstractmethod
    def start(self, *, resumes: bool) -> None:
        """Make the weights with which the run begins, and what trains them; where it `resumes`, room for them, which
        `resume` fills."""

    @property
    @abstractmethod
    def update(self) -> Update:
        """What moves the weights, and counts the steps."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading fills them in place."""

    @abstractmethod
    def train_step(self, batch: Batch) -> Any:
        """One update; returns what `metrics` reads. Does not wait for the device."""

    @abstractmethod
    def metrics(self, output: Any) -> dict[str, Tensor | float]:
        """Of a step, `loss` and `lr` among them. Does not wait for the device. Rank 0 may have more than others."""

    @abstractmethod
    def evaluate(self) -> Row | None:
        """The monitor's row; None where there is nothing to evaluate with."""

    @property
    @abstractmethod
    def evaluate_every(self) -> int:
        """Steps between evaluations; 0: none."""

    @abstractmethod
    def opening(self) -> list[str]:
        """Lines: what is derived from the recipe, the data and the launch."""

    def memory(self) -> list[str]:
        """A line of a run that begins on GPUs: what a step takes of each. Of tasks that can count it."""
        return []

    @abstractmethod
    def result(self, monitor_rows: list[Row], last: Row | None) -> str:
        """The monitor's rows and the last of the others in words. Called on rank 0."""

    @property
    def less_memory(self) -> str:
        """With what the run takes less memory and stays the same, in words."""
        mode = self.stronger_checkpoint
        return f"parallel.activation_checkpoint={mode} or more processes" if mode else "more processes"

    @property
    def stronger_checkpoint(self) -> str | None:
        """The activation checkpoint that saves more memory than the recipe's; None where there is none."""
        if self.parallel is None:
            return None
        with torch.device("meta"):
            trunk = self.fresh_trunk()
        return stronger(self.parallel.activation_checkpoint, trunk)

    def images_bound(self) -> dict[str, tuple[Source, str]]:
        """The images that a resume must find as they were: {split: (source, what the user calls them)}."""
        return {"train": (self.splits.train, f"data.root ({named(self.recipe.data.root)})")}

    def reported(self, monitor_rows: list[Row]) -> Row:
        """The monitor's row that counts. Called on rank 0."""
        return monitor_rows[-1]

    def shown(self) -> Mapping[str, bytes]:
        """Files for the run directory that show the newest evaluation, where that is the one that counts. On rank 0."""
        return {}

    def fresh_trunk(self) -> nn.Module:
        """Another one like that which is trained, on the device of torch's context; of tasks with `parallel`."""
        raise NotImplementedError

    def finish(self, directory: Path) -> list[str]:
        """After the last step: what is still to be checked and left behind, and lines about it."""
        return []

    def sources(self) -> list[Source]:
        """All that the run reads images of."""
        return [source for source in self.splits if source is not None]

    # ---- what they share

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.update.step

    @property
    def timeout(self) -> float:
        """Seconds for which ranks and loading processes may be silent once steps run."""
        return 60 * self.recipe.run.timeout_minutes

    @property
    def epochs_in_words(self) -> str:
        return f"{self.recipe.train.epochs} epochs of {self.order.steps_per_epoch:,} steps"

    @property
    def total_steps(self) -> int:
        """Of all epochs, whatever ends the run earlier."""
        return self.recipe.train.epochs * self.order.steps_per_epoch

    @property
    def epoch(self) -> float:
        return self.step / self.order.steps_per_epoch

    def plan(self) -> Plan:
        recipe = self.recipe
        return Plan(
            last_step=min(self.total_steps, recipe.train.max_steps or self.total_steps),
            log_every=recipe.log.every_steps,
            checkpoint_every=recipe.checkpoint.every_steps,
            keep=recipe.checkpoint.keep,
            evaluate_every=self.evaluate_every,
            max_failures=recipe.checkpoint.max_failures,
            archive_every=(recipe.checkpoint.keep_every_epochs or 0) * self.order.steps_per_epoch,
        )

    def reading(self) -> Workers:
        """Start the loading processes; a context manager, which ends them."""
        count = self.recipe.data.workers
        assert count != "auto"
        self.workers = Workers(self.sources(), count, timeout=self.timeout, device=self.world.device)
        return self.workers

    def batches(self, last_step: int) -> Iterator[Batch]:
        """This rank's batches from the present step up to, not including, `last_step`."""
        steps, rank, ranks = range(self.step, last_step), self.world.rank, self.world.size
        return train_batches(
            self.splits.train, self.order, self.crops, steps, rank=rank, world_size=ranks, workers=self.workers
        )

    def images(self, batch: Batch) -> Tensor:
        """What the networks see of a batch: normalised [V*B, 3, S, S] on the device."""
        return self.augmented(*self.on_device(batch), batch.epoch)

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Crops and samples of a batch."""
        device = self.world.device
        return uploaded(batch.crops, device), batch.sample_B.to(device, non_blocking=True)

    def augmented(self, crops: Tensor, sample_B: Tensor, epoch: int) -> Tensor:
        # Compiled code is made for one layout, and a part of a batch may have another.
        return self.augment(crops.contiguous(), sample_B, torch.full((), epoch, device=self.world.device))

    def describe(self, output: Any, within: timedelta) -> Row:
        """The loss row of a step, of which other ranks than 0 may lack something. A Future stands for what takes long.

        Waits for the device. May raise RunFailed, and RuntimeError where the step takes longer than `within`.
        """
        counts = {"skipped": self.update.skipped, "in a row": self.update.skipped_in_a_row}
        row: Row = on_host(self.metrics(output) | counts, within)
        self.check_skips(row.pop("skipped"), row.pop("in a row"), self.step)
        return {"epoch": self.epoch} | row | {"bad_images": self.bad_images.count()}

    def too_many_bad(self, total: int, step: int) -> str | None:
        """Why the run cannot go on with `total` unreadable images up to a step, in words; None where it can."""
        begun = -(-step // self.order.steps_per_epoch)  # epochs
        return self.bad_images.excess(total, begun * len(self.splits.train))

    def check_skips(self, skipped: int, in_a_row: int, step: int) -> None:
        """Raises RunFailed where more steps up to `step` had bad gradients than the task bears: in all, or in a row."""
        if in_a_row >= SKIPS_IN_A_ROW:
            bf16 = self.parallel is not None and self.parallel.precision == "bf16"
            wider = "go on with parallel.precision=float32, or " if bf16 else ""
            raise RunFailed(
                f"the last {in_a_row} steps up to {step} had gradients that are not finite and changed nothing; no "
                f"weights were harmed: {wider}start anew with a lower optimizer.base_lr or a longer "
                "train.warmup_epochs in another run.dir"
            )

    def check_skips_now(self) -> None:
        """`check_skips` of the steps so far, for which it waits."""
        self.check_skips(int(self.update.skipped), int(self.update.skipped_in_a_row), self.step)

    def picture(self, batch: Batch) -> Tensor:
        """uint8 [3, H, W]: what the networks see, one column per image, view 1 above view 2."""
        # As many as in a step: another shape would be compiled again.
        views = self.images(batch).float().cpu().unflatten(0, (self.crops.views, -1))[:, :PICTURED]
        pixels = (denormalise(views, self.mean, self.std) * 255).byte()  # [V, N, 3, S, S]
        return pixels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    # ---- checkpoints

    def look_at_images(self) -> None:
        """Read some of the images that a resume must find as they were; rank 0 does."""
        with agreement(self.world.host_group):
            if self.world.is_first:
                self.contents = {split: sample(source) for split, (source, _) in self.images_bound().items()}
        self.contents = broadcast(self.contents, self.world.host_group)

    def made_by(self) -> dict[str, str]:
        """What computes here, and how far the same bits come of it again."""
        made_by = self.world.made_by() | taken(self.written, self.recipe)
        if self.parallel is None:
            return made_by
        found = f"in part: not {self.refused}" if self.refused else str(self.parallel.deterministic).lower()
        return made_by | {"deterministic": found}

    def state(self) -> RunState:
        return RunState(
            step=self.step,
            recipe=dump(self.written),
            images={split: source.fingerprint for split, (source, _) in self.images_bound().items()}
            | self.began_with[0],
            contents=self.contents | self.began_with[1],
            accepted=self.accepted,
            left_out={
                split: {str(i): words for i, words in source.left_out.items()}
                for split, (source, _) in self.images_bound().items()
                if source.left_out
            },
            bad_images=self.bad_images.count(),
            licence=self.licence,
            continued_from=self.continued_from,
            made_by=self.made_by(),
            image_rules=RULES,
            order=self.order.law,
            decoder=with_version(self.crops.decoder),
        )

    def check_resume(self, state: RunState) -> None:
        """Raises UserError where the run met more unreadable images than it bears; on this rank alone."""
        if (excess := self.too_many_bad(state.bad_images, state.step)) is not None:
            raise UserError(excess)

    def resume(self, checkpoint: Path, manifest: Manifest, state: RunState) -> None:
        """Go on from a checkpoint that suits; what it may lack, and does, stays fresh."""
        lacks = tuple(p for p in self.optional if not any(name.startswith(p) for name in manifest.tensors))
        tensors = {name: tensor for name, tensor in self.tensors().items() if not name.startswith(lacks)}
        load(checkpoint, tensors, ignore=self.optional, group=self.world.host_group)
        self.update.step, self.order = state.step, replace(self.order, law=state.order)
        self.crops = replace(self.crops, pillow=without_version(state.decoder) == PILLOW)
        self.bad_images.total, self.licence = state.bad_images, state.licence
        self.continued_from, self.accepted = state.continued_from, state.accepted

    def find_source(self) -> tuple[Path, Manifest, RunState] | None:
        """The checkpoint of another run that a new one begins with; None where it begins by itself."""
        return None

    def begin_with(self, checkpoint: Path, manifest: Manifest, state: RunState) -> None:
        """Take what `find_source` found, at step 0."""
        raise NotImplementedError
