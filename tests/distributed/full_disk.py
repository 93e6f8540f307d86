"""Runs in one launch whose disk is full for a while on some ranks, or whose folder is deleted; prints how each ended.

Takes one JSON list of {"dir", "full", "ranks", "overrides"}: before the first and after the last step of `full` the
system lets these ranks make no file longer than metrics.jsonl is, and five bytes. {"gone": step} deletes the folder.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from engine.checkpoint.background import THREAD
from engine.distributed.world import World, process_group
from engine.errors import RunFailed, UserError
from engine.recipe.load import load
from engine.runs.pretrain import Pretraining, pretrain
from tests.distributed.trajectories import KINDS, RECIPE, SMALL

FREE = resource.getrlimit(resource.RLIMIT_FSIZE)[1]


def speak_through_pipes() -> None:
    """What this process says may lie in files, and no limit shall hold it back."""
    for number in (1, 2):
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=number)
        os.dup2(writer.stdin.fileno(), number)


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, FREE))


def meet(run: dict, step: int, rank: int) -> None:
    """What befalls the run before a step."""
    first, last = run.get("full", (0, 0))
    if step in (first, last + 1, run.get("gone")):
        for thread in threading.enumerate():  # a save before or after the change, not in the middle of it
            if thread.name == THREAD:
                thread.join()
    if step == first and rank in run["ranks"]:
        limit((Path(run["dir"]) / "metrics.jsonl").stat().st_size + 5)
    if step == last + 1:
        limit(FREE)
    if step == run.get("gone") and rank == 0:
        shutil.rmtree(run["dir"])


def train(run: dict, world: World) -> str:
    step = Pretraining.train_step
    Pretraining.train_step = lambda self, batch: meet(run, self.step + 1, world.rank) or step(self, batch)
    values = [*SMALL, *KINDS["vit"], "data.workers=0", "checkpoint.every_steps=2", f"run.dir={run['dir']}"]
    try:
        pretrain(load(RECIPE, [*values, *run["overrides"]]), RECIPE, world)
    except (RunFailed, UserError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Pretraining.train_step = step
        limit(FREE)
    return "done"


def main(runs: str) -> None:
    speak_through_pipes()
    with process_group() as world:
        ends = {Path(run["dir"]).name: train(run, world) for run in json.loads(runs)}
        everywhere = os.environ.get("RANK") == "0"
        if everywhere:
            print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
