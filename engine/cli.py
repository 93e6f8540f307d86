"""What every front door (`python -m engine.X`) does at its edge: exceptions become words and exit codes, and no
process outlives its launcher."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from engine.distributed.launcher import end_with_launcher
from engine.errors import Interrupted, RunFailed, UserError

FIRST_WORD_SECONDS = 10.0


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
