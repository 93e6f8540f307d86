"""The train step of a recipe on made-up images: its speed, its parts, and the same work as the published code does it.

Everything is as a run puts it together; the uint8 crops alone are noise, and lie on the device from the start. A step
here is augmentation and `train_step`. Both sides of a comparison augment the same crops in the engine's way, since the
published code augments on the CPU, beside its step: they differ in the rest alone.

Shapes: V = 2 views, B images of this rank, S side of a view.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from engine.benchmarks.clock import alternate, finish, forget_peak, median, peak_memory_gb
from engine.benchmarks.parts import AUGMENTATION, WHOLE, Parts
from engine.benchmarks.reference import Reference
from engine.benchmarks.work import peak_flops, useful_flop
from engine.distributed.agreement import agreement
from engine.distributed.world import World
from engine.errors import RunFailed, UserError
from engine.recipe.sections import Pretrain
from engine.runs.auto import settled
from engine.runs.failures import full_device
from engine.runs.pretrain import build_state, make_augment, make_moco, make_schedule
from engine.runs.trial import deterministic_as_asked
from engine.torch_internals import graph_breaks, graphs_compiled
from engine.training.activation_checkpoint import stronger
from engine.training.micro_batch import MicroBatches
from engine.training.parallelize import check_compiler
from engine.training.step import train_step
from engine.weights.weights import declared
from models.norm import has_batch_norm

PROFILED = 3  # steps


class Plan(NamedTuple):
    """In steps: before anything counts; between two looks at the clock; and while parts are timed. Rounds: A B B A."""

    warmup: int
    block: int
    rounds: int
    parts: int

    @property
    def counted(self) -> int:
        return 2 * self.rounds * self.block

    @property
    def total(self) -> int:
        return self.warmup + self.counted + self.parts + PROFILED


PLANS = {"cuda": Plan(warmup=50, block=5, rounds=4, parts=10), "cpu": Plan(warmup=3, block=1, rounds=3, parts=3)}


class Subject:
    """The recipe's networks, augmentation and optimizer on this rank, and crops to train on.

    An epoch of the schedule ends halfway, so that the counted steps meet what changes then.

    Args:
        steps: how many will be made; the schedules span more.
    """

    def __init__(self, recipe: Pretrain, world: World, steps: int):
        with agreement(world.host_group):
            moco = make_moco(recipe)
            check_compiler(recipe.parallel, world.device)
        self.schedule = make_schedule(recipe, -(-steps // min(recipe.train.epochs, 2)))
        self.augment, self.state = make_augment(recipe), build_state(recipe, moco, world, self.schedule)
        self.device, B, S = world.device, recipe.train.global_batch_size // world.size, recipe.model.image_size
        generator = torch.Generator(self.device).manual_seed(recipe.run.seed)
        shape, options = (moco.views, B, 3, S, S), {"generator": generator, "device": self.device}
        self.crops_VBCSS = torch.randint(256, shape, dtype=torch.uint8, **options)
        self.micro_batch = recipe.train.micro_batch_size
        self.sample_B = torch.arange(B, device=self.device) + world.rank * B
        self.compiled = self.breaks = 0  # graphs, and breaks of graphs, in this side's steps

    def images(self, step: int, rows: slice = slice(None)) -> Tensor:
        """Views of the step's images, or of some of them."""
        epoch = torch.full((), step // self.schedule.steps_per_epoch, device=self.device)
        return self.augment(self.crops_VBCSS[:, rows].contiguous(), self.sample_B[rows], epoch)

    def step(self) -> None:
        now, batch = self.state.update.step, len(self.sample_B)
        if self.micro_batch in (None, batch):
            train_step(self.state, self.images(now))
        else:
            train_step(self.state, MicroBatches(partial(self.images, now), batch, self.micro_batch))

    def run(self, steps: int) -> None:
        compiled, breaks = graphs_compiled(), graph_breaks()
        for _ in range(steps):
            self.step()
        self.compiled += graphs_compiled() - compiled
        self.breaks += graph_breaks() - breaks


def measure_step(recipe: Pretrain, world: World, versus: str, trace: Path | None) -> dict[str, Any]:
    """What `engine.bench step` reports. All ranks call it together.

    Args:
        versus: none, reference or reference+ (engine.benchmarks.reference).
        trace: where a profile of a few steps goes, for Perfetto.

    Raises:
        UserError: the recipe's network cannot be; a reference has no ranks; the profile cannot be written.
        RunFailed: the device has no memory left.
    """
    recipe = settled(recipe, world, of_run=False)
    with as_a_run(recipe, world):
        return _measure_step(recipe, world, versus, trace)


@contextmanager
def as_a_run(recipe: Pretrain, world: World) -> Iterator[None]:
    """Within it steps are as deterministic as in a run of the recipe, after the same trial. Raises RunFailed where the
    device has no memory left."""
    model = recipe.model
    with agreement(world.host_group):
        trunk = make_moco(recipe).base.trunk  # says what cannot be
        build = partial(declared(model).build, freeze_patch_projection=model.freeze_patch_projection)
    try:
        with deterministic_as_asked(recipe.parallel, lambda: build().module, model.image_size, world):
            yield
    except RuntimeError as error:
        if (full := full_device(error)) is None:
            raise
        words = f"{world.device_name} had no memory left {full}; pass {_less_memory(recipe, trunk)}"
        raise RunFailed(words, alone=True) from error


def _less_memory(recipe: Pretrain, trunk: nn.Module) -> str:
    """What makes a step of this trunk take less memory."""
    ways = ["a smaller --batch"]
    if not has_batch_norm(trunk):
        ways.append("train.micro_batch_size=N")
    if mode := stronger(recipe.parallel.activation_checkpoint, trunk):
        ways.append(f"parallel.activation_checkpoint={mode}")
    return " or ".join(ways)


def _measure_step(recipe: Pretrain, world: World, versus: str, trace: Path | None) -> dict[str, Any]:
    if versus != "none" and world.size > 1:
        raise UserError(f"--vs ({versus}) must be none with several processes: the reference has one; start one")
    plan = PLANS[world.device.type]
    subject = Subject(recipe, world, plan.total)
    forget_peak(world.device)
    subject.run(plan.warmup)
    finish(world.device)
    memory, warm = peak_memory_gb(world.device), subject.compiled  # before a reference takes any

    other = None if versus == "none" else _reference(recipe, subject, improved=versus == "reference+")
    if other is not None:
        other(plan.warmup)
        other = partial(other, plan.block)
    ours, theirs = map(_median, alternate(partial(subject.run, plan.block), other, plan.rounds, world.device))
    recompiles = subject.compiled - warm
    parts = _measure_parts(subject, plan.parts)
    if trace is not None:
        _profile(subject, trace if world.is_first else None)
    speed = recipe.train.global_batch_size * plan.block / ours.wall
    return {
        "images_per_second": speed,
        "ratio": theirs and theirs.busy / ours.busy,
        "mfu": _mfu(recipe, world, speed),
        "peak_memory_gb": memory,
        "graph_breaks": subject.breaks,
        "recompiles": recompiles,
        "device": world.device_name,
        "steps": plan.counted,
        "parts": parts,
    }


def _median(seconds: list) -> Any:
    return median(seconds) if seconds else None


def _reference(recipe: Pretrain, subject: Subject, *, improved: bool) -> Callable[[int], None]:
    moco, schedule, device = subject.state.moco, subject.schedule, subject.device
    reference = Reference(recipe, declared(recipe.model), moco, schedule, device, improved=improved)

    def run(steps: int) -> None:
        for _ in range(steps):
            reference.step(subject.images(reference.count))

    return run


def _mfu(recipe: Pretrain, world: World, images_per_second: float) -> float | None:
    """The share of the device's dense bf16 peak that useful work takes; None where the peak is not known."""
    peak = peak_flops(world.device_name)
    if peak is None:
        return None
    return useful_flop(declared(recipe.model), recipe.model.image_size) * images_per_second / world.size / peak


def _watched(subject: Subject, steps: int) -> Parts:
    """Steps whose parts are timed, and named in a profile."""
    parts, augment = Parts(subject.device), subject.augment
    subject.augment = parts.named(AUGMENTATION, augment)
    with parts.watching(subject.state):
        for _ in range(steps):
            parts.named(WHOLE, subject.step)()
            parts.end_step()
    subject.augment = augment
    return parts


def _measure_parts(subject: Subject, steps: int) -> dict[str, float]:
    """Milliseconds of a step's parts, in steps of their own: to look costs time."""
    return _watched(subject, steps).medians()


def _profile(subject: Subject, trace: Path | None) -> None:
    on_gpu = [ProfilerActivity.CUDA] if subject.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        _watched(subject, PROFILED)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
