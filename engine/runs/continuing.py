"""`run.continue_from`: a new run begins with another run's encoders, heads and optimizer state."""

from pathlib import Path

from engine.checkpoint.load import read_state
from engine.checkpoint.manifest import Manifest
from engine.checkpoint.state import RunState
from engine.data.order import PERMUTED
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.world import World
from engine.errors import UserError, one_line
from engine.logger import say
from engine.recipe.keys import show
from engine.recipe.load import loads, locate, task_of
from engine.recipe.sections import Pretrain
from engine.weights.opening import checkpoint_folder
from engine.weights.weights import declared

BOUND = ("projector_hidden_dim", "output_dim", "freeze_patch_projection")  # of the model, beside its trunk


def find_source(recipe: Pretrain, recipe_file: Path, world: World) -> tuple[Path, Manifest, RunState]:
    """The checkpoint that `run.continue_from` means. All ranks call it together.

    Raises:
        UserError: on every rank, where there is none, or of another task, network or optimizer.
    """
    named, folder = recipe.run.continue_from or "", None
    with agreement(world.host_group):
        if world.is_first:
            folder = _folder(named, locate(named, recipe_file, "run.continue_from"))
    folder = broadcast(folder, world.host_group)  # a run that goes on names a newer one every few minutes
    manifest, state = read_state(folder, world.host_group)
    with agreement(world.host_group):
        _check_fits(named, manifest, state, recipe)
    say(f"continues {folder} of step {state.step:,}, with its optimizer state, at step 0 of this run's schedule")
    if loads(state.recipe, f"recipe of {folder}").run.seed == recipe.run.seed:
        again = "order of images and augmentations" if state.order == PERMUTED else "augmentations"
        say(f"seed      {recipe.run.seed}, as in that run: the same {again} again; run.seed=N draws others")
    return folder, manifest, state


def _folder(named: str, path: Path) -> Path:
    found = checkpoint_folder(path) if path.exists() else None
    if found is None:
        raise UserError(
            f"run.continue_from ({one_line(named)}) must be a run with a checkpoint or a checkpoint itself; for "
            "other weights there is `mocov3 import`"
        )
    return found


def _check_fits(named: str, manifest: Manifest, state: RunState, recipe: Pretrain) -> None:
    """Raises UserError where the run cannot begin with what the checkpoint holds."""
    must = f"run.continue_from ({one_line(named)}) must be a pre-training run of the same network and optimizer"
    task = task_of(state.recipe)
    if task != recipe.task:
        raise UserError(f"{must}, and this one is of task {task}; pass another")
    try:
        source = loads(state.recipe, f"recipe of run.continue_from ({one_line(named)})")
    except UserError as error:  # which names keys as if they were this recipe's
        raise UserError(f"{must}, in words that this version knows; in its recipe {error}") from error
    differences = _differences(source, recipe)
    if differences:
        raise UserError(f"{must}: {', '.join(differences)}; pass those, or `mocov3 import` its weights")
    precision = recipe.parallel.precision
    if manifest.is_float64 != (precision == "float64"):
        kept = "float64" if manifest.is_float64 else "bf16 or float32"
        raise UserError(f"parallel.precision ({precision}) must be {kept}, in which run.continue_from has its weights")


def _differences(source: Pretrain, recipe: Pretrain) -> list[str]:
    """In words, what decides which tensors there are and is not alike."""
    theirs, ours = declared(source.model), declared(recipe.model)
    found = [theirs.differs_from(ours) or "its images have another size"] if theirs != ours else []
    pairs = [(f"model.{key}", getattr(source.model, key), getattr(recipe.model, key)) for key in BOUND]
    pairs.append(("optimizer.name", source.optimizer.name, recipe.optimizer.name))
    return found + [f"its {key} is {show(there)}, not {show(here)}" for key, there, here in pairs if there != here]
