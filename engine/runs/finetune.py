"""Fine-tuning, put together: recipe -> labelled images, a CHECKPOINT's network, classifier -> the trainer's loop.

The settings are those of DeiT (Touvron et al. 2021), as the paper uses them (section 5.3, "End-to-end fine-tuning").

Shapes: B images of this rank, G of all ranks, S side of an image, C classes.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import read_tensors
from engine.data.decode import Crops
from engine.data.loader import Batch
from engine.data.order import Order
from engine.data.philox import DROP_PATH, uniform
from engine.data.regularize import Mix, RandAugment, erase
from engine.data.splits import Splits, open_labelled_splits
from engine.distributed.agreement import agreement
from engine.distributed.world import World, in_turn, make_mesh
from engine.errors import RunFailed, UserError, one_line
from engine.evaluation.subject import Subject
from engine.recipe.keys import wrong
from engine.recipe.load import dump
from engine.recipe.sections import Finetune
from engine.runs.supervised import TOP, Supervised, closing, digest, run, say
from engine.runs.trainer import Plan
from engine.training.finetune_step import FinetuneOutput, FinetuneSchedule, FinetuneState, finetune_step
from engine.training.guard import check_skips
from engine.training.parallelize import check_compiler, materialize, parallelize_classifier
from engine.weights.export import export_classifier
from engine.weights.opening import open_trunk
from engine.weights.weights import EncoderName, Head, Weights
from models.classifier import Classifier


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
        UserError, RunFailed, Interrupted: engine.cli turns them into words and exit codes.
    """
    started = time.perf_counter()
    batch = recipe.train.global_batch_size
    sources = open_labelled_splits(recipe.data, world, seed=recipe.run.seed, batch=batch)
    weights = in_turn(world, lambda: open_fetched(checkpoint, encoder, untrained=baseline == "initial"))
    with agreement(world.host_group):
        check_randaugment(recipe)
        networks = make_networks(recipe, weights, len(sources.train.classes))
        if recipe.parallel.compile:
            check_compiler(world.device)
    state = build_state(recipe, weights, networks, world, len(sources.train))
    task = Finetuning(recipe, world, sources, weights, state)
    row = closing(task, run(task, started))
    with agreement(world.host_group):
        if world.is_first:
            leave_classifiers(task)
    return {key.removeprefix("finetune_"): value for key, value in row.items() if key.endswith(("top1", "top5"))}


def check_randaugment(recipe: Finetune) -> None:
    """Raises UserError where timm cannot do what the recipe names."""
    config = recipe.augment.randaugment
    if config is None:
        return
    try:
        RandAugment(config, 0, 8, (0.5,) * 3, recipe.augment.interpolation)(Image.new("RGB", (8, 8)), 0, 0)
    except Exception as error:  # timm asserts, looks up and draws without saying what was wrong
        raise wrong("augment.randaugment", config, f"what timm can do ({one_line(error)})") from error


def open_fetched(checkpoint: str, encoder: EncoderName, *, untrained: bool) -> Weights:
    """`open_trunk`, of which a first tensor was read: published weights are then on this machine."""
    weights = open_trunk(checkpoint, encoder, untrained=untrained)
    if not untrained:  # what is drawn needs no fetching
        list(weights.read(sorted(weights.shapes)[:1]))
    return weights


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
) -> FinetuneState:
    """The networks of `make_networks`, sharded, with the weights that they start from."""
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
    for network in networks:
        if network is not None:
            materialize(network, world.device, network.initial_values(trunk_values(weights), recipe.run.seed))
    return FinetuneState(
        classifier,
        ema,
        make_schedule(recipe, images),
        weight_decay=recipe.optimizer.weight_decay,
        layer_decay=recipe.optimizer.layer_decay,
        ema_decay=recipe.train.ema_decay or 0.0,
        group=world.group,
        shard_group=mesh["shard"].get_group(),
    )


def make_schedule(recipe: Finetune, images: int) -> FinetuneSchedule:
    train = recipe.train
    return FinetuneSchedule(
        peak_lr=recipe.peak_lr,
        min_lr=recipe.optimizer.min_lr,
        epochs=train.epochs,
        warmup_epochs=train.warmup_epochs,
        steps_per_epoch=Order(recipe.run.seed, images, train.global_batch_size).steps_per_epoch,
    )


def trunk_values(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one trunk's weights, under the names inside of it."""
    for name, tensor in weights.read(sorted(weights.shapes)):
        yield name.removeprefix("base.trunk."), tensor


class Finetuning(Supervised):
    """The trainer's task (engine.runs.trainer.Task): a classifier and its trunk, trained together."""

    metric = "finetune"
    chosen = "the last"
    keeps_partial = False

    def __init__(
        self,
        recipe: Finetune,
        world: World,
        sources: Splits,
        weights: Weights,
        state: FinetuneState,
    ):
        about, augment = weights.known(), recipe.augment
        dtype = torch.float64 if recipe.parallel.precision == "float64" else torch.float32
        subject = Subject(
            state.classifier,
            about.image_size,
            about.mean,
            about.std,
            recipe.evaluate.crop_fraction,
            interpolation=augment.interpolation,
            dtype=dtype,
        )
        super().__init__(recipe, world, sources, subject, digest(trunk_values(weights)))
        self.weights, self.state = weights, state
        self.mix = Mix(
            augment.mixup, augment.cutmix, recipe.train.label_smoothing, len(self.classes), seed=recipe.run.seed
        )

    @property
    def step(self) -> int:
        return self.state.step

    def plan(self) -> Plan:
        every = self.recipe.evaluate.every_epochs * self.steps_per_epoch
        return dataclasses.replace(super().plan(), evaluate_every=every)

    def make_order(self) -> Order:
        return dataclasses.replace(super().make_order(), repeats=self.recipe.augment.repeats)

    def make_crops(self) -> Crops:
        augment, subject, after_crop = self.recipe.augment, self.subject, None
        if augment.randaugment is not None:
            after_crop = RandAugment(
                augment.randaugment, self.recipe.run.seed, subject.image_size, subject.mean, augment.interpolation
            )
        return dataclasses.replace(super().make_crops(), interpolation=augment.interpolation, after_crop=after_crop)

    def images(self, batch: Batch) -> Tensor:
        images = super().images(batch)
        if self.recipe.augment.erase_probability > 0:
            erase(images, batch.sample_B, batch.epoch, self.recipe.augment.erase_probability, self.recipe.run.seed)
        return images

    def train_step(self, batch: Batch) -> FinetuneOutput:
        self.bad_images.meet(batch.bad)
        images, label_B = self.images(batch), self.labels(batch)
        if self.mix.is_on:
            other = exchanged(images, label_B, self.world)
            images, target_BC = self.mix(images, label_B, *other, batch.step)
        else:
            target_BC = self.mix.plain_target(label_B)
        sample_B = batch.sample_B.to(self.world.device, non_blocking=True)
        paths = len(self.state.classifier.drop_paths)
        uniform_BK = uniform(self.recipe.run.seed, batch.epoch, sample_B, 0, DROP_PATH, paths)
        return finetune_step(self.state, images, target_BC.to(images.dtype), uniform_BK)

    def describe(self, output: FinetuneOutput) -> dict[str, float]:
        check_skips(self.state.skipped_in_a_row, self.step)
        health = {"grad_norm": output.grad_norm.item(), "skipped_steps": int(self.state.skipped)}
        return self.row(output.loss.item(), output.lr) | health

    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        """Of the classifier and of its moving average, in one pass over the images."""
        ema = self.state.ema
        networks = {self.metric: self.state.classifier} | ({} if ema is None else {"ema": ema})
        subject = dataclasses.replace(self.subject, network=SideBySide(networks.values()))
        logit_NX, label_N = self.val_outputs(subject, "start anew with a lower optimizer.base_lr in another run.dir")
        top = [logit_NC.topk(min(TOP, len(self.classes))).indices for logit_NC in logit_NX.chunk(len(networks), 1)]
        return self.gathered(dict(zip(networks, top, strict=True)), label_N)

    def evaluate(self) -> dict[str, float] | None:
        check_skips(self.state.skipped_in_a_row, self.step)
        return super().evaluate()

    def reported(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The last: nothing is chosen on the validation images."""
        return rows[-1]

    def opening(self) -> list[str]:
        train, schedule = self.recipe.train, self.state.schedule
        return [
            f"network   {self.weights.origin}, all of it trained, images of {self.subject.image_size}",
            self.data_line(),
            f"schedule  {train.epochs} epochs of {self.steps_per_epoch:,} steps, peak lr {schedule.peak_lr:g}",
        ]

    def tensors(self) -> dict[str, Tensor]:
        return self.state.tensors()

    def checkpoint(self) -> dict[str, Any]:
        saved = super().checkpoint()
        about = dataclasses.replace(self.weights.known(), finetuned=dump(self.recipe))
        saved["state"]["about"] = about.to_json()  # by which engine.weights.opening opens the run
        return saved

    def resume(self, saved: dict[str, Any]) -> None:
        super().resume(saved)
        self.state.step = saved["step"]


class SideBySide(nn.ModuleList):
    """The logits of several classifiers for the same images, one after the other: [B, n * C]."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([network(images) for network in self], 1)


def leave_classifiers(task: Finetuning) -> None:
    """Trunk and classifier of the last step, and their moving averages, as folders for timm where it has such ones."""
    leave_classifier(task, "base", "model", "timm")
    if task.state.ema is not None:
        leave_classifier(task, "momentum", "ema", "timm_ema")


def leave_classifier(task: Finetuning, encoder: EncoderName, prefix: str, name: str) -> None:
    checkpoints, folder = task.directory / "checkpoints", task.directory / name
    checkpoint = checkpoints / read_pointer(checkpoints, "latest")
    names = [f"{prefix}.head.{part}" for part in ("weight", "bias")]
    weight, bias = (tensor for _, tensor in read_tensors(checkpoint, names))
    head = Head(weight, bias, task.classes, task.subject.interpolation, task.subject.crop_fraction)
    try:
        export_classifier(open_trunk(str(checkpoint), encoder), head, folder)
    except (UserError, RunFailed) as error:  # another network, timm's words, a full disk
        say(task.world, [f"          no {folder} for timm: {one_line(error)}; the checkpoint has all of the network"])
    else:
        say(task.world, [f"          timm.create_model('local-dir:{folder}', pretrained=True) is all of the network"])


def exchanged(images_BCSS: Tensor, label_B: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Images and labels of the rank at the other end of the global batch, which gets this rank's."""
    other = world.size - 1 - world.rank
    mine = images_BCSS.contiguous(), label_B
    if other == world.rank:
        return mine
    theirs = tuple(torch.empty_like(tensor) for tensor in mine)
    transfers = [
        dist.P2POp(way, tensor, group=world.group, group_peer=other, tag=tag)
        for way, tensors in ((dist.isend, mine), (dist.irecv, theirs))
        for tag, tensor in enumerate(tensors)
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return theirs
