"""The tiles of photographs, made of pictures in a package of the same names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from tests.data.images import picture
from tests.data.photographs import COLUMNS, NAMES, SIZE, TILE, photographs, tiles

ROOT = Path(__file__).parents[2]
GAP = 32
MISSING = "the photographs must be installed; run `pip install --no-deps mvtb-data==1.6.1`"


def cut(out: Path, packages: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.data.photographs", str(out)]
    path = os.pathsep.join((str(ROOT), str(packages)))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def package(folder: Path) -> Path:
    """Of pictures of one shade each, in several shapes and modes."""
    (folder / "mvtbdata").mkdir(parents=True)
    (folder / "mvtbdata/__init__.py").touch()
    for shade, name in enumerate(NAMES):
        path = folder / "mvtbdata/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size, mode = ((640, 426), (660, 700))[shade % 2], ("RGB", "L", "RGB")[shade % 3]
        Image.new("RGB", size, (shade, shade, shade)).convert(mode).save(path)
    return folder


def test_no_pixel_is_in_two_tiles_and_val_lies_apart_from_train():
    whole = picture(*SIZE)
    pixels = np.asarray(whole).astype(np.int64) @ (1, 256, 65536)
    place = np.full(SIZE[::-1], -1)  # of each pixel: the split whose tile has it
    for split, columns in enumerate(COLUMNS):
        for tile in tiles(whole, columns):
            corner = np.asarray(tile).astype(np.int64) @ (1, 256, 65536)
            ((y, x),) = np.argwhere(
                (pixels[: -TILE + 1, : -TILE + 1] == corner[0, 0])
                & (pixels[TILE - 1 :, TILE - 1 :] == corner[TILE - 1, TILE - 1])
            )
            here = slice(y, y + TILE), slice(x, x + TILE)
            assert (pixels[here] == corner).all()
            assert (place[here] == -1).all()
            place[here] = split
    train, val = (np.flatnonzero((place == split).any(axis=0)) for split in (0, 1))
    assert np.abs(train[:, None] - val).min() == GAP + 1
    assert (len(train), len(val)) == (4 * TILE, 2 * TILE)


def test_a_folder_of_every_photographs_tiles(tmp_path):
    done = cut(tmp_path / "tiles", package(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"photographs": len(NAMES), "train": 16 * len(NAMES), "val": 8 * len(NAMES)}
    for split, number in (("train", 16), ("val", 8)):
        assert len(list((tmp_path / "tiles" / split).iterdir())) == len(NAMES)
        for shade, name in enumerate(NAMES):
            paths = sorted((tmp_path / "tiles" / split / Path(name).stem).iterdir())
            assert len(paths) == number
            image = Image.open(paths[-1])
            assert (image.mode, image.size) == ("RGB", (TILE, TILE))
            limit = 2 if name.endswith(".jpg") else 0
            assert abs(image.getpixel((0, 0))[0] - shade) <= limit


def test_a_missing_package_and_a_folder_in_the_way_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "mvtbdata").mkdir()
    (tmp_path / "mvtbdata/__init__.py").touch()  # before one that is installed, and without its images
    done = cut(tmp_path / "tiles", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {MISSING}\n"
    monkeypatch.setitem(sys.modules, "mvtbdata", None)
    with pytest.raises(UserError, match=MISSING):
        photographs()
    (tmp_path / "tiles").mkdir()
    done = cut(tmp_path / "tiles", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: OUT ({tmp_path / 'tiles'}) must be a folder that is not there yet; ")
    assert not any((tmp_path / "tiles").iterdir())
