"""The command `mocov3`: `mocov3 X ...` is `python -m engine.X ...`."""

from importlib import import_module
from typing import NoReturn

import engine
from engine.cli import WORDS
from engine.door import enter, show
from engine.errors import UserError, did_you_mean, one_line

DOORS = {
    "run": "pre-train from a recipe; the same command resumes",
    "evaluate": "kNN, RankMe, linear classification, fine-tuning",
    "check": "what the engine will make of images: unreadable ones, copies, sides, labels",
    "pack": "images of any source as tars",
    "export": "weights for timm, torchvision, transformers, DeiT, ONNX",
    "embed": "features of any images, as a file",
    "predict": "classes of any images by a fine-tuned or linear run",
    "duplicates": "images that are nearly the same",
    "import": "start from published or other weights",
    "show": "pictures: views, attention, neighbours, a map",
    "compare": "runs, as a table and curves",
    "bench": "speed and memory: step, loss, checkpoint, data",
    "recipes": "list the shipped recipes, copy one",
    "keys": "every key of a recipe: type, range, default, meaning",
}


def main(arguments: list[str]) -> None:
    """Open the door that the first argument names, with the rest."""
    door, *rest = arguments or ["--help"]
    if door in ("-h", "--help"):
        show(_help())
    elif door == "--version":
        show(f"mocov3 {engine.__version__}")
    elif door in DOORS:
        modules = {word: module for module, word in WORDS.items()}
        import_module(f"engine.{modules.get(door, door)}").main(rest)
    else:
        do = did_you_mean(door, DOORS, "see `mocov3 --help`")
        raise UserError(f"command ({one_line(door)}) must be one of {', '.join(DOORS)}; {do}")


def _help() -> str:
    lines = [f"  {door:12}{words}" for door, words in DOORS.items()]
    more = "Each says more with --help: `mocov3 run --help`. `mocov3 --version` prints the version."
    return "\n".join(["usage: mocov3 COMMAND ...", "", engine.__doc__ or "", "", *lines, "", more])


def command() -> NoReturn:
    """The script that is installed under the name `mocov3`."""
    enter(main)


if __name__ == "__main__":
    command()
