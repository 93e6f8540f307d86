"""Whether a step fits the GPUs, in words, before there is a weight; what is counted: engine.training.memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar, get_args

import torch

from engine.distributed.world import World
from engine.errors import UserError, one_line
from engine.recipe.load import check_world, largest_micro_batch
from engine.recipe.sections import ActivationCheckpoint, Finetune, Pretrain
from engine.training.memory import GIB

ROOM = 0.9  # of a GPU: the rest is for what is not counted
PLANNED = (1, 8, 64)  # GPUs of a run that is not started, until a number leaves little to do for more of them
LITTLE = 8.0  # GiB

R = TypeVar("R", Pretrain, Finetune)
# GiB of a recipe's step on each of so many GPUs. Raises UserError where such a step cannot be.
Count = Callable[[R, int], float]


def memory_in_words(recipe: R, world: World, count: Count[R]) -> list[str]:
    """A line of a run that begins on GPUs: what a step takes of each, and where that is too much, with what it fits."""
    if world.device.type != "cuda" or not world.is_first:
        return []
    has = torch.cuda.get_device_properties(world.device).total_memory / GIB
    return _or_why_not(lambda: _beside(has, recipe, world.size, count))


def memory_planned(recipe: Pretrain, ranks: int, count: Count[Pretrain]) -> list[str]:
    """A line of a run that is not started: what a step takes of each GPU, of `ranks` where these are several.

    recipe: as it is written; what it leaves to the machine is taken for a GPU.
    """
    parallel = recipe.parallel
    compile = True if parallel.compile == "auto" else parallel.compile
    precision = "bf16" if parallel.precision == "auto" else parallel.precision
    on_gpus = replace(recipe, parallel=replace(parallel, compile=compile, precision=precision))
    return _or_why_not(lambda: _by_gpus(on_gpus, (ranks,) if ranks > 1 else PLANNED, count))


def _or_why_not(line: Callable[[], str]) -> list[str]:
    try:
        return [line()]
    except Exception as error:  # networks of timm may do what nobody can follow without data, and train all the same
        return [f"memory    not counted: {one_line(error)}"]


def _beside(has: float, recipe: R, ranks: int, count: Count[R]) -> str:
    takes = count(recipe, ranks)
    if takes <= ROOM * has:
        return f"memory    {_words(takes)} of this GPU's {_words(has)}, counted"
    ladders = _checkpoints(recipe, ranks), _micro_batches(recipe, ranks), _processes(recipe, ranks)
    fitting = [_first_that_fits(ladder, ROOM * has, count) for ladder in ladders]
    do = " or ".join(filter(None, fitting)) or "take larger GPUs"
    room = f"room for {_words(ROOM * has)} of its {_words(has)}"
    return f"warning   a step takes {_words(takes)}, counted, and this GPU has {room}: {do}"


def _by_gpus(recipe: Pretrain, numbers: Iterable[int], count: Count[Pretrain]) -> str:
    found = []
    for gpus in numbers:
        if not _divide(gpus, recipe):
            continue
        takes = count(recipe, gpus)
        found.append(f"{_words(takes)} on {gpus}")
        if takes <= LITTLE:
            break
    return f"memory    of each GPU, counted: {', '.join(found)}"


# ---- with what a step stays what it is, from the cheapest on: (in words, recipe, ranks)


def _checkpoints(recipe: R, ranks: int) -> Iterator[tuple[str, R, int]]:
    modes, parallel = get_args(ActivationCheckpoint), recipe.parallel
    for mode in modes[modes.index(parallel.activation_checkpoint) + 1 :]:
        less = replace(parallel, activation_checkpoint=mode)
        yield f"pass parallel.activation_checkpoint={mode}", replace(recipe, parallel=less), ranks


def _micro_batches(recipe: R, ranks: int) -> Iterator[tuple[str, R, int]]:
    if not isinstance(recipe, Pretrain):
        return
    batch = recipe.train.global_batch_size // ranks
    size = recipe.train.micro_batch_size or batch
    while size := largest_micro_batch(size // 2, batch):
        less = replace(recipe.train, micro_batch_size=size)
        yield f"pass train.micro_batch_size={size}", replace(recipe, train=less), ranks


def _processes(recipe: R, ranks: int) -> Iterator[tuple[str, R, int]]:
    whole = recipe
    if isinstance(recipe, Pretrain):
        whole = replace(recipe, train=replace(recipe.train, micro_batch_size=None))
    for more in range(2 * ranks, recipe.train.global_batch_size + 1, ranks):
        if _divide(more, recipe):
            yield f"start {more} processes", recipe, more
        elif _divide(more, whole):  # fewer images than a micro-batch has now
            yield f"start {more} processes and pass train.micro_batch_size=null", whole, more


def _first_that_fits(ladder: Iterator[tuple[str, R, int]], room: float, count: Count[R]) -> str | None:
    for words, recipe, ranks in ladder:
        try:
            takes = count(recipe, ranks)
        except UserError:  # the network refuses this way, and would refuse to go further along it
            return None
        if takes <= room:
            return f"{words} ({_words(takes)})"
    return None


def _divide(gpus: int, recipe: R) -> bool:
    try:
        check_world(recipe, gpus)
    except UserError:
        return False
    return True


def _words(gib: float) -> str:
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"
