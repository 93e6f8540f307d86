"""How long a save keeps a run from training."""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from engine.benchmarks.clock import median, timed
from engine.benchmarks.step import Subject, as_a_run
from engine.checkpoint.background import Saver
from engine.checkpoint.layout import step_name
from engine.checkpoint.state import RunState
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.world import World
from engine.recipe.identity import fingerprint
from engine.recipe.load import dump
from engine.recipe.sections import Pretrain
from engine.runs.auto import settled

STEPS = {"cuda": 10, "cpu": 3}  # before anything counts, and then again


def measure_checkpoint(recipe: Pretrain, world: World) -> dict[str, Any]:
    """Save the state of a run of the recipe, after a few steps on made-up images, as a run saves it.

    stall_seconds: how long training stands still for a save that is not the first. The folder is a temporary one
    ($TMPDIR says on which disk, which all nodes must see) and is gone afterwards.

    All ranks call it together. Raises UserError where the network cannot be, RunFailed where the folder cannot be
    written.
    """
    steps = STEPS[world.device.type]
    recipe = settled(recipe, world, of_run=False)
    with as_a_run(recipe, world):
        subject = Subject(recipe, world, 2 * steps)
        subject.run(steps)
        step_seconds = median([timed(partial(subject.run, 1), world.device) for _ in range(steps)]).wall
    with ExitStack() as held:
        folder = None
        with agreement(world.host_group):
            if world.is_first:
                folder = held.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        checkpoints = Path(broadcast(folder, world.host_group))
        beside = recipe.checkpoint.asynchronous
        saver = Saver(checkpoints, fingerprint(recipe), world.save_group, beside=beside)
        for step in (1, 2):  # the first also plans, and asks for memory
            state = RunState(step, dump(recipe), images={}, made_by=world.made_by())
            stall_seconds = timed(partial(saver.start, subject.state.tensors(), state), world.device).wall
            saver.wait()
        # Rank 0 alone looks: it removes the folder as soon as it has.
        files = [*(checkpoints / step_name(2)).iterdir()] if world.is_first else []
        gigabytes = broadcast(sum(file.stat().st_size for file in files) / 1e9, world.host_group)
    return {"stall_seconds": stall_seconds, "step_seconds": step_seconds, "gigabytes": gigabytes}
