"""Starts and stops of one run in one process; after the second and the last, prints what it holds.

Takes the run's folder and the number of starts.
"""

import gc
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from engine.distributed.world import process_group
from engine.errors import Interrupted
from engine.recipe.load import load
from engine.runs.pretrain import Pretraining, pretrain
from tests.distributed.trajectories import KINDS, RECIPE, SMALL


def held() -> dict:
    """Python's threads by name, and how many threads and descriptors the system counts."""
    gc.collect()  # as it happens now and then anyway
    counts = {name: len([*Path("/proc/self", name).iterdir()]) for name in ("task", "fd")}
    threads = sorted(thread.name for thread in threading.enumerate())
    return counts | {"threads": threads}


def stop_in_its_second_step(self: Pretraining, batch: object, step=Pretraining.train_step) -> object:
    self.steps = getattr(self, "steps", 0) + 1
    if self.steps == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch)


def main(folder: str, starts: str) -> None:
    Pretraining.train_step = stop_in_its_second_step
    values = [
        *SMALL,
        *KINDS["vit"],
        "data.workers=1",
        "train.epochs=99",
        "train.max_steps=400",
        f"run.dir={folder}/run",
    ]
    for cycle in range(int(starts)):
        with process_group() as world, suppress(Interrupted):
            pretrain(load(RECIPE, [*values, f"run.dir={folder}/run"]), RECIPE, world)
            raise AssertionError("it was not stopped")
        if cycle >= 1:
            print(json.dumps(held()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
