"""The recipes that come with the engine.

mocov3 recipes                      one line each
mocov3 recipes copy NAME [FOLDER]   one of them to edit: `mocov3 recipes copy vit_s`, then `mocov3 run vit_s.yaml`
"""

from pathlib import Path

from engine.cli import Parser
from engine.door import enter, result, show
from engine.errors import UserError, did_you_mean, one_line, reason
from engine.recipe.shipped import copy_text, names, summary


def main(arguments: list[str]) -> None:
    parser = Parser("engine.recipes", __doc__)
    copied = parser.add_subparsers(dest="action", metavar="copy").add_parser("copy", description=copy.__doc__)
    copied.add_argument("name", metavar="NAME", help="one that `mocov3 recipes` lists")
    copied.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="default: this one")
    options = parser.parse_args(arguments)
    if options.action:
        result({"file": str(copy(options.name, options.folder))})
    else:
        width = max(map(len, names()))
        show("\n".join(f"{name:{width}}  {summary(name)}" for name in names()))


def copy(name: str, folder: Path) -> Path:
    """Copy a shipped recipe, to edit it. Nothing is replaced."""
    if name not in names():
        do = did_you_mean(name, names(), "see `mocov3 recipes`")
        raise UserError(f"NAME ({one_line(name)}) must be the name of a shipped recipe; {do}")
    file = folder / f"{name}.yaml"
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(copy_text(name))
    except FileExistsError:
        raise UserError(f"{one_line(file)} must not exist yet; move it away, or pass another folder") from None
    except OSError as error:
        raise UserError(f"FOLDER ({one_line(folder)}) must be a writable folder: {reason(error)}") from None
    return file


if __name__ == "__main__":
    enter(main)
