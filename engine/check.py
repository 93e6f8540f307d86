"""What the engine will make of images, before anything is trained: `mocov3 check ROOT`.

ROOT is what data.root would be; where it holds train and val, both are looked at, and --val names validation images
that lie elsewhere. Every image is read in full. Said are: images by suffix and folder; what is left out; labels, and
whether folders are taken as classes; what cannot be read; how images lie, their sides and kinds; and which are the
same, byte for byte. --list FILE names all that are unreadable, lying or the same. Nothing is written among the images.
The last line on stdout is the result as JSON.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import cli, door
from engine.errors import UserError
from engine.logger import progress

if TYPE_CHECKING:
    from engine.data.source import Source


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.check", __doc__)
    parser.add_argument("ROOT", type=cli.read_roots, help=f"{cli.IMAGES}; several as [a, b]")
    parser.add_argument(
        "--val",
        metavar="ROOT",
        type=partial(cli.read_roots, name="--val"),
        help="of validation images that lie elsewhere",
    )
    parser.add_argument("--list", metavar="FILE", type=_read_csv, help="a new .csv: finding, split, name, detail")
    cli.add_images(parser)
    options = parser.parse_args(arguments)
    splits, lines = _open(options)

    from engine.data.checking import find_same, tally
    from engine.data.decode import AS_IT_IS
    from engine.data.findings import in_numbers, in_words, write_findings

    found = tally(splits, AS_IT_IS, cli.decoding_workers(options), progress)
    same = find_same(found)
    if options.list is not None:
        write_findings(options.list, found, same)
    door.result(in_numbers(found, same, lines), "\n".join([*lines, *in_words(found, same)]))


def _read_csv(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".csv" or path.exists() or not path.absolute().parent.is_dir():
        raise UserError(f"--list ({text}) must be a new file that ends in .csv, in a folder that is there; change it")
    return path


def _open(options: Any) -> "tuple[dict[str, Source], list[str]]":
    """The splits that a run would have, and what it would say of them."""
    names = ("ROOT", "--val") if options.val is not None else ("ROOT",)
    root, *beside = (replace(each, read_only=True) for each in cli.image_roots(options, *names))

    from engine.data.classes import settle_classes
    from engine.data.decode import IMAGE_SUFFIXES
    from engine.data.opening import open_source, open_validation, without_labels

    train, val = open_source(root, "train"), open_validation(beside[0]) if beside else open_source(root, "val")
    assert train is not None, "only a val split may be missing"
    try:
        train, val = settle_classes("auto", root, train, val)
    except UserError as error:
        train, val = without_labels(train, f"a run is refused: {error}"), val
    splits = {"train": train} if val is None else {"train": train, "val": val}
    lines = [*dict.fromkeys(line for source in splits.values() for line in source.notes)]
    if any("left out in" in line for line in lines):
        lines.append(f"images are files that end in {' '.join(IMAGE_SUFFIXES)}; of other kinds none is read")
    return splits, lines


if __name__ == "__main__":
    door.enter(main)
