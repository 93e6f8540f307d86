"""The recipes that come with the engine.

mocov3 recipes                    one line each
mocov3 recipes copy NAME FOLDER   one of them to edit: `mocov3 recipes copy vit_s .`, then `mocov3 run vit_s.yaml`
"""

from pathlib import Path

from engine.cli import Parser, enter, result
from engine.errors import UserError, one_line, reason
from engine.recipe.shipped import copy_text, names, summary


def main(arguments: list[str]) -> None:
    parser = Parser("engine.recipes", __doc__)
    kinds = parser.add_subparsers(metavar="copy")
    copied = kinds.add_parser("copy", description="Copy a shipped recipe, to edit it.")
    copied.add_argument("name", metavar="NAME", choices=names(), help=", ".join(names()))
    copied.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path())
    options = parser.parse_args(arguments)
    if arguments:
        result({"file": str(copy(options.name, options.folder))})
    else:
        width = max(map(len, names()))
        print("\n".join(f"{name:{width}}  {summary(name)}" for name in names()))


def copy(name: str, folder: Path) -> Path:
    """Returns the new file. Raises UserError; nothing is replaced."""
    file = folder / f"{name}.yaml"
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(copy_text(name))
    except FileExistsError:
        raise UserError(f"{one_line(file)} must not be there yet; move it, or pass another folder") from None
    except OSError as error:
        raise UserError(f"FOLDER ({one_line(folder)}) must be a writable folder: {reason(error)}") from None
    return file


if __name__ == "__main__":
    enter(main)
