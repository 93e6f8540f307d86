"""What `auto` in a recipe stands for on the machine that runs it, and what suits one without a GPU."""

from dataclasses import replace

import torch

from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.state import RunState
from engine.distributed.agreement import agreement, all_gather, broadcast
from engine.distributed.launcher import cores, local_ranks, own_cores, spare_cores
from engine.distributed.world import World
from engine.errors import UserError
from engine.recipe.identity import flatten
from engine.recipe.keys import show
from engine.recipe.load import AnyRecipe, loads
from engine.recipe.sections import Linear, Parallel, Precision, Recipe
from engine.runs.directory import checkpoints_of
from engine.training.parallelize import has_c_compiler

AUTO = "auto"
KEYS = ("data.workers", "parallel.compile", "parallel.precision")  # that may be auto


def settled(recipe: AnyRecipe, world: World, *, of_run: bool = True) -> AnyRecipe:
    """The recipe with a value in the place of each `auto`. All ranks call it together; workers alone may differ.

    of_run: where the recipe's run has begun, it keeps its precision.
    """
    sections = {}
    if recipe.data.workers == AUTO:
        sections["data"] = replace(recipe.data, workers=_workers(world))
    if not isinstance(recipe, Linear) and AUTO in (recipe.parallel.compile, recipe.parallel.precision):
        kept = _precision_of(recipe, world) if of_run else None
        sections["parallel"] = _settled(recipe.parallel, kept, world)
    return replace(recipe, **sections)


def _settled(parallel: Parallel, kept: Precision | None, world: World) -> Parallel:
    on_gpu = world.device.type == "cuda"
    own = has_c_compiler(), on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    compiles, has_bf16 = (all(each) for each in zip(*all_gather(own, world.host_group), strict=True))
    if parallel.compile == AUTO:  # on a CPU small runs end sooner without
        parallel = replace(parallel, compile=on_gpu and compiles)
    if parallel.precision == AUTO:
        parallel = replace(parallel, precision=kept or ("bf16" if has_bf16 else "float32"))
    return parallel


def _workers(world: World) -> int:
    # Without a GPU the network itself wants the cores: decoding is a small part of the work.
    return spare_cores() if world.device.type == "cuda" else min(spare_cores(), max(1, own_cores() // 4))


def _precision_of(recipe: Recipe, world: World) -> Precision | None:
    """In which the run of the recipe's directory goes on; None where there is none, or it says nothing."""
    kept = None
    with agreement(world.host_group):
        for folder in checkpoints_of(recipe) if world.is_first else ():
            try:
                kept = _recorded(RunState.read(folder, read_manifest(folder)), type(recipe))
            except UserError:  # damaged: the run will go on from an earlier one
                continue
            break
    return broadcast(kept, world.host_group)


def _recorded(state: RunState, kind: type[Recipe]) -> Precision | None:
    said = loads(state.recipe, "recipe of the run", kind=kind).parallel.precision
    return state.made_by.get("precision") if said == AUTO else said


# ---- words -----------------------------------------------------------------------------------------------------------


def taken(written: Recipe, settled: Recipe) -> dict[str, str]:
    """{name: value} of what stands in the place of each `auto` on this rank."""
    before, after = flatten(written), flatten(settled)
    return {key.partition(".")[2]: show(after[key]) for key in KEYS if before.get(key) == AUTO}


def on_this_machine(written: Recipe, settled: Recipe, world: World) -> list[str]:
    """Lines of a run that begins: what was taken for `auto`, and what suits a machine without a GPU better."""
    found = ", ".join(f"{name} {value}" for name, value in taken(written, settled).items())
    lines = [f"auto      {found}"] if found else []
    if world.device.type == "cuda":
        return lines
    values = flatten(settled)
    slow = [f"{key}=auto" for key in KEYS if _is_slow(key, values.get(key))]
    if slow:
        lines.append(f"cpu       there is no GPU, for which this recipe is meant: pass {' '.join(slow)}")
    if local_ranks() > cores():
        lines.append(f"cpu       {local_ranks()} ranks share {cores()} cores and take turns: start fewer")
    return lines


def _is_slow(key: str, value: object) -> bool:
    """Whether a value is none for a CPU."""
    return value > own_cores() if key == "data.workers" else value in (True, "bf16")
