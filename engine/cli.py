"""The edge of every front door (`python -m engine.X`): options that mean the same in each, exceptions as words and exit
codes, the result as JSON; and no process outlives its launcher."""

import argparse
import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_args

from engine.distributed.launcher import end_with_launcher, local_rank, local_ranks
from engine.errors import Interrupted, RunFailed, UserError
from engine.logger import note, rank
from engine.recipe.load import AnyRecipe
from engine.recipe.sections import Source
from engine.runs.request import read_share, request

if TYPE_CHECKING:
    from engine.data.source import Root
    from engine.distributed.world import World
    from engine.evaluation.subject import Choice

FIRST_WORD_SECONDS = 10.0
WORKERS_AT_MOST = 12  # processes per rank that decode, where --workers does not say
SOURCES = get_args(Source)
OVERRIDES = "dotted.key=value"
IMAGES = "a folder of images, tars or one tar"


# ---- a door's life ---------------------------------------------------------------------------------------------------


def enter(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a front door on the command line's arguments and exit: 0 done, 2 user error (one line), else failure."""
    end_with_launcher()
    try:
        main(sys.argv[1:])
        code = 0
    except UserError as error:
        _complain(f"error: {error}")
        code = 2
    except RunFailed as failure:
        _complain(f"failed: {failure}")
        code = 1
    except Interrupted as stop:
        code = 128 + stop.signum
    except KeyboardInterrupt:
        code = 130
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # At once: Python's own way out would wait for loader workers, which heed no signal but die with this process.
        os._exit(code)
    sys.exit()


def _complain(text: str) -> None:
    # torchrun ends a node's ranks as soon as one has ended: the others wait until the first, which mostly failed alike,
    # has spoken. One that is still there after that failed alone.
    if local_rank() > 0:
        time.sleep(FIRST_WORD_SECONDS)
    print(text, file=sys.stderr, flush=True)


@contextmanager
def joined(what: str) -> Iterator["World"]:
    """The ranks of this launch. PyTorch takes seconds to load, so mistakes in arguments should show before."""
    note(f"{what}: loading PyTorch")
    from engine.distributed.world import process_group

    with process_group() as world:
        yield world


def result(found: dict[str, Any], table: str | None = None) -> None:
    """What a door ends with, from rank 0 alone: a table for people where there is one, then the result as one line of
    JSON."""
    if rank() == 0:
        print(*([table] if table else []), json.dumps(found), sep="\n", flush=True)


# ---- options and what they say ---------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """A command line whose mistakes are UserErrors, one line each; its description is shown as it is written."""

    def __init__(self, prog: str | None = None, description: str | None = None, **more: Any):
        more.setdefault("formatter_class", argparse.RawTextHelpFormatter)
        super().__init__(prog, description=description, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python -m {self.prog} --help`")


def at_least(least: int, name: str, do: str) -> Callable[[str], int]:
    """The type of the option `name`: an integer >= least. A smaller one is a UserError that ends with `do`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise UserError(f"{name} ({text}) must be >= {least}; {do}")
        return int(text)

    return integer


def counts(name: str, usual: int) -> Callable[[str], list[int]]:
    """The type of the option `name`: numbers >= 1, with commas between them."""

    def read(text: str) -> list[int]:
        numbers = text.split(",")
        if not all(n.isascii() and n.isdigit() and 0 < int(n) < 2**31 for n in numbers):
            raise UserError(f"{name} ({text}) must be a number >= 1, or several as 10,20,100; {usual} is usual")
        return [int(n) for n in numbers]

    return read


def refuse(options: Namespace, names: Iterable[str], where: str) -> None:
    """Raises UserError for the first of the options of these names that was given; `where` ends the line."""
    for name in names:
        if value := _value(options, name):
            shown = " ".join(value) if isinstance(value, list) else value
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
    kinds = "a run directory, a checkpoint directory, an exported file or\nfolder, a published .pth.tar or timm/<name>"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=kinds)


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


def read_choice(options: Namespace) -> "Choice":
    """What `engine.evaluation.subject.open_subject` is to know beside the CHECKPOINT. Raises UserError."""
    fraction = options.crop_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"--crop-fraction ({fraction}) must be > 0 and <= 1; 0.875 is usual")
    if options.baseline == "pixels":
        refuse(options, ["--features"], "for --baseline pixels, which has none")
    check_baseline(options)
    names = ("encoder", "features", "baseline", "crop_fraction")
    return cast("Choice", {name: value for name in names if (value := getattr(options, name)) is not None})


def check_baseline(options: Namespace) -> None:
    if options.baseline and options.encoder == "momentum":
        refuse(options, ["--encoder"], f"for --baseline {options.baseline}")


# ---- images


def add_images(parser: ArgumentParser, *roots: str, required: bool = True) -> None:
    """An option for each of `roots`, and what says how to read them: `image_roots` and `decoding_workers`."""
    for root in roots:
        parser.add_argument(root, required=required, metavar="ROOT", help=IMAGES)
    parser.add_argument("--source", choices=SOURCES, help="guessed from ROOT when absent: tars are shards")
    parser.add_argument("--dataset", metavar="CLASS", help="of torchvision.datasets; implies --source torchvision")
    workers = at_least(0, "--workers", "leave it out for as many as there are cores")
    parser.add_argument("--workers", type=workers, help="processes per rank that decode (default: as many as cores)")


def image_roots(options: Namespace, *names: str) -> "list[Root]":
    """Where the options of these names say that images are, all of the kind of the first. Raises UserError."""
    from engine.data.source import Root  # loads PyTorch

    paths = [Path(_value(options, name)) for name in names]
    kind = source_kind(options, paths[0])
    return [Root(kind, path, name, options.dataset) for name, path in zip(names, paths, strict=True)]


def source_kind(options: Namespace, root: str | Path) -> str:
    """`given_source`, else what the files at `root` say. Raises UserError."""
    kind = given_source(options)
    if kind == "torchvision":
        require(options, ["--dataset"], "a class of torchvision.datasets; pass it with --source torchvision")
    from engine.data.opening import guess_kind  # loads PyTorch

    return kind or guess_kind(Path(root))


def given_source(options: Namespace) -> str | None:
    """The kind of source that --source or --dataset says; None where neither is given. Raises UserError."""
    if options.source not in (None, "torchvision"):
        refuse(options, ["--dataset"], f"for --source {options.source}")
    return options.source or (options.dataset and "torchvision")


def decoding_workers(options: Namespace) -> int:
    """Processes per rank that decode: as asked for, else the cores that the ranks of this machine leave."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(WORKERS_AT_MOST, cores // local_ranks() - 1))


# ---- a recipe


def add_overrides(parser: ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar=OVERRIDES, help=f"as {example}")


def add_labelled_run(parser: ArgumentParser, recipes: str) -> None:
    """A recipe (`recipes`: which) and what stands in its place, beside `add_images`: `read_labelled_run`."""
    parser.set_defaults(recipes=recipes)
    parser.add_argument("--recipe", type=Path, help=recipes)
    parser.add_argument("--out", metavar="RUN_DIR", help="instead of the recipe's run.dir")
    share = "of the training images, as many of every class, as 1%% (default: all)"
    parser.add_argument("--labels", metavar="SHARE", help=share)
    add_overrides(parser, "train.epochs=30")


def read_labelled_run(options: Namespace, kind: type[AnyRecipe]) -> AnyRecipe:
    """The recipe with what the options say in its place. Raises UserError."""
    require(options, ["--recipe"], options.recipes)
    said = {"data.root": options.train, "data.val_root": options.val, "data.dataset": options.dataset}
    said |= {"data.source": given_source(options), "data.workers": options.workers, "run.dir": options.out}
    said["data.labels"] = options.labels and read_share(options.labels, "--labels")
    return request(kind, options.recipe, said, options.overrides)
