"""What every front door (`python -m engine.X`) does at its edge: turn exceptions into words and exit codes."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from engine.schema import UserError


class RunFailed(Exception):
    """A run cannot go on: what happened, what was lost, how to go on. Front doors print it and exit with status 1."""


class Interrupted(Exception):
    """A signal ended the run in good order. Front doors exit with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def enter(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a front door on the command line's arguments and exit: 0 done, 2 user error (one line), else failure."""
    try:
        main(sys.argv[1:])
        code = 0
    except UserError as error:
        say_once(f"error: {error}")
        code = 2
    except RunFailed as failure:
        say_once(f"failed: {failure}")
        code = 1
    except Interrupted as stop:
        code = 128 + stop.signum
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def say_once(text: str) -> None:
    """A line on stderr from one process of every node: the ranks fail alike, and one voice is enough."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
