"""Fine-tuning, put together: recipe -> labelled images, a CHECKPOINT's network, classifier -> the trainer's loop.

The settings are those of DeiT (Touvron et al. 2021), as the paper uses them (section 5.3, "End-to-end fine-tuning").

Shapes: B images of this rank, G of all ranks, S side of an image, C classes.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.agree import agreement
from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import read_tensors
from engine.data.loader import Batch
from engine.data.philox import DROP_PATH, uniform
from engine.data.regularize import Mix, Retouch, erase
from engine.distributed import World, in_turn, make_mesh
from engine.encoders import open_weights
from engine.evaluation.subject import Subject, open_trunk
from engine.evaluation.supervised import TOP, Supervised, closing, open_images, run, say
from engine.recipe import UserError
from engine.tasks import Finetune
from engine.training.guard import check_skips
from engine.training.parallelize import check_compiler, materialize, parallelize_classifier
from engine.training.sources import Sources
from engine.training.tune import TuneOutput, TuneSchedule, TuneState, tune_step
from engine.weights.classifying import write_classifier
from engine.weights.weights import EncoderName, Weights
from models.classifier import Classifier, starting_values


def finetune(
    recipe: Finetune,
    checkpoint: str,
    encoder: EncoderName,
    baseline: Literal["initial"] | None,
    world: World,
) -> dict[str, float]:
    """Train a CHECKPOINT's network and a classifier to the recipe's end; a run that is found goes on.

    All ranks call it together. Returns {"top1", "top5"} of the last epoch, and the moving average's where there is one.

    Args:
        baseline: `initial` to start from the network as it was before pre-training.

    Raises:
        UserError, RunFailed, Interrupted: engine.front_door turns them into words and exit codes.
    """
    started = time.perf_counter()
    sources = open_images(recipe, world)
    check_size(recipe, len(sources.train))
    weights = in_turn(world, lambda: open_trunk(checkpoint, encoder, untrained=baseline == "initial"))
    with agreement(world.host_group):
        networks = make_networks(recipe, weights, len(sources.train.classes))
        if recipe.parallel.compile:
            check_compiler(world.device)
    state, identity = build_state(recipe, weights, networks, world, len(sources.train))
    task = Finetuning(recipe, world, sources, weights, state, identity)
    row = closing(task, run(task, started))
    with agreement(world.host_group):
        if world.is_first:
            leave_classifier(task)
    return {key.removeprefix("finetune_"): value for key, value in row.items() if key.endswith(("top1", "top5"))}


def check_size(recipe: Finetune, images: int) -> None:
    """Raises UserError where the images do not fill a batch."""
    batch = recipe.train.global_batch_size
    if images < batch:
        raise UserError(
            f"train.global_batch_size ({batch}) must be at most the number of training images ({images}); pass "
            f"train.global_batch_size={images} or less, or give more images"
        )


def make_networks(recipe: Finetune, weights: Weights, classes: int) -> tuple[Classifier, Classifier | None]:
    """The classifier and, where the recipe wants it, its moving average, on the meta device.

    Raises:
        UserError: the network does not suit the recipe.
    """
    build = weights.known().architecture.build
    with torch.device("meta"):
        try:
            classifier = Classifier(build(), classes, recipe.model.drop_path)
            ema = None if recipe.train.ema_decay is None else Classifier(build(), classes).requires_grad_(False)
        except ValueError as error:
            raise UserError(str(error)) from error
    return classifier, ema


def build_state(
    recipe: Finetune,
    weights: Weights,
    networks: tuple[Classifier, Classifier | None],
    world: World,
    images: int,
) -> tuple[TuneState, str]:
    """The networks of `make_networks`, sharded, with their first weights; the digest of those weights."""
    parallel, (classifier, ema) = recipe.parallel, networks
    mesh = make_mesh(world, parallel.shard, parallel.replicate)
    parallelize_classifier(
        classifier,
        ema,
        mesh,
        world.group,
        shard=parallel.shard,
        precision=parallel.precision,
        compile=parallel.compile,
    )
    digests: dict[str, str] = {}
    for network in networks:
        if network is not None:
            materialize(network, world.device, digested(first_values(network, weights, recipe.run.seed), digests))
    state = TuneState(
        classifier,
        ema,
        make_schedule(recipe, images),
        weight_decay=recipe.optimizer.weight_decay,
        layer_decay=recipe.optimizer.layer_decay,
        ema_decay=recipe.train.ema_decay or 0.0,
        group=world.group,
        shard_group=mesh["shard"].get_group(),
    )
    return state, hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def make_schedule(recipe: Finetune, images: int) -> TuneSchedule:
    train, optimizer = recipe.train, recipe.optimizer
    return TuneSchedule(
        peak=optimizer.base_lr * train.global_batch_size / 512,
        lowest=optimizer.min_lr,
        epochs=train.epochs,
        warmup_epochs=train.warmup_epochs,
        steps_per_epoch=images // train.global_batch_size,
    )


def first_values(classifier: Classifier, weights: Weights, seed: int) -> Iterator[tuple[str, Tensor]]:
    prefix = "base.trunk."

    def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.read([prefix + name for name in names]):
            yield name.removeprefix(prefix), tensor

    return starting_values(classifier, read, {name.removeprefix(prefix) for name in weights.shapes}, seed)


def digested(values: Iterable[tuple[str, Tensor]], digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The same; each one's sha256 is put into `digests` as it passes."""
    for name, value in values:
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(content).hexdigest()
        yield name, value


class Finetuning(Supervised):
    """The trainer's task (engine.training.trainer.Task): a classifier and its trunk, trained together."""

    metric = "finetune"
    keeps_partial = False

    def __init__(
        self,
        recipe: Finetune,
        world: World,
        sources: Sources,
        weights: Weights,
        state: TuneState,
        identity: str,
    ):
        about, values = weights.known(), recipe.augment
        dtype = torch.float64 if recipe.parallel.precision == "float64" else torch.float32
        subject = Subject(
            state.classifier,
            about.image_size,
            about.mean,
            about.std,
            recipe.evaluate.crop_fraction,
            interpolation=values.interpolation,
            dtype=dtype,
        )
        super().__init__(recipe, world, sources, subject, identity)
        self.weights, self.state = weights, state
        self.mix = Mix(
            values.mixup, values.cutmix, recipe.train.label_smoothing, len(self.classes), seed=recipe.run.seed
        )

    @property
    def step(self) -> int:
        return self.state.step

    def plan(self):
        every = self.recipe.evaluate.every_epochs * self.steps_per_epoch
        return dataclasses.replace(super().plan(), evaluate_every=every)

    def crop_options(self) -> dict[str, Any]:
        values, options = self.recipe.augment, {}
        if values.randaugment is not None:
            options["retouch"] = Retouch(
                values.randaugment,
                self.recipe.run.seed,
                self.subject.image_size,
                self.subject.mean,
                values.interpolation,
            )
        return options | {"repeats": values.repeats, "interpolation": values.interpolation}

    def images(self, batch: Batch) -> Tensor:
        images = super().images(batch)
        if self.recipe.augment.erase_probability > 0:
            erase(images, batch.sample_B, batch.epoch, self.recipe.augment.erase_probability, self.recipe.run.seed)
        return images

    def train_step(self, batch: Batch) -> TuneOutput:
        images, label_B = self.images(batch), self.labels(batch)
        if self.mix.is_on:
            images, target_BC = self.mix(images, label_B, *mirrored(images, label_B, self.world), batch.step)
        else:
            target_BC = self.mix.plain_target(label_B)
        sample_B = batch.sample_B.to(self.world.device, non_blocking=True)
        paths = len(self.state.classifier.drop_paths)
        uniform_BK = uniform(self.recipe.run.seed, batch.epoch, sample_B, 0, DROP_PATH, paths)
        return tune_step(self.state, images, target_BC.to(images.dtype), uniform_BK)

    def describe(self, output: TuneOutput) -> dict[str, float]:
        check_skips(self.state.skipped_in_a_row, self.step)
        health = {"grad_norm": output.grad_norm.item(), "skipped_steps": int(self.state.skipped)}
        return self.row(output.loss.item(), output.lr) | health

    def predict(self) -> tuple[Tensor, Tensor]:
        return self._predict(self.state.classifier)

    def _predict(self, network: Classifier) -> tuple[Tensor, Tensor]:
        logit_NC, label_N = self.val_outputs(dataclasses.replace(self.subject, network=network))
        return self.gathered(logit_NC.topk(min(TOP, logit_NC.shape[1])).indices, label_N)

    def evaluate(self) -> dict[str, float] | None:
        row = super().evaluate()
        if row is not None and self.state.ema is not None:
            row |= self.accuracy("ema", *self._predict(self.state.ema))
        return row

    def reported(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The last: nothing is chosen on the validation images."""
        return rows[-1]

    def opening(self) -> list[str]:
        train, schedule = self.recipe.train, self.state.schedule
        return [
            f"network   {self.weights.origin}, all of it trained, images of {self.subject.image_size}",
            self.data_line(),
            f"schedule  {train.epochs} epochs of {self.steps_per_epoch:,} steps, peak lr {schedule.peak:g}",
        ]

    def tensors(self) -> dict[str, Tensor]:
        return self.state.tensors()

    def bound(self) -> dict[str, Any]:
        return super().bound() | {"about": self.weights.known().to_json()}

    def resume(self, saved: dict[str, Any]) -> None:
        super().resume(saved)
        self.state.step = saved["step"]


def leave_classifier(task: Finetuning) -> None:
    """Trunk and classifier of the last step as a folder for timm, where timm has such a network."""
    checkpoints, folder = task.directory / "checkpoints", task.directory / "timm"
    checkpoint = checkpoints / read_pointer(checkpoints, "latest")
    head = dict(read_tensors(checkpoint, ["model.head.weight", "model.head.bias"]))
    try:
        write_classifier(
            open_weights(str(checkpoint)).trunk("base"),
            (head["model.head.weight"], head["model.head.bias"]),
            task.classes,
            folder,
            interpolation=task.subject.interpolation,
            crop_fraction=task.subject.crop_fraction,
        )
    except ValueError as error:
        say(task.world, [f"          no folder for timm: {error}; the checkpoint has all of the network"])
    else:
        say(task.world, [f"          timm.create_model('local-dir:{folder}', pretrained=True) has all of the network"])


def mirrored(images_BCSS: Tensor, label_B: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Images and labels that this rank's rows are mixed with: row i of the global batch with row G-1-i."""
    mine = [images_BCSS.flip(0), label_B.flip(0)]
    other = world.size - 1 - world.rank
    if other == world.rank:
        return tuple(mine)
    theirs = [torch.empty_like(tensor) for tensor in mine]
    ways = ((dist.isend, mine), (dist.irecv, theirs))
    transfers = [
        dist.P2POp(way, tensor, group=world.group, group_peer=other, tag=tag)
        for way, tensors in ways
        for tag, tensor in enumerate(tensors)
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return tuple(theirs)
