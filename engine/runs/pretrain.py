"""Pre-training, put together: recipe -> data, networks, state -> the trainer's loop."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.load import load, newest_valid
from engine.checkpoint.manifest import Manifest, read_manifest
from engine.checkpoint.retain import clean
from engine.data.augment import Augment
from engine.data.decode import Crops
from engine.data.loader import Batch, train_batches
from engine.data.order import Order
from engine.data.source import Source
from engine.data.splits import Splits, open_splits
from engine.distributed.agreement import agreement
from engine.distributed.world import World, make_mesh
from engine.errors import UserError
from engine.evaluation.online_probe import PREFIX
from engine.evaluation.rankme import feature_gram, rankme_from_gram
from engine.recipe.identity import fingerprint
from engine.recipe.load import Pretrain, dump, shape
from engine.runs import report
from engine.runs.bad_images import BadImages
from engine.runs.directory import RunDirectory, check_same_recipe
from engine.runs.log import MetricsLog
from engine.runs.monitor import has_monitor, make_probe, monitor_row
from engine.runs.trainer import Plan, Trainer
from engine.training.guard import check_skips
from engine.training.health import health
from engine.training.parallelize import check_compiler, materialize, parallelize
from engine.training.schedule import Schedule
from engine.training.step import StepOutput, TrainState, train_step
from models.architecture import of_name
from models.moco import MoCo

PICTURED = 8  # images of which TensorBoard shows both views


def pretrain(recipe: Pretrain, recipe_file: Path, world: World) -> None:
    """Run a recipe to its end, from its newest checkpoint where there is one. All ranks call it together.

    Raises:
        UserError, RunFailed, Interrupted: engine.cli turns them into words and exit codes.
    """
    started = time.perf_counter()
    moco = check(recipe, world)
    with RunDirectory(Path(recipe.run.dir), world) as directory:
        sources = open_splits(recipe.data, recipe_file, world, batch=recipe.train.global_batch_size)
        schedule = make_schedule(recipe, len(sources.train))
        plan = make_plan(recipe, schedule, has_monitor=has_monitor(sources))
        report.opening(world, recipe, sources, schedule, has_monitor(sources))

        clean(directory.checkpoints, world.host_group)
        found, manifest = newest_valid(directory.checkpoints, world.host_group), None
        if found is None:
            directory.check_fresh(recipe)
        else:
            manifest = check_resume(found, recipe, sources.train, world)
        task = Pretraining(recipe, world, sources, build_state(recipe, moco, world, schedule))
        if found is not None:
            task.resume(found, manifest)
            report.resumed(world, found, task.step, plan)
        directory.write_recipe(recipe)
        with agreement(world.host_group):
            log = MetricsLog(directory.path, task.step if found else -1, enabled=world.is_first)

        trainer = Trainer(task, plan, world=world, checkpoints=directory.checkpoints, log=log)
        trainer.seconds["start-up"] = time.perf_counter() - started
        trainer.run()
        log.close()
        report.closing(world, recipe_file, directory.path, trainer.seconds)


def check(recipe: Pretrain, world: World) -> MoCo:
    """The recipe's networks, which this machine can run. Nothing is written yet.

    Raises:
        UserError: on every rank, for what only the networks and the machine know.
    """
    with agreement(world.host_group):
        moco = make_networks(recipe)
        if recipe.parallel.compile:
            check_compiler(world.device)
    return moco


def make_schedule(recipe: Pretrain, images: int) -> Schedule:
    return Schedule(
        base_lr=recipe.optimizer.base_lr,
        global_batch=recipe.train.global_batch_size,
        epochs=recipe.train.epochs,
        warmup_epochs=recipe.train.warmup_epochs,
        steps_per_epoch=make_order(recipe, images).steps_per_epoch,
        momentum=recipe.moco.momentum,
    )


def make_order(recipe: Pretrain, images: int) -> Order:
    return Order(recipe.run.seed, images, recipe.train.global_batch_size)


def make_plan(recipe: Pretrain, schedule: Schedule, *, has_monitor: bool) -> Plan:
    return Plan(
        last_step=min(schedule.total_steps, recipe.train.max_steps or schedule.total_steps),
        log_every=recipe.log.every_steps,
        checkpoint_every=recipe.checkpoint.every_steps,
        keep=recipe.checkpoint.keep,
        evaluate_every=recipe.evaluate.knn_every_epochs * schedule.steps_per_epoch if has_monitor else 0,
    )


def check_resume(checkpoint: Path, recipe: Pretrain, train: Source, world: World) -> Manifest:
    """The manifest of a checkpoint that a run of this recipe and these images may go on from.

    Raises:
        UserError: on every rank, where the run was begun with other values or other images.
    """
    manifest = None
    with agreement(world.host_group):
        manifest = read_manifest(checkpoint)
        check_same_recipe(manifest, recipe)
        # Imported weights (step 0) have seen no images yet.
        if manifest.state["data"] not in (None, train.fingerprint):
            raise UserError(
                f"data.root ({recipe.data.root}) must hold the images that the run in {recipe.run.dir} began with; "
                "give it those, or pass another run.dir"
            )
    return manifest


def make_networks(recipe: Pretrain) -> MoCo:
    """The networks that the recipe declares, on the meta device: no memory, no weights.

    Raises:
        UserError: for what only the network itself knows.
    """
    model = recipe.model
    architecture = of_name(model.name, model.image_size, shape(model))
    make_trunk = partial(architecture.build, freeze_patch_projection=model.freeze_patch_projection)
    with torch.device("meta"):
        try:
            return MoCo(make_trunk, model.projector_hidden_dim, model.output_dim)
        except ValueError as error:
            raise UserError(str(error)) from error


def build_state(recipe: Pretrain, moco: MoCo, world: World, schedule: Schedule) -> TrainState:
    """The networks of `make_networks` and the recipe's optimizer, sharded, with their initial weights."""
    parallel = recipe.parallel
    mesh = make_mesh(world, parallel.shard, parallel.replicate)
    parallelize(moco, mesh, world.group, shard=parallel.shard, precision=parallel.precision, compile=parallel.compile)
    materialize(moco, world.device, moco.initial_values(recipe.run.seed))
    return TrainState(
        moco,
        schedule,
        optimizer=recipe.optimizer.name,
        weight_decay=recipe.optimizer.weight_decay,
        temperature=recipe.moco.temperature,
        group=world.group,
        shard_group=mesh["shard"].get_group(),
    )


class Pretraining:
    """The trainer's task (engine.runs.trainer.Task): MoCo v3 on the recipe's images."""

    def __init__(self, recipe: Pretrain, world: World, sources: Splits, state: TrainState):
        self.recipe, self.world, self.sources, self.state = recipe, world, sources, state
        self.dtype = torch.float64 if recipe.parallel.precision == "float64" else torch.float32
        self.augment = make_augment(recipe, self.dtype)
        self.bad_images = BadImages(recipe.data.max_bad_fraction, world)
        self.probe = make_probe(recipe, world, sources, state, self.dtype)
        self.licence: str | None = None  # of imported weights, which binds what is made of them

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def images_per_step(self) -> int:
        return self.state.schedule.global_batch

    def resume(self, checkpoint: Path, manifest: Manifest) -> None:
        """Go on from a checkpoint, which may have been made with the online probe or without it."""
        tensors, probe = self.state.tensors(), self.probe
        if probe is not None:
            probe.resume(manifest.step)
            if any(name.startswith(PREFIX) for name in manifest.tensors):
                tensors |= probe.tensors()
            else:
                report.fresh_probe(self.world, manifest.step)
        saved = load(checkpoint, tensors, ignore=(PREFIX,), group=self.world.host_group)
        self.state.step = saved["step"]
        self.bad_images.total = saved["bad_images"]
        self.licence = saved.get("licence")

    def batches(self, last_step: int) -> Iterator[Batch]:
        return train_batches(
            self.sources.train,
            make_order(self.recipe, len(self.sources.train)),
            Crops(self.recipe.model.image_size, self.recipe.augment.crop_min),
            range(self.step, last_step),
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def train_step(self, batch: Batch) -> StepOutput:
        self.bad_images.meet(batch.bad)
        output = train_step(self.state, self.views(batch))
        if self.probe is not None:
            self.probe.learn(output.features, batch.shown_B)
        return output

    def views(self, batch: Batch) -> Tensor:
        """Both augmented views [2B, 3, H, W] of a batch, on the device."""
        crops, sample_B = (t.to(self.world.device, non_blocking=True) for t in (batch.crops, batch.sample_B))
        return self.augment(crops, sample_B, torch.full((), batch.epoch, device=self.world.device))

    def describe(self, output: StepOutput) -> dict[str, float]:
        check_skips(self.state.skipped_in_a_row, self.step)
        epochs = -(-self.step // self.state.schedule.steps_per_epoch)  # begun
        bad_images = self.bad_images.check(epochs * len(self.sources.train))
        row = health(output, self.state)
        row["rankme"] = rankme_from_gram(feature_gram(output.features, self.world.group))
        place = {"epoch": self.step / self.state.schedule.steps_per_epoch, "loss": row.pop("loss")}
        place |= {"lr": output.lr, "momentum": output.momentum} | row | {"bad_images": bad_images}
        return place if self.probe is None else place | self.probe.describe()

    def evaluate(self) -> dict[str, float] | None:
        trunk = self.state.moco.base.trunk
        try:
            row = monitor_row(self.recipe, self.world, self.sources, trunk, self.dtype, self.probe)
        except (UserError, ValueError, FloatingPointError) as error:  # raised on all ranks alike
            report.no_monitor(self.world, self.step, error)
            return None
        return {"epoch": self.step / self.state.schedule.steps_per_epoch} | row

    def picture(self, batch: Batch) -> Tensor:
        """uint8 [3, H, W]: what the networks see, view 1 above view 2, one column per image."""
        # The whole batch again: another shape would be compiled anew.
        views = self.views(batch).float().cpu().unflatten(0, (2, -1))[:, :PICTURED]
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.recipe.augment.mean, self.recipe.augment.std))
        pixels = ((views * std + mean) * 255).clamp(0, 255).byte()  # [2, N, 3, H, W]
        return pixels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def checkpoint(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "recipe": dump(self.recipe),
            "data": self.sources.train.fingerprint,
            "bad_images": self.bad_images.count(),
            "licence": self.licence,
        }
        tensors = self.state.tensors() | ({} if self.probe is None else self.probe.tensors())
        return {"tensors": tensors, "state": state, "recipe_sha256": fingerprint(self.recipe)}


def make_augment(recipe: Pretrain, dtype: torch.dtype):
    """The recipe's augmentation of both views as one call, compiled where the recipe says so."""
    augment = Augment(recipe.augment, recipe.run.seed, dtype)
    return torch.compile(augment.__call__, fullgraph=True, dynamic=False) if recipe.parallel.compile else augment
