"""Tiles of real photographs, labelled by their photograph: `python -m tests.data.photographs OUT`

The photographs are 50 that a package brings (PACKAGE; MIT by its metadata): buildings, gardens, streets, things, two
views from the air. Each is scaled to 640 x 426 pixels. Its left and its right third give 16 tiles of 96 x 96 pixels for
OUT/train, the middle third gives 8 for OUT/val, and the 32 pixels between thirds are in none: no pixel is in two tiles,
and the photograph of a tile for val must be told from what other parts of it look like.

Ends with one JSON line: photographs, tiles in train and in val.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from PIL import Image, ImageOps

from engine.door import carry_out
from engine.errors import UserError

PACKAGE = "mvtb-data==1.6.1"
SIZE = (640, 426)
TILE = 96
COLUMNS = {"train": (0, 96, 448, 544), "val": (224, 320)}
ROWS = (0, 96, 192, 288)
CAMPUS = (491, 493, 494, 495, 496, 497, 498, 499, 500, 501, 503, 504, 505, 506, 507, 509, 510, 512, 514, 515)
NAMES = (
    *(f"campus/P1070{number}.png" for number in CAMPUS),
    *(f"flowers{number}.png" for number in range(1, 9)),
    # Of what was taken several times over, one; no drawings, no paintings, nothing smaller than SIZE.
    *("Image18.png", "arucoboard.png", "building2-3.png", "calibration/left06.jpg", "castle.png", "church.png"),
    *("eiffel-1.png", "greenscreen.png", "image3.jpg", "lab-scene.png", "mosaic/aerial2-001.png"),
    *("mosaic/aerialphoto.png", "notre-dame.png", "parks.png", "penguins.png", "road.png", "rocks2-l.png", "roof.png"),
    *("street.png", "tags.png", "tomato_54.png", "walls-l.png"),
)


def photographs() -> list[Path]:
    package = importlib.util.find_spec("mvtbdata")
    folder = Path(package.origin).parent / "images" if package and package.origin else Path()
    paths = [folder / name for name in NAMES]
    if not all(path.is_file() for path in paths):
        raise UserError(f"the photographs must be installed; run `pip install --no-deps {PACKAGE}`")
    return paths


def tiles(photograph: Image.Image, split: str) -> list[Image.Image]:
    """Of one split, row by row. Where the shape is not SIZE's, what is too high or too wide is cut off evenly."""
    whole = ImageOps.fit(photograph.convert("RGB"), SIZE, Image.Resampling.LANCZOS)
    return [whole.crop((x, y, x + TILE, y + TILE)) for y in ROWS for x in COLUMNS[split]]


def write(paths: list[Path], out: Path) -> None:
    for path in paths:
        with Image.open(path) as photograph:
            for split in COLUMNS:
                folder = out / split / path.stem
                folder.mkdir(parents=True)
                for number, tile in enumerate(tiles(photograph, split)):
                    tile.save(folder / f"{number:02}.png")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.data.photographs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    out = parser.parse_args(arguments).out
    if out.exists():
        raise UserError(f"OUT ({out}) must be a folder that is not there yet; remove it or pass another")
    paths = photographs()
    write(paths, out)
    count = {split: len(paths) * len(ROWS) * len(columns) for split, columns in COLUMNS.items()}
    print(json.dumps({"photographs": len(paths), **count}))


if __name__ == "__main__":
    carry_out(main, sys.argv[1:])
