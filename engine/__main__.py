"""The command `mocov3`: `mocov3 X ...` is `python -m engine.X ...`."""

import difflib
from importlib import import_module
from typing import NoReturn

import engine
from engine.cli import enter
from engine.errors import UserError

DOORS = {
    "run": "pre-train, from a recipe; the same command resumes",
    "evaluate": "kNN, RankMe, linear classification, fine-tuning",
    "export": "weights for timm, torchvision, transformers, DeiT, ONNX",
    "import": "weights of others, to go on from",
    "show": "pictures: views, attention, neighbours, a map",
    "compare": "runs, as a table and curves",
    "recipes": "those that are shipped: list them, copy one",
    "keys": "every key of a recipe, with type, range, default and meaning",
}
MODULES = {"import": "import_weights"}  # where the word is one of Python's


def main(arguments: list[str]) -> None:
    """Open the door that the first argument names, with the others."""
    door, *rest = arguments or ["--help"]
    if door in ("-h", "--help"):
        print(_help())
    elif door == "--version":
        print(f"mocov3 {engine.__version__}")
    elif door in DOORS:
        import_module(f"engine.{MODULES.get(door, door)}").main(rest)
    else:
        nearest = difflib.get_close_matches(door, DOORS, 1)
        do = f"did you mean {nearest[0]}?" if nearest else "see `mocov3 --help`"
        raise UserError(f"command ({door}) must be one of {', '.join(DOORS)}; {do}")


def _help() -> str:
    lines = [f"  {door:10}{words}" for door, words in DOORS.items()]
    more = "Each says more with --help: `mocov3 run --help`. `mocov3 --version` says the version."
    return "\n".join(["usage: mocov3 COMMAND ...", "", f"{engine.__doc__}", "", *lines, "", more])


def command() -> NoReturn:
    """The script that is installed under the name `mocov3`."""
    enter(main)


if __name__ == "__main__":
    command()
