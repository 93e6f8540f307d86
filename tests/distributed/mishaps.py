"""Small runs in one launch of two ranks, each with a mishap of its own; prints how each ended, as one JSON object.

Takes the folder for the runs.
"""

import errno
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.checkpoint.background import THREAD
from engine.checkpoint.layout import read_pointer
from engine.distributed.world import World, process_group
from engine.errors import RunFailed, UserError
from engine.recipe.load import load
from engine.runs.pretrain import Pretraining, pretrain
from tests.distributed.trajectories import KINDS, RECIPE, SMALL

BAD_STEP = 5
FLIPPED = ("MANIFEST.json", ".metadata", "__0_0.distcp", "__1_0.distcp")
HOUR = 3600.0
clock, images, train_step = time.time, Pretraining.images, Pretraining.train_step


class Refusal(NamedTuple):
    """What the system refuses below a folder, and with which error."""

    folder: str
    error: int
    refuses: Callable[[str, tuple], bool]


refusals: list[Refusal] = []


def creates(event: str, arguments: tuple) -> bool:
    return event == "os.mkdir" or (
        event == "open" and bool(arguments[2] & os.O_CREAT) and not os.path.exists(arguments[0])  # noqa: PTH110
    )


def changes(event: str, arguments: tuple) -> bool:
    writing = os.O_CREAT | os.O_WRONLY | os.O_RDWR
    return event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
        event == "open" and bool(arguments[2] & writing)
    )


KINDS_OF_REFUSAL = {"no_inodes": (errno.ENOSPC, creates), "read_only": (errno.EROFS, changes)}


def refuse(event: str, arguments: tuple) -> None:
    """Python asks here before each call of the system."""
    for folder, error, refuses in refusals:
        path = arguments[0] if arguments and isinstance(arguments[0], str | Path) else ""
        if str(path).startswith(folder) and refuses(event, arguments):
            raise OSError(error, os.strerror(error), str(path))


# ---- what befalls a run before a step --------------------------------------------------------------------------------


def refuse_for_a_while(kind: str, folder: Path) -> Callable[[int], None]:
    """Two saves fail, the next makes up for them."""

    def meet(step: int) -> None:
        if step in (6, 9):
            for thread in threading.enumerate():  # a save before or after the change, not in the middle of it
                if thread.name == THREAD:
                    thread.join()
        if step == 6:
            refusals.append(Refusal(str(folder), *KINDS_OF_REFUSAL[kind]))
        if step == 9:
            refusals.clear()

    return meet


def set_clock_back(step: int) -> None:
    time.time = lambda: clock() - HOUR * step


def spoil(*ranks: int) -> None:
    """The images of one step are not finite on some ranks."""

    def spoilt(self: Pretraining, batch: object) -> torch.Tensor:
        made = images(self, batch)
        return made * torch.nan if self.step + 1 == BAD_STEP and self.world.rank in ranks else made

    Pretraining.images = spoilt


def train(folder: Path, world: World, *overrides: str, meet: Callable[[int], None] = lambda _: None) -> str:
    Pretraining.train_step = lambda self, batch: meet(self.step + 1) or train_step(self, batch)
    values = [*SMALL, *KINDS["vit"], "data.workers=0", "checkpoint.every_steps=2", f"run.dir={folder}"]
    try:
        pretrain(load(RECIPE, [*values, "train.max_steps=12", *overrides]), RECIPE, world)
    except (RunFailed, UserError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Pretraining.train_step, Pretraining.images, time.time = train_step, images, clock
        refusals.clear()
    return "done"


# ---- the runs --------------------------------------------------------------------------------------------------------


def flip_a_byte(folder: Path, name: str) -> None:
    file = folder / "checkpoints" / (read_pointer(folder / "checkpoints", "latest") or "") / name
    content, draw = bytearray(file.read_bytes()), random.Random(name)
    content[draw.randrange(len(content) - 1)] ^= 1 << draw.randrange(7)
    file.write_bytes(content)


def flipped(folder: Path, world: World) -> str:
    """Each time of the newest checkpoint: the next start goes on from the one before."""
    ends = []
    for last, name in zip((6, 8, 10, 12), FLIPPED, strict=True):
        ends.append(train(folder, world, f"train.max_steps={last}"))
        dist.barrier(world.host_group)
        if world.is_first:
            flip_a_byte(folder, name)
        dist.barrier(world.host_group)
    return " ".join([*ends, train(folder, world)])


def all_of_them(out: Path, world: World) -> dict[str, str]:
    ends = {"whole": train(out / "whole", world), "flipped": flipped(out / "flipped", world)}
    for kind in KINDS_OF_REFUSAL:
        ends[kind] = train(out / kind, world, meet=refuse_for_a_while(kind, out / kind))
        refusals.append(Refusal(str(out / "never"), *KINDS_OF_REFUSAL[kind]))
        ends[f"{kind} at the start"] = train(out / "never", world)
    ends["clock"] = train(out / "clock", world, "train.max_steps=7", meet=set_clock_back)
    set_clock_back(100)
    ends["clock, resumed"] = train(out / "clock", world, meet=set_clock_back)
    for name, ranks in {"bad rank": (1,), "bad ranks": (0, 1)}.items():
        spoil(*ranks)
        ends[name] = train(out / name, world)
    return ends


if __name__ == "__main__":
    sys.addaudithook(refuse)
    with process_group() as launched:
        found = all_of_them(Path(sys.argv[1]), launched)
        if launched.is_first:
            print(json.dumps(found), flush=True)
