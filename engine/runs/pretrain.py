"""Pre-training, put together: recipe -> images, networks, state -> a run."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.load import load
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.state import RunState
from engine.data.augment import Augment
from engine.data.decode import Crops, Reading
from engine.data.loader import Batch
from engine.data.source import Source
from engine.data.splits import Splits, open_splits
from engine.distributed.agreement import agreement
from engine.distributed.world import World, make_mesh
from engine.errors import UserError
from engine.evaluation.online_probe import PREFIX
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.logger import say, warn
from engine.recipe.keys import wrong
from engine.recipe.load import largest_micro_batch
from engine.recipe.sections import Pretrain
from engine.runs.auto import settled
from engine.runs.changes import begun, readable
from engine.runs.continuing import find_source
from engine.runs.fits import memory_in_words
from engine.runs.log import Row
from engine.runs.monitor import has_monitor, make_probe, monitor_in_words, monitor_row, open_bank, open_watched
from engine.runs.run import run
from engine.runs.starting import Start, open_first, open_start
from engine.runs.task import Task
from engine.runs.words import few_steps, images_in_words, loss_in_words, own_images, result_in_words
from engine.training.activation_checkpoint import check_activation_checkpoint
from engine.training.health import health
from engine.training.memory import memory_of
from engine.training.micro_batch import MicroBatches
from engine.training.parallelize import (
    check_compiler,
    compiled,
    dtype_of,
    materialize,
    parallelize,
    saved,
    trunk_dtype_of,
)
from engine.training.schedule import MocoSchedule
from engine.training.step import StepOutput, TrainState, train_step
from engine.training.update import Update
from engine.weights.weights import declared
from models.moco import MoCo
from models.norm import has_batch_norm


def pretrain(recipe: Pretrain, recipe_file: Path, world: World, earlier: Path | None = None) -> None:
    """Run a recipe to its end, from its newest checkpoint where there is one, or from an `earlier` one of its own.

    All ranks call it together.

    Raises:
        UserError, RunFailed, Interrupted: engine.door turns them into words and exit codes.
    """
    started, written = time.perf_counter(), recipe
    recipe = settled(written, world)
    with agreement(world.host_group):
        moco = make_moco(recipe)
        check_compiler(recipe.parallel, world.device)
    begin = open_first(recipe, recipe_file, world)
    batch, former = recipe.train.global_batch_size, begun(recipe, world)
    splits = open_splits(recipe.data, recipe_file, world, batch=batch, begun=former)
    splits = readable(splits, recipe, world, batch=batch)
    watched = open_watched(recipe, recipe_file, world, splits)
    task = Pretraining(recipe, recipe_file, world, splits, watched, moco)
    task.written, task.begin = written, begin
    run(task, started, earlier)


def make_moco(recipe: Pretrain) -> MoCo:
    """The networks that the recipe declares, on the meta device: no memory, no weights.

    Raises:
        UserError: for what only the network itself knows.
    """
    model = recipe.model
    with torch.device("meta"):
        try:
            architecture = declared(model)
            architecture.check_step(bf16=recipe.parallel.precision == "bf16")
            build = partial(architecture.build, freeze_patch_projection=model.freeze_patch_projection)
            moco = MoCo(build, model.projector_hidden_dim, model.output_dim)
        except ValueError as error:
            raise UserError(str(error)) from error
    check_activation_checkpoint(moco.base.trunk, recipe.parallel.activation_checkpoint, model.name)
    size = recipe.train.micro_batch_size
    if size is not None and has_batch_norm(moco.base.trunk):
        do = "pass train.micro_batch_size=null, and start more processes where memory is short"
        raise wrong("train.micro_batch_size", size, f"null for {model.name}, whose BatchNorm spans the whole batch", do)
    return moco


def step_gib(recipe: Pretrain, gpus: int) -> float:
    """What a step takes of each of so many GPUs, counted. Raises UserError as `make_moco` does."""
    return memory_of(recipe, make_moco(recipe), gpus).gib


def make_augment(recipe: Pretrain) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What turns crops, samples and epoch into images, on the device (engine.data.augment): computed in full precision,
    and then in the type in which trunks compute, so that none of them has to cast all pixels."""
    exact, dtype = Augment(recipe.augment, recipe.run.seed, dtype_of(recipe.parallel)), trunk_dtype_of(recipe.parallel)

    def augment(crops: Tensor, sample_B: Tensor, epoch: Tensor) -> Tensor:
        return exact(crops, sample_B, epoch).to(dtype)

    return compiled(augment) if recipe.parallel.compile else augment


def make_schedule(recipe: Pretrain, steps_per_epoch: int) -> MocoSchedule:
    return MocoSchedule(
        peak_lr=recipe.peak_lr,
        epochs=recipe.train.epochs,
        warmup_epochs=recipe.train.warmup_epochs,
        steps_per_epoch=steps_per_epoch,
        momentum=recipe.moco.momentum,
    )


def build_state(
    recipe: Pretrain,
    moco: MoCo,
    world: World,
    schedule: MocoSchedule,
    *,
    resumes: bool = False,
    begin: Start | None = None,
) -> TrainState:
    """The networks of `make_moco` and the recipe's optimizer, sharded, with their initial weights, of which trunks may
    `begin` with others; where it `resumes`, what checkpoints hold is left empty, to be loaded."""
    mesh = make_mesh(world, recipe.parallel.shard, recipe.parallel.replicate)
    parallelize(moco, mesh, world.group, recipe.parallel)
    held = saved(moco).keys() if resumes else ()
    drawn = moco.initial_values(recipe.run.seed, begin.weights.shapes if begin else held)
    materialize(moco, world.device, chain(begin.values(), drawn) if begin else drawn, held)
    return TrainState(
        moco, schedule, recipe.optimizer, temperature=recipe.moco.temperature, mesh=mesh, group=world.group
    )


class Pretraining(Task):
    """MoCo v3 on the recipe's images.

    watched: what the monitor looks at (engine.runs.monitor).
    """

    monitor = "knn_top1"
    optional = (PREFIX,)
    begin: Start | None = None  # what model.weights means, where that was opened before the run
    network: str | None = None  # its digest

    def __init__(self, recipe: Pretrain, recipe_file: Path, world: World, splits: Splits, watched: Splits, moco: MoCo):
        augment = recipe.augment
        reading = Reading.of(recipe.data)
        crops = Crops(recipe.model.image_size, augment.crop_min, views=moco.views, reading=reading)
        self.dtype = dtype_of(recipe.parallel)
        super().__init__(recipe, world, splits, crops, make_augment(recipe), mean=augment.mean, std=augment.std)
        self.moco, self.recipe_file = moco, recipe_file
        self.local_batch = self.order.batch // world.size
        self.micro_batch = recipe.train.micro_batch_size or self.local_batch
        self.schedule = make_schedule(recipe, self.order.steps_per_epoch)
        self.watched = watched
        self.most_rankme = min(moco.width, moco.views * self.order.batch)
        self.bank = open_bank(recipe, watched) if has_monitor(watched) else None

    def fresh_trunk(self) -> nn.Module:
        model = self.recipe.model
        return declared(model).build(freeze_patch_projection=model.freeze_patch_projection).module

    def sources(self) -> list[Source]:
        watched = [source for source in (self.bank, self.watched.val) if source is not None]
        return list(dict.fromkeys([*super().sources(), *watched]))

    def start(self, *, resumes: bool) -> None:
        begin = None if resumes else self.begin or open_start(self.recipe, self.recipe_file, self.world)
        if begin is not None:
            self.licence, self.network = begin.licence, begin.digest
        self.trained = build_state(self.recipe, self.moco, self.world, self.schedule, resumes=resumes, begin=begin)
        self.probe = make_probe(self.recipe, self.world, self.splits, self.trained, self.dtype)

    @property
    def update(self) -> Update:
        return self.trained.update

    def tensors(self) -> dict[str, Tensor]:
        return self.trained.tensors() | ({} if self.probe is None else self.probe.tensors())

    def state(self) -> RunState:
        return replace(super().state(), network=self.network)

    def resume(self, checkpoint: Path, manifest: Manifest, state: RunState) -> None:
        """Go on from a checkpoint, which may have been made with the online probe or without it."""
        super().resume(checkpoint, manifest, state)
        self.network = state.network
        if self.probe is not None:
            self.probe.resume(state.step)
            if not any(name.startswith(PREFIX) for name in manifest.tensors):
                say(f"probe     the online probe starts fresh at step {state.step:,}: the run had none until then")

    def find_source(self) -> tuple[Path, Manifest, RunState] | None:
        recipe = self.recipe
        return find_source(recipe, self.recipe_file, self.world) if recipe.run.continue_from else None

    def begin_with(self, checkpoint: Path, manifest: Manifest, state: RunState) -> None:
        """The networks and the optimizer's state, with its own count of steps; this run counts anew what it skips, and
        its online probe starts fresh."""
        load(checkpoint, self.trained.tensors(), ignore=self.optional, group=self.world.host_group)
        self.update.skipped.zero_()
        self.update.skipped_in_a_row.zero_()
        self.licence, self.continued_from = state.licence, manifest.sha256()

    def train_step(self, batch: Batch) -> StepOutput:
        output = train_step(self.trained, self.views(batch))
        if self.probe is not None:
            self.probe.learn(output.features, batch.shown_B)
        return output

    def views(self, batch: Batch) -> Tensor | MicroBatches:
        """What the step sees of a batch. Of micro-batches only the crops, in bytes, are on the device all the while."""
        if self.micro_batch == self.local_batch:
            return self.images(batch)
        crops, sample_B = self.on_device(batch)

        def make(rows: slice) -> Tensor:
            return self.augmented(crops[:, rows], sample_B[rows], batch.epoch)

        return MicroBatches(make, self.local_batch, self.micro_batch)

    def picture(self, batch: Batch) -> Tensor:
        some = slice(self.micro_batch)
        return super().picture(batch._replace(crops=batch.crops[:, some], sample_B=batch.sample_B[some]))

    @property
    def less_memory(self) -> str:
        half = largest_micro_batch(self.micro_batch // 2, self.local_batch)
        if not half or has_batch_norm(self.moco.base.trunk):
            return super().less_memory
        return f"train.micro_batch_size={half}, {super().less_memory}"

    def metrics(self, output: StepOutput) -> dict[str, Tensor | float]:
        row: dict[str, Tensor | float] = {**health(output, self.trained)}
        first = {"loss": row.pop("loss"), "lr": output.applied.lr, "momentum": output.momentum}
        return first | row | ({} if self.probe is None else self.probe.describe())

    def describe(self, output: StepOutput, within: timedelta) -> Row:
        gram_DD = feature_gram(output.features, self.world.group)
        if not self.world.is_first:  # it alone writes the log
            return super().describe(output, within)
        copy_DD = gram_DD.to("cpu", non_blocking=True)  # is there before the row is
        row = super().describe(output, within)
        # Eigenvalues take longer than a step of many GPUs, which would wait for them.
        beside = ThreadPoolExecutor(1)
        rankme = beside.submit(lambda: rankme_from_gram(copy_DD).item())
        beside.shutdown(wait=False)
        return row | {"rankme": rankme}

    @property
    def evaluate_every(self) -> int:
        return 0 if self.bank is None else self.recipe.evaluate.knn_every_epochs * self.order.steps_per_epoch

    def evaluate(self) -> Row | None:
        trunk, bank, val = self.moco.base.trunk, self.bank, self.watched.val
        if bank is None or val is None:
            return None
        try:
            measured = self.recipe, self.world, self.workers, bank, val, trunk, self.dtype, self.probe
            return monitor_row(*measured, at_batch=self.at_batch)
        except (UserError, ValueError, FloatingPointError) as error:  # raised on all ranks alike
            if self.world.is_first:
                warn(f"kNN after step {self.step} was left out: {error}")
            return None

    def opening(self) -> list[str]:
        recipe, schedule, (train, val) = self.recipe, self.schedule, self.splits
        return [
            images_in_words(train, val),
            f"schedule  {self.epochs_in_words}: {schedule.total_steps:,} steps",
            f"rates     peak lr {schedule.peak_lr:g}, encoder momentum from {schedule.momentum:g} to 1",
            loss_in_words(recipe.moco.temperature, self.order.batch),
            *few_steps(self.order, self.world.size),
            *monitor_in_words(recipe.evaluate, self.splits, self.watched, self.bank),
        ]

    def memory(self) -> list[str]:
        return memory_in_words(self.recipe, self.world, step_gib)

    def result(self, monitor_rows: list[Row], last: Row | None) -> str:
        return result_in_words(monitor_rows, last)

    def finish(self, directory: Path) -> list[str]:
        return own_images(self.recipe, self.recipe_file)
