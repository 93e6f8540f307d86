"""Options that mean the same in every front door (`mocov3 X`, `python -m engine.X`), and what is wrong with them."""

import argparse
import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from engine.distributed.launcher import ranks, spare_cores
from engine.errors import UserError, one_line
from engine.own_models import exit_if_hidden

# Every door imports this module before others, and what follows imports `models`, which must not be a stranger's.
exit_if_hidden()

from engine.recipe.load import AnyRecipe, check_world, load, place  # noqa: E402
from engine.recipe.paths import check_paths, each, expand, typed  # noqa: E402
from engine.recipe.ranges import CENTRE  # noqa: E402
from engine.recipe.sections import Paths, Source  # noqa: E402
from engine.recipe.shipped import find  # noqa: E402

if TYPE_CHECKING:
    from engine.data.source import Root

SOURCES = get_args(Source)
OVERRIDES = "dotted.key=value"
WORDS = {"import_weights": "import"}  # of doors whose word for `mocov3` is a keyword, which can name no module
RECIPE = "a YAML file, a run directory, or one of `mocov3 recipes`"
IMAGES = "a folder of images, tars or one tar, or a text file of paths"
ROOTS = {"data.root": "--train", "data.val_root": "--val"}  # of a recipe with labels


class Parser(ArgumentParser):
    """A command line whose mistakes are UserErrors, one line each; its description is shown as it is written.

    prog: the module of a door, and its subcommand; messages name it as the user called it.
    """

    def __init__(self, prog: str, description: str | None = None, **more: Any):
        more.setdefault("formatter_class", argparse.RawTextHelpFormatter)
        super().__init__(_as_called(prog), description=description, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _as_called(prog: str) -> str:
    if not prog.startswith("engine."):  # a subcommand's, which argparse made from its parent's
        return prog
    if Path(sys.argv[0]).stem != "mocov3":
        return f"python -m {prog}"
    door, *command = prog.removeprefix("engine.").split()
    return " ".join(["mocov3", WORDS.get(door, door), *command])


def at_least(least: int, name: str, do: str) -> Callable[[str], int]:
    """The type of the option `name`: an integer >= least. A smaller one is a UserError that ends with `do`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise UserError(f"{name} ({text}) must be >= {least}; {do}")
        return int(text)

    return integer


def read_k(text: str) -> list[int]:
    """The type of --k: numbers >= 1, with commas between them."""
    numbers = text.split(",")
    if not all(n.isascii() and n.isdigit() and 0 < int(n) < 2**31 for n in numbers):
        raise UserError(f"--k ({text}) must be a number >= 1, or several such as 10,20,100; 20 is usual")
    return [int(n) for n in numbers]


def refuse(options: Namespace, names: Iterable[str], where: str) -> None:
    """Raises UserError for the first of the options of these names that was given; `where` ends the line."""
    for name in names:
        if value := _value(options, name):
            shown = " ".join(value) if isinstance(value, list | tuple) else value
            raise UserError(f"{name} ({shown}) must be left out {where}")


def require(options: Namespace, names: Iterable[str], what: str) -> None:
    """Raises UserError for the first that was not given; `what` it must be, and what to do, ends the line."""
    for name in names:
        if _value(options, name) is None:
            raise UserError(f"{name} (missing) must be {what}")


def _value(options: Namespace, name: str) -> Any:
    return getattr(options, "overrides" if name == OVERRIDES else name.removeprefix("--").replace("-", "_"))


# ---- a network


def add_checkpoint(parser: ArgumentParser) -> None:
    kinds = "a run directory, a checkpoint directory, an exported file or\nfolder, weights of others or timm/<name>"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=kinds)
    heads = at_least(1, "--heads", "12 is MoCo v3's number")
    parser.add_argument("--heads", type=heads, help="of a ViT's attention, where CHECKPOINT does not tell")


def add_encoder(parser: ArgumentParser, default: str | None = "base") -> None:
    """default: None for a door that must tell whether it was given."""
    parser.add_argument("--encoder", choices=("base", "momentum"), default=default, help="default: base")


def add_network(parser: ArgumentParser, *baselines: str) -> None:
    """CHECKPOINT, which of its networks, and what may stand in its place: `check_baseline`."""
    add_checkpoint(parser)
    add_encoder(parser)
    words = {"initial": "the untrained network", "pixels": "no network"}
    parser.add_argument("--baseline", choices=baselines, help=f"instead: {', '.join(words[b] for b in baselines)}")


def add_subject(parser: ArgumentParser, *roots: str, required: bool = True) -> None:
    """A network, which of its numbers are measured (`read_choice`), and on which images (`add_images`)."""
    add_network(parser, "initial", "pixels")
    add_images(parser, *roots, required=required)
    parser.add_argument("--features", help="of a ViT: cls, mean (of the patches) or last4 (CLS of four blocks)")
    parser.add_argument("--crop-fraction", type=float, help="of the resized shorter side (default: as it was trained)")


def read_choice(options: Namespace) -> dict[str, Any]:
    """The keywords of `engine.evaluation.subject.open_subject`. Raises UserError."""
    fraction = options.crop_fraction
    if fraction is not None and not CENTRE.holds(fraction):
        raise UserError(f"--crop-fraction ({fraction}) must be{CENTRE.text}; 0.875 is usual")
    if options.baseline == "pixels":
        refuse(options, ["--features"], "for --baseline pixels, which has none")
    check_baseline(options)
    names = ("encoder", "features", "baseline", "crop_fraction", "heads")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def check_baseline(options: Namespace) -> None:
    if options.baseline and options.encoder == "momentum":
        refuse(options, ["--encoder"], f"for --baseline {options.baseline}")


# ---- what a door writes


def add_out(parser: ArgumentParser, endings: str) -> None:
    parser.add_argument("out", metavar="OUT", type=_read_out(endings), help=f"ends in {endings}")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")


def _read_out(endings: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not text.endswith(tuple(endings.split(" or "))):
            raise UserError(f"OUT ({text}) must end in {endings}; change its name")
        return text

    return read


# ---- images


def add_images(parser: ArgumentParser, *roots: str, required: bool = True) -> None:
    """An option for each of `roots`, and what says how to read them: `image_roots` and `decoding_workers`."""
    for root in roots:
        parser.add_argument(root, required=required, metavar="ROOT", type=partial(read_roots, name=root), help=IMAGES)
    parser.add_argument(
        "--source", choices=SOURCES, help="guessed from ROOT when absent: tars are shards, a .txt is a list"
    )
    parser.add_argument("--dataset", metavar="CLASS", help="of torchvision.datasets; implies --source torchvision")
    workers = at_least(0, "--workers", "leave it out for as many as there are cores")
    parser.add_argument("--workers", type=workers, help="processes per rank that decode (default: as many as cores)")


def read_roots(text: str, name: str = "ROOT") -> Paths:
    """The type of an option that names images: a path as it is typed, or a list of them in brackets. Raises UserError,
    which calls it `name`."""
    if not text:
        raise UserError(f"{name} () must be a path; pass one")
    if not (text.startswith("[") and text.endswith("]")):
        return text
    found = typed(text, f"{name} ({one_line(text)})")
    if not (found and isinstance(found, list) and all(isinstance(path, str) and path for path in found)):
        raise UserError(f"{name} ({one_line(text)}) must be a path, or a list of paths such as [a, b]")
    return tuple(found)


def image_roots(options: Namespace, *names: str) -> "list[Root]":
    """Where the options of these names say that images are: all of one kind, which is `given_source` or else what the
    files of the first are; `~` and `$VAR` in them are expanded. Raises UserError."""
    kind = given_source(options)
    if kind == "torchvision":
        require(options, ["--dataset"], "a class of torchvision.datasets; pass it with --source torchvision")
    from engine.data.opening import guess_kind  # loads PyTorch
    from engine.data.source import Root

    paths = [[expand(path, name) for path in each(_value(options, name))] for name in names]
    kind = kind or guess_kind(paths[0][0])
    return [
        Root(kind, first, name, options.dataset, more=tuple(more))
        for name, (first, *more) in zip(names, paths, strict=True)
    ]


def given_source(options: Namespace) -> str | None:
    """The kind of source that --source or --dataset says; None where neither is given. Raises UserError."""
    if options.source not in (None, "torchvision"):
        refuse(options, ["--dataset"], f"for --source {options.source}")
    return options.source or (options.dataset and "torchvision")


def decoding_workers(options: Namespace) -> int:
    """Processes per rank that decode: as asked for, else the cores that the ranks of this machine leave."""
    if options.workers is not None:
        return options.workers
    return spare_cores()


# ---- a recipe


def add_recipe(parser: ArgumentParser, name: str = "recipe", **more: Any) -> None:
    """The RECIPE of a door: a file, a run or a shipped name; the option is its path."""
    parser.add_argument(name, metavar="RECIPE", type=find, help=RECIPE, **more)


def add_overrides(parser: ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar=OVERRIDES, help=f"for example {example}")


def add_labelled_run(parser: ArgumentParser, recipes: str) -> None:
    """A recipe (`recipes`: which) and what stands in its place, beside `add_images`: `read_labelled_run`."""
    parser.set_defaults(recipes=recipes)
    parser.add_argument("--recipe", metavar="RECIPE", type=find, help=recipes)
    parser.add_argument("--out", metavar="RUN_DIR", help="instead of the recipe's run.dir")
    share = "of the training images, as many of every class, such as 1%% (default: all)"
    parser.add_argument("--labels", metavar="SHARE", help=share)
    add_overrides(parser, "train.epochs=30")


def read_labelled_run(options: Namespace, kind: type[AnyRecipe]) -> AnyRecipe:
    """The recipe with what the options say in its place. Raises UserError."""
    require(options, ["--recipe"], options.recipes)
    said = {"data.root": options.train, "data.val_root": options.val, "data.dataset": options.dataset}
    said |= {"data.source": given_source(options), "data.workers": options.workers, "run.dir": options.out}
    said["data.labels"] = options.labels and read_share(options.labels, "--labels")
    return request(kind, options.recipe, said, options.overrides)


def request(kind: type[AnyRecipe], file: Path, said: Mapping[str, Any], overrides: Sequence[str]) -> AnyRecipe:
    """The recipe of `file` with what is `said` ({dotted key: value}; None: nothing), and then the overrides.

    Without roots the recipe's own are taken, which `place` finds. With roots and without a source, it is what lies
    there; but a torchvision dataset's root looks like any folder, so a recipe of one knows better than a guess.

    Raises:
        UserError: for the recipe, for one root without the other, and where the launch's ranks do not suit.
    """
    said = {key: value for key, value in said.items() if value is not None}
    recipe = load(file, _overrides(said, overrides), kind)
    check_paths(recipe)
    missing, given = sorted(ROOTS, key=lambda key: key in said)
    if given in said and missing not in said:
        pass_both = "pass both, or none for the recipe's own"
        raise UserError(f"{ROOTS[missing]} (missing) must be given with {ROOTS[given]}; {pass_both}")
    if given not in said:
        own = {key: getattr(recipe.data, key.removeprefix("data.")) for key in ROOTS}
        said |= {key: place(root, file) for key, root in own.items() if root is not None}
    elif "data.source" not in said and recipe.data.source != "torchvision":
        from engine.data.opening import guess_kind  # loads PyTorch, and a mistake in the recipe should show before

        said["data.source"] = guess_kind(expand(each(said["data.root"])[0]))
    recipe = load(file, _overrides(said, overrides), kind)
    check_world(recipe, ranks())
    return recipe


def _overrides(said: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    # JSON is YAML: no path is taken for another kind of value.
    return [*(f"{key}={json.dumps(value)}" for key, value in said.items()), *overrides]


def read_share(text: str, key: str) -> float:
    """The fraction, above 0 and up to 1, that a percentage says. Raises UserError, which calls it `key`."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)%", text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        must = "must be a percentage above 0% and up to 100%, such as 1%"
        raise UserError(f"{key} ({one_line(text)}) {must}; pass {key}=1%")
    return share
