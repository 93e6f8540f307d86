"""The edge of every front door (`python -m engine.X`): options that mean the same in each, exceptions as words and exit
codes, the result as JSON; and no process outlives its launcher."""

import argparse
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

from engine.distributed.launcher import end_with_launcher
from engine.errors import Interrupted, RunFailed, UserError
from engine.recipe.sections import Source

FIRST_WORD_SECONDS = 10.0
WORKERS_AT_MOST = 12  # processes per rank that decode, where --workers does not say
SOURCES = get_args(Source)


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
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_WORD_SECONDS)
    print(text, file=sys.stderr, flush=True)


def result(found: dict[str, Any], table: str | None = None) -> None:
    """What a door ends with, from rank 0 alone: a table for people where there is one, then the result as one line of
    JSON."""
    if os.environ.get("RANK", "0") == "0":
        print(*([table] if table else []), json.dumps(found), sep="\n", flush=True)


# ---- options ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, one line each; its description is shown as it is written."""

    def __init__(self, prog: str | None = None, description: str | None = None, **more: Any):
        more.setdefault("formatter_class", argparse.RawTextHelpFormatter)
        super().__init__(prog, description=description, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python -m {self.prog} --help`")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    kinds = "a run directory, a checkpoint directory, an exported file or\nfolder, a published .pth.tar or timm/<name>"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=kinds)


def add_encoder(parser: argparse.ArgumentParser, default: str | None = "base") -> None:
    """default: None for a door that must tell whether it was given."""
    parser.add_argument("--encoder", choices=("base", "momentum"), default=default, help="default: base")


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value", help=f"as {example}")


def add_images(parser: argparse.ArgumentParser, *roots: str, required: bool = True) -> None:
    """An option for each of `roots`, and what says how to read them; for `source_kind` and `decoding_workers`."""
    for root in roots:
        parser.add_argument(root, required=required, metavar="ROOT", help="a folder of images, tars or one tar")
    parser.add_argument("--source", choices=SOURCES, help="guessed from ROOT when absent: tars are shards")
    parser.add_argument("--dataset", metavar="CLASS", help="of torchvision.datasets; implies --source torchvision")
    workers = at_least(0, "--workers", "leave it out for as many as there are cores")
    parser.add_argument("--workers", type=workers, help="processes per rank that decode (default: as many as cores)")


def at_least(least: int, name: str, do: str) -> Callable[[str], int]:
    """The type of the option `name`: an integer >= least. A smaller one is a UserError that ends with `do`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise UserError(f"{name} ({text}) must be >= {least}; {do}")
        return int(text)

    return integer


def given_source(options: Namespace) -> str | None:
    """The kind of source that --source or --dataset says; None where neither is given. Raises UserError."""
    if options.dataset is not None and options.source not in (None, "torchvision"):
        raise UserError(f"--dataset ({options.dataset}) must be left out for --source {options.source}")
    return options.source or (options.dataset and "torchvision")


def source_kind(options: Namespace, root: str) -> str:
    """`given_source`, else what the files at `root` say. Raises UserError."""
    kind = given_source(options)
    if kind == "torchvision" and options.dataset is None:
        raise UserError(
            "--dataset (missing) must be a class of torchvision.datasets; pass it with --source torchvision"
        )
    from engine.data.sources import guess_kind  # loads PyTorch

    return kind or guess_kind(Path(root))


def decoding_workers(options: Namespace) -> int:
    """Processes per rank that decode: as asked for, else the cores that the ranks of this machine leave."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(WORKERS_AT_MOST, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
