"""What is drawn in tests, and what they read off it."""

from pathlib import Path

from engine.show import main

ROOT = Path(__file__).parents[2]
VIT = str(ROOT / "tests/golden/I_vit_small_shape.pth.tar")
VIT_CONV = str(ROOT / "tests/golden/I_vit_conv_small_shape.pth.tar")
QUICKSTART = ROOT / "recipes/quickstart.yaml"
FASHION = ROOT / "recipes/data/fashion_mnist"


def show(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
