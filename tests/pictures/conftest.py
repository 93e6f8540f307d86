"""Images to look at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Twelve images, each brighter than the one before, of two classes in turn."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        folder = root / ("even ones", "odd ones")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 120, (80, 100, 3)) + 12 * i
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root
