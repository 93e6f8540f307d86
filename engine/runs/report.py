"""What a run says to its user: what it found, what it derived from the recipe, how it went. Rank 0 speaks."""

import json
import sys
from collections.abc import Mapping
from math import log
from pathlib import Path

import torch

from engine.checkpoint.layout import read_pointer
from engine.data.splits import Splits
from engine.distributed.world import World
from engine.recipe.load import Pretrain
from engine.runs.trainer import Plan
from engine.training.schedule import Schedule


def opening(world: World, recipe: Pretrain, sources: Splits, schedule: Schedule, has_monitor: bool) -> None:
    """Every value that is derived from the recipe, the data and the launch."""
    if not world.is_first:
        return
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parallel, train = recipe.parallel, sources.train
    labels = "unlabelled" if train.labels is None else f"{len(train.classes)} classes"
    val = "no validation images" if sources.val is None else f"{len(sources.val):,} for validation"
    chance = 4 * recipe.moco.temperature * log(schedule.global_batch)
    print(
        f"ranks     {world.size} on {where}, {parallel.precision}, shard {parallel.shard}, compile {parallel.compile}"
    )
    print(f"data      {len(train):,} training images ({labels}), {val}")
    print(
        f"schedule  {recipe.train.epochs} epochs of {schedule.steps_per_epoch:,} steps: {schedule.total_steps:,} steps"
    )
    print(f"rates     peak lr {schedule.peak_lr:g}, encoder momentum from {schedule.momentum:g} to 1")
    print(f"loss      by chance {chance:.2f}: 4 T ln({schedule.global_batch})")
    needs = "it needs labelled validation images and at least 20 labelled training images"
    if recipe.evaluate.knn_every_epochs and not has_monitor:
        print(f"monitor   kNN is off: {needs}; watch `rankme` instead")
    if recipe.evaluate.online_probe and not has_monitor:
        print(f"probe     the online probe is off: {needs}")
    sys.stdout.flush()


def resumed(world: World, checkpoint: Path, step: int, plan: Plan) -> None:
    if world.is_first:
        done = ": the run is finished" if step >= plan.last_step else f" of {plan.last_step:,}"
        print(f"resumed   {checkpoint} at step {step:,}{done}", flush=True)


def fresh_probe(world: World, step: int) -> None:
    if world.is_first:
        print(f"probe     the online probe starts fresh at step {step:,}: the run had none until then", flush=True)


def no_monitor(world: World, step: int, reason: Exception) -> None:
    if world.is_first:
        print(f"warning: kNN after step {step} was left out: {reason}", file=sys.stderr)


def closing(world: World, recipe_file: Path, directory: Path, seconds: Mapping[str, float]) -> None:
    """Result, where the time went, where the files are, and what to do next."""
    if not world.is_first:
        return
    with (directory / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    newest = read_pointer(directory / "checkpoints", "latest")
    print(f"result    {_result(rows)}")
    print(f"time      {', '.join(f'{what} {spent:.0f} s' for what, spent in seconds.items())}")
    print(f"files     {directory}: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/{newest}/")
    print(f"next      tensorboard --logdir {directory}")
    print("          the same command with run.dir=..., data.source=folder and data.root=/path/to/your/images:")
    print(f"          {recipe_file} on your own")
    sys.stdout.flush()


def _result(rows: list[dict]) -> str:
    """The rows of metrics.jsonl in words; null stands there for a number that is not finite."""
    knn = [f"{row['knn_top1']:.1%}" for row in rows if "knn_top1" in row]
    probe = [f"{row['probe_top1']:.1%}" for row in rows if "probe_top1" in row]
    last = next((row for row in reversed(rows) if "loss" in row), None)
    if last is None:  # someone took the file away
        return "unknown: metrics.jsonl has no rows"
    nan = float("nan")
    loss, share, rankme = (nan if last[key] is None else last[key] for key in ("loss", "chance_share", "rankme"))
    numbers = f"loss {loss:.3f} ({share:.0%} of chance), rankme {rankme:.1f} at step {last['step']:,}"
    monitor = [f"kNN top-1 {knn[0]} -> {knn[-1]}"] if knn else []
    return ", ".join([*monitor, *[f"probe top-1 {newest}" for newest in probe[-1:]], numbers])
