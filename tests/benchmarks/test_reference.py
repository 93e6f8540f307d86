"""The reference of the benchmark does the work of the engine's step: the same losses, step after step."""

from pathlib import Path

import pytest
import torch

from engine.benchmarks.reference import Reference, plain_trunk
from engine.benchmarks.step import Subject
from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.training.step import train_step
from engine.weights.weights import declared

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["train.global_batch_size=6", "train.warmup_epochs=0", "train.epochs=2", "parallel.compile=false"]
VIT, CONV = "quickstart.yaml", "quickstart_conv.yaml"
# One bottleneck per stage would have no name: a real ResNet-50, on few pixels.
RESNET = ["model.image_size=32", "model.projector_hidden_dim=32", "model.output_dim=16", "model.name=resnet50"]
TIMM = ["model.name=timm/test_vit", "model.image_size=160", "model.projector_hidden_dim=32", "model.output_dim=16"]


def losses(recipe, *, improved: bool = False, steps: int = 3) -> tuple[list[float], list[float]]:
    """Of the engine's and of the reference's steps, on the same images."""
    ours, theirs = [], []
    with process_group() as world:
        subject = Subject(recipe, world, steps)
        moco, schedule = subject.state.moco, subject.schedule
        reference = Reference(recipe, declared(recipe.model), moco, schedule, world.device, improved=improved)
        for step in range(steps):
            images = subject.images(step)
            theirs.append(reference.step(images).item())
            ours.append(train_step(subject.state, images).loss.item())
    return ours, theirs


@pytest.mark.parametrize(
    ("file", "more", "rounding"),
    [
        (VIT, [], 1e-9),
        (VIT, ["moco.momentum=0"], 1e-9),  # keys follow every step at once
        (VIT, ["optimizer.name=lars", "optimizer.base_lr=10"], 1e-9),
        (CONV, [], 1e-9),
        pytest.param("resnet50_100ep.yaml", RESNET, 1e-9, marks=pytest.mark.slow),
        ("vit_s.yaml", TIMM, 1e-9),
    ],
)
def test_the_same_losses(file, more, rounding):
    recipe = load(RECIPES / file, [*SMALL, "parallel.precision=float64", *more])
    ours, theirs = losses(recipe)
    assert len(set(ours)) == 3  # the steps change something
    assert ours == pytest.approx(theirs, rel=rounding)


def test_the_same_first_loss_in_float32_and_nearly_in_bf16():
    for precision, rounding in (("float32", 1e-5), ("bf16", 2e-2)):
        recipe = load(RECIPES / VIT, [*SMALL, f"parallel.precision={precision}"])
        ours, theirs = losses(recipe, steps=1)
        assert ours == pytest.approx(theirs, rel=rounding)


def test_attention_is_what_was_asked_for(monkeypatch):
    """Without fusing, no call of scaled_dot_product_attention; with it, one a block."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    counted = lambda *a, **o: calls.append(1) or real(*a, **o)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    architecture = declared(load(RECIPES / VIT).model)
    for fused, expected in ((False, 0), (True, 2)):
        calls.clear()
        with torch.device("meta"):
            plain_trunk(architecture, fused=fused)(torch.empty(1, 3, 28, 28))
        assert len(calls) == expected


@pytest.mark.slow
def test_the_improved_reference_computes_the_same():
    recipe = load(RECIPES / VIT, [*SMALL, "parallel.precision=float64"])
    ours, theirs = losses(recipe, improved=True)
    assert ours == pytest.approx(theirs, rel=1e-9)
