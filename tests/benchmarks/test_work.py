"""Useful operations are those that the project states, and a peak is that of the very device."""

from pathlib import Path

import pytest

from engine.benchmarks.work import peak_flops, useful_flop
from engine.recipe.load import load
from engine.weights.weights import declared

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "gigaflop"),
    [("vit_s", 73), ("vit_b", 280), ("vit_l", 984), ("vit_h", 2676), ("resnet50_100ep", 66)],
)
def test_operations_per_image(recipe, gigaflop):
    model = load(RECIPES / f"{recipe}.yaml").model
    assert useful_flop(declared(model), model.image_size) / 1e9 == pytest.approx(gigaflop, rel=0.01)


def test_operations_by_hand():
    """The quickstart's ViT: the patch projection, and in each block Linear layers and two products of attention."""
    model = load(RECIPES / "quickstart.yaml").model
    tokens, dim, depth = 17, 96, 2
    patches = 16 * (3 * 7 * 7) * dim
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    assert useful_flop(declared(model), model.image_size) == 8 * 2 * (patches + depth * block)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A10", None),
        ("CPU", None),
    ],
)
def test_peaks(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)
