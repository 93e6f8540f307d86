"""The recipes that come with the engine, and what a command line may call a recipe."""

import difflib
import json
import re
from pathlib import Path

from engine.errors import UserError, one_line, reason

FOLDER = Path(__file__).parents[2] / "recipes"  # beside the engine, in a clone and where a wheel put it
OF_A_RUN = "recipe.yaml"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def summary(name: str) -> str:
    """A shipped recipe in one line: the first of its file."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip().rstrip(".")


def is_run(path: Path) -> bool:
    """Whether it is a run directory, whose recipe it holds. Raises OSError."""
    return (path / OF_A_RUN).is_file() and (path / "checkpoints").is_dir()


def find(recipe: str) -> Path:
    """The path of a RECIPE: a file, a run directory, or else the shipped recipe of that name. Raises UserError."""
    path, must = Path(recipe), f"recipe ({one_line(recipe)}) must be a readable file"
    try:
        if is_run(path) or (path.exists() and not path.is_dir()):
            return path
        beside = sorted(path.parent.glob("*.yaml"))
    except (OSError, ValueError) as error:
        raise UserError(f"{must}: {reason(error)}; pass the path of one") from None
    if recipe in names():
        return FOLDER / f"{recipe}.yaml"
    known = {name: name for name in names()} | {file.stem: str(file) for file in beside}
    nearest = [known[name] for name in difflib.get_close_matches(path.stem.casefold(), known, 1)]
    nearest = [path / OF_A_RUN] if (path / OF_A_RUN).is_file() else nearest
    do = f"did you mean {nearest[0]}?" if nearest else "see `mocov3 recipes`"
    raise UserError(f"{must}, a run or the name of a shipped recipe; {do}")


def copy_text(name: str) -> str:
    """A shipped recipe's text for another folder: data that lies beside it is named by where it is."""

    def located(line: re.Match[str]) -> str:
        data = FOLDER / line["path"]
        return f"{line['key']}{json.dumps(str(data))}  # comes with the engine" if data.exists() else line[0]

    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return re.sub(r"^(?P<key> +root: )(?P<path>\S+).*$", located, text, flags=re.MULTILINE)
