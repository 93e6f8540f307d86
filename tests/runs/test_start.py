"""Initial weights are drawn once where a run begins, and where it goes on not at all."""

import pytest
import torch
from torch import nn

from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.runs.pretrain import build_state, make_moco, make_schedule, pretrain
from engine.training.parallelize import local
from models import initial
from tests.distributed.trajectories import KINDS, RECIPE, SMALL
from tests.machine import trajectory
from tests.runs.small import finetune_recipe, run_finetune

EVA = ["model.name=timm/eva02_tiny_patch14_224", "model.image_size=28", "model.freeze_patch_projection=false"]
EVA += [f"model.{key}=null" for key in ("patch_size", "dim", "depth", "heads")]


@torch.no_grad()
def spoil(network: nn.Module) -> None:
    for tensor in (*network.parameters(), *network.buffers()):
        local(tensor).fill_(torch.nan if tensor.is_floating_point() else -1)


@pytest.fixture
def spoiled(monkeypatch):
    """Memory that nobody has filled yet holds what no network can compute with."""
    to_empty = nn.Module.to_empty

    def spoilt(network: nn.Module, **options) -> nn.Module:
        spoil(to_empty(network, **options))
        return network

    monkeypatch.setattr(nn.Module, "to_empty", spoilt)


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Names of parameters, as they are drawn."""
    names, draw = [], initial.generator_for
    monkeypatch.setattr(initial, "generator_for", lambda seed, name: names.append(name) or draw(seed, name))
    return names


@pytest.mark.parametrize("kind", ["vit", "vit_conv"])
def test_weights_are_drawn_once_and_no_more_on_a_resume(tmp_path, spoiled, drawn, kind):
    def train(name: str, steps: int) -> None:
        values = [*SMALL, *KINDS[kind], "data.workers=0", f"run.dir={tmp_path / name}", f"train.max_steps={steps}"]
        with process_group() as world:
            pretrain(load(RECIPE, values), RECIPE, world)

    train("unbroken", 4)
    assert len(drawn) > 10
    assert len(set(drawn)) == len(drawn)
    train("halves", 2)
    drawn.clear()
    train("halves", 4)
    assert not drawn
    assert trajectory(tmp_path / "halves") == trajectory(tmp_path / "unbroken")


def test_a_classifier_goes_on_from_its_checkpoint_alone(tmp_path, spoiled):
    for name, steps in (("unbroken", 4), ("halves", 2), ("halves", 4)):
        run_finetune(finetune_recipe(tmp_path / name, f"train.max_steps={steps}", "train.ema_decay=0.9"))
    whole, halves = ([row for row in trajectory(tmp_path / name) if "loss" in row] for name in ("unbroken", "halves"))
    assert whole == halves
    assert len(whole) == 4


def test_what_no_checkpoint_holds_is_there_on_a_resume(spoiled):
    """Tables and masks that a network of timm makes: of both encoders, and all else is left to be loaded."""
    recipe = load(RECIPE, [*SMALL, *EVA])
    with process_group() as world:
        moco = make_moco(recipe)
        state = build_state(recipe, moco, world, make_schedule(recipe, 7), resumes=True)
        buffers = {n: b for n, b in moco.named_buffers() if f"model.{n}" not in state.saved}
        assert {name.partition(".")[0] for name in buffers} == {"base", "momentum"}
        assert all(buffer.isfinite().all() for buffer in buffers.values())
        assert all(local(tensor).isnan().all() for tensor in state.saved.values() if tensor.is_floating_point())
