"""What every front door (`python -m engine.X`) does at its edge: exceptions become words and exit codes, and no
process outlives its launcher."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, TextIO

from engine.schema import UserError

ORPHAN_CHECK_SECONDS = 1.0
FIRST_WORD_SECONDS = 10.0


class RunFailed(Exception):
    """A run cannot go on: what happened, what was lost, how to go on. Front doors print it and exit with status 1."""


class Interrupted(Exception):
    """A signal ended the run in good order. Front doors exit with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors, one line each; its description is shown as it is written."""

    def __init__(self, prog: str | None = None, description: str | None = None, **more: Any):
        more.setdefault("formatter_class", argparse.RawTextHelpFormatter)
        super().__init__(prog, description=description, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `python -m {self.prog} --help`")


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


def say_once(text: str, stream: TextIO | None = None) -> None:
    """A line, on stderr unless told otherwise, from one process of every node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=stream or sys.stderr, flush=True)


@cache
def end_with_launcher() -> None:
    """From now on this process, if torchrun started it, exits within seconds of torchrun's death.

    To be called early: PyTorch takes seconds to load, and a launcher that dies meanwhile would not be missed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent: int) -> None:
    # A rank that outlives its launcher would go on training beside the job that replaces it.
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_SECONDS)
    os.write(2, b"the launcher is gone: this rank exits; the newest checkpoint is kept\n")
    os._exit(1)
