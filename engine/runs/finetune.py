"""Fine-tuning, put together: recipe -> labelled images, a CHECKPOINT's network, classifier -> a run.

The settings are those of DeiT (Touvron et al. 2021), as the paper uses them (section 5.3, "End-to-end fine-tuning").

Shapes: B images of this rank, G of all ranks, S side of an image, C classes.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import read_tensors
from engine.checkpoint.state import RunState
from engine.data.decode import Crops, Reading
from engine.data.loader import Batch
from engine.data.philox import DROP_PATH, uniform
from engine.data.regularize import Mix, RandAugment, erase
from engine.data.splits import Splits, open_labelled_splits
from engine.distributed.agreement import agreement
from engine.distributed.world import World, in_turn, make_mesh
from engine.errors import RunFailed, UserError, one_line
from engine.evaluation.knn import TOP
from engine.evaluation.subject import Subject
from engine.recipe.keys import wrong
from engine.recipe.load import dump
from engine.recipe.sections import Finetune
from engine.runs.auto import settled
from engine.runs.changes import begun, readable
from engine.runs.fits import memory_in_words
from engine.runs.log import Row
from engine.runs.run import run
from engine.runs.supervised import Supervised
from engine.training.activation_checkpoint import check_activation_checkpoint
from engine.training.finetune_step import FinetuneOutput, FinetuneState, finetune_step
from engine.training.memory import memory_of_finetuning
from engine.training.parallelize import check_compiler, dtype_of, materialize, parallelize, saved
from engine.training.schedule import Schedule
from engine.training.update import Update
from engine.weights.adopt import with_usual_norms
from engine.weights.export import export_classifier
from engine.weights.opening import open_trunk
from engine.weights.weights import EncoderName, Head, Weights, digest
from models.classifier import Classifier


def finetune(
    recipe: Finetune,
    checkpoint: str,
    encoder: EncoderName,
    baseline: Literal["initial"] | None,
    world: World,
    heads: int | None = None,
) -> dict[str, float]:
    """Train a CHECKPOINT's network and a classifier to the recipe's end; a run that is found goes on.

    All ranks call it together. Returns {"top1", "top5"} of the last epoch, and the moving average's where there is one.

    Args:
        baseline: `initial` to start from the network as it was before pre-training.
        heads: of a ViT whose file does not tell its number of them.

    Raises:
        UserError, RunFailed, Interrupted: engine.door turns them into words and exit codes.
    """
    started, written = time.perf_counter(), recipe
    recipe = settled(written, world)
    batch, former = recipe.train.global_batch_size, begun(recipe, world)
    splits = open_labelled_splits(recipe.data, world, seed=recipe.run.seed, batch=batch, begun=former)
    splits = readable(splits, recipe, world, batch=batch)
    weights = in_turn(world, lambda: open_fetched(checkpoint, encoder, untrained=baseline == "initial", heads=heads))
    with agreement(world.host_group):
        check_randaugment(recipe)
        networks = make_classifiers(recipe, weights, len(splits.train.classes))
        check_compiler(recipe.parallel, world.device)
    task = Finetuning(recipe, world, splits, weights, *networks)
    task.written = written
    row = run(task, started)
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


def open_fetched(checkpoint: str, encoder: EncoderName, *, untrained: bool, heads: int | None = None) -> Weights:
    """`open_trunk`, of which a first tensor was read: published weights are then on this machine."""
    weights = open_trunk(checkpoint, encoder, untrained=untrained, heads=heads)
    if not untrained:  # what is drawn needs no fetching
        list(weights.read(sorted(weights.shapes)[:1]))
    return with_usual_norms(weights)


def make_classifiers(recipe: Finetune, weights: Weights, classes: int) -> tuple[Classifier, Classifier | None]:
    """The classifier and, where the recipe wants it, its moving average, on the meta device.

    Raises:
        UserError: the network does not suit the recipe.
    """
    architecture = weights.known().architecture
    build = architecture.build
    with torch.device("meta"):
        try:
            architecture.check_step(bf16=recipe.parallel.precision == "bf16")
            classifier = Classifier(build(), classes, recipe.model.drop_path)
            ema = None if recipe.train.ema_decay is None else Classifier(build(), classes).requires_grad_(False)
        except ValueError as error:
            raise UserError(str(error)) from error
    check_activation_checkpoint(classifier.trunk, recipe.parallel.activation_checkpoint, weights.origin)
    return classifier, ema


def trunk_values(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one trunk's weights, under the names inside of it."""
    for name, tensor in weights.read(sorted(weights.shapes)):
        yield name.removeprefix("base.trunk."), tensor


class Finetuning(Supervised):
    """A classifier and its trunk, trained together."""

    monitor = "finetune_top1"
    chosen = "the last"

    def __init__(
        self,
        recipe: Finetune,
        world: World,
        splits: Splits,
        weights: Weights,
        classifier: Classifier,
        ema: Classifier | None,
    ):
        about, augment, seed = weights.known(), recipe.augment, recipe.run.seed
        subject = Subject(
            classifier,
            about.image_size,
            about.mean,
            about.std,
            recipe.evaluate.crop_fraction,
            augment.interpolation,
            dtype_of(recipe.parallel),
            Reading.of(recipe.data),
        )
        config, randaugment = augment.randaugment, None
        if config is not None:
            randaugment = RandAugment(config, seed, about.image_size, about.mean, augment.interpolation)
        form = about.image_size, augment.crop_min, 1, augment.interpolation, randaugment
        crops = Crops(*form, reading=subject.reading)
        start = digest(trunk_values(weights))
        super().__init__(recipe, world, splits, subject, start, crops, repeats=augment.repeats)
        self.weights, self.classifier, self.ema = weights, classifier, ema
        smoothing = recipe.train.label_smoothing
        self.mix = Mix(augment.mixup, augment.cutmix, smoothing, len(self.classes), seed=seed)
        self.schedule = Schedule(
            peak_lr=recipe.peak_lr,
            min_lr=recipe.optimizer.min_lr,
            epochs=recipe.train.epochs,
            warmup_epochs=recipe.train.warmup_epochs,
            steps_per_epoch=self.order.steps_per_epoch,
        )

    def fresh_trunk(self) -> nn.Module:
        return Classifier(self.weights.known().architecture.build(), len(self.classes)).trunk

    def start(self, *, resumes: bool) -> None:
        recipe, world = self.recipe, self.world
        mesh = make_mesh(world, recipe.parallel.shard, recipe.parallel.replicate)
        for network in (self.classifier, self.ema):
            if network is not None:
                parallelize(network, mesh, world.group, recipe.parallel)
                given, held = ((), saved(network).keys()) if resumes else (trunk_values(self.weights), ())
                values = network.initial_values(given, recipe.run.seed, held)
                materialize(network, world.device, values, held)
        self.trained = FinetuneState(
            self.classifier,
            self.ema,
            self.schedule,
            recipe.optimizer,
            ema_decay=recipe.train.ema_decay or 0.0,
            group=world.group,
        )

    @property
    def update(self) -> Update:
        return self.trained.update

    def tensors(self) -> dict[str, Tensor]:
        return self.trained.tensors()

    def images(self, batch: Batch) -> Tensor:
        images = super().images(batch)
        if self.recipe.augment.erase_probability > 0:
            erase(images, batch.sample_B, batch.epoch, self.recipe.augment.erase_probability, self.recipe.run.seed)
        return images

    def train_step(self, batch: Batch) -> FinetuneOutput:
        images, label_B = self.images(batch), self.labels(batch)
        if self.mix.is_on:
            # No name for the other rank's images: they need not be there while the network goes back.
            images, target_BC = self.mix(images, label_B, *exchanged(images, label_B, self.world), batch.step)
        else:
            target_BC = self.mix.plain_target(label_B)
        sample_B = batch.sample_B.to(self.world.device, non_blocking=True)
        paths = len(self.classifier.drop_paths)
        uniform_BK = uniform(self.recipe.run.seed, batch.epoch, sample_B, 0, DROP_PATH, paths)
        return finetune_step(self.trained, images, target_BC.to(images.dtype), uniform_BK)

    def metrics(self, output: FinetuneOutput) -> dict[str, Tensor | float]:
        applied = output.applied
        health = {"grad_norm": applied.grad_norm, "skipped_steps": self.update.skipped}
        return {"loss": output.loss, "lr": applied.lr} | health

    @property
    def evaluate_every(self) -> int:
        return self.recipe.evaluate.every_epochs * self.order.steps_per_epoch

    def evaluate(self) -> Row | None:
        self.check_skips_now()
        return super().evaluate()

    def predict(self) -> tuple[dict[str, Tensor], Tensor]:
        """Of the classifier and of its moving average, in one pass over the images."""
        networks = {self.recipe.task: self.classifier} | ({} if self.ema is None else {"ema": self.ema})
        subject = dataclasses.replace(self.subject, network=SideBySide(networks.values()))
        logit_NX, label_N = self.val_outputs(subject, "start anew with a lower optimizer.base_lr in another run.dir")
        top = [logit_NC.topk(min(TOP, len(self.classes))).indices for logit_NC in logit_NX.chunk(len(networks), 1)]
        return self.gathered(dict(zip(networks, top, strict=True)), label_N)

    def opening(self) -> list[str]:
        return [
            f"network   {self.weights.origin}, all of it trained, images of {self.subject.image_size}",
            self.data_line(),
            f"schedule  {self.epochs_in_words}, peak lr {self.schedule.peak_lr:g}",
        ]

    def memory(self) -> list[str]:
        return memory_in_words(self.recipe, self.world, self.step_gib)

    def step_gib(self, recipe: Finetune, gpus: int) -> float:
        """What a step takes of each of so many GPUs, counted. Raises UserError as `make_classifiers` does."""
        networks = make_classifiers(recipe, self.weights, len(self.classes))
        return memory_of_finetuning(recipe, *networks, self.subject.image_size, gpus).gib

    def state(self) -> RunState:
        # By its words engine.weights opens the run.
        about = dataclasses.replace(self.weights.known(), finetuned=dump(self.recipe))
        return dataclasses.replace(super().state(), about=about.to_json())

    def finish(self, directory: Path) -> list[str]:
        """Export trunk and classifier, and their moving averages, as folders that timm loads, where it can."""
        lines = []
        with agreement(self.world.host_group):
            if self.world.is_first:
                lines.append(self._leave(directory, "base", "model", "timm"))
                if self.ema is not None:
                    lines.append(self._leave(directory, "momentum", "ema", "timm_ema"))
        return lines

    def _leave(self, directory: Path, encoder: EncoderName, prefix: str, name: str) -> str:
        checkpoints, folder = directory / "checkpoints", directory / name
        checkpoint = checkpoints / read_pointer(checkpoints, "latest")
        names = [f"{prefix}.head.{part}" for part in ("weight", "bias")]
        weight, bias = (tensor for _, tensor in read_tensors(checkpoint, names))
        head = Head(weight, bias, self.classes, self.subject.interpolation, self.subject.crop_fraction)
        try:
            export_classifier(open_trunk(str(checkpoint), encoder), head, folder)
        except (UserError, RunFailed, OSError, RuntimeError) as error:  # another network, timm's words, a full disk
            return f"          no {folder} for timm: {one_line(error)}; the whole network is in the checkpoint"
        return f"          timm.create_model('local-dir:{folder}', pretrained=True) is all of the network"


class SideBySide(nn.ModuleList):
    """The logits of several classifiers for the same images, one after the other: [B, n * C]."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([network(images) for network in self], 1)


def exchanged(images_BCSS: Tensor, label_B: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Images and labels of the rank at the other end of the global batch, which gets this rank's."""
    other = world.size - 1 - world.rank
    mine = images_BCSS.contiguous(), label_B
    if other == world.rank:
        return mine
    theirs = torch.empty_like(mine[0]), torch.empty_like(mine[1])
    transfers = [
        dist.P2POp(way, tensor, group=world.group, group_peer=other, tag=tag)
        for way, tensors in ((dist.isend, mine), (dist.irecv, theirs))
        for tag, tensor in enumerate(tensors)
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return theirs
