"""Exports made in tests, of runs and checkpoints that are made for it."""

from functools import partial
from pathlib import Path

import torch

from engine.checkpoint.save import save
from engine.checkpoint.state import RunState
from engine.recipe.identity import fingerprint
from engine.recipe.load import dump, load
from engine.runs.pretrain import make_moco
from engine.weights.export import export
from engine.weights.opening import open_weights
from tests.weights.files import ROOT

TOLERANCE = 1e-5


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return ((one - other).abs().max() / other.abs().max()).item() <= TOLERANCE


def export_here(checkpoint: Path, out: Path, name: str, **options) -> dict:
    return export(partial(open_weights, str(checkpoint)), out, name, **options)


def fresh_checkpoint(folder: Path, *overrides: str) -> Path:
    """A run at step 0, with random weights and BatchNorm statistics that are not those of a fresh network."""
    recipe = load(ROOT / "recipes" / "quickstart.yaml", [f"run.dir={folder}", *overrides])
    torch.manual_seed(0)
    tensors = {f"model.{name}": value for name, value in make_moco(recipe).initial_values(0)}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and name.endswith("weight"):  # zero where a fresh network's blocks do nothing
            tensor += 0.5
        if name.endswith(("running_mean", "running_var")):
            tensor += 0.1 * torch.rand(tensor.shape)
    state = RunState(0, dump(recipe), images={})
    save(folder / "checkpoints", tensors, state, recipe_sha256=fingerprint(recipe))
    return folder


NO_SHAPE = ["model.patch_size=null", "model.dim=null", "model.depth=null", "model.heads=null"]
