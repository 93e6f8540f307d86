"""One voice: what a command says to its user, through Python's logger `engine`.

On a terminal a line is plain; in a log file it begins with the time and the rank that speaks. A program that has given
the logger `engine` a handler of its own gets the lines there instead. Results are no part of this: engine.door prints
them bare, as `complain` does the one line of an error.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

FIRST_WORD_SECONDS = 10.0
LAST_WORDS = "last_words.txt"
SAID, NOTED, WARNED = logging.INFO, logging.INFO + 5, logging.WARNING


def say(text: str) -> None:
    """What a run has to tell, on stdout, from rank 0 of the launch."""
    if rank() == 0:
        _logger().log(SAID, text)


def note(text: str) -> None:
    """Words beside a result, on stderr, from rank 0: for doors whose stdout is that result."""
    if rank() == 0:
        _logger().log(NOTED, text)


def warn(text: str) -> None:
    """What went wrong without ending the command, on stderr, from this process whatever its rank."""
    _logger().log(WARNED, f"warning: {text}")


def complain(text: str, *, at_once: bool = False) -> None:
    """Say on stderr, bare, why this process ends early; what ends all ranks of a node alike is said once.

    A launcher ends a node's ranks as soon as one has ended: the others wait until the first, which mostly failed alike,
    has spoken. One that is still there after that failed alone; at_once: one that knows it already.
    """
    if not at_once:
        _wait_for_first_word()
    print(text, file=sys.stderr, flush=True)


def complain_once(text: str) -> None:
    """`complain`, but in silence where torchrun's start before this one has ended with the same words: its restarts
    help nobody who made a mistake."""
    _wait_for_first_word()
    if not _has_said(text):
        print(text, file=sys.stderr, flush=True)


def progress(items: Iterable[T], total: int, what: str, unit: str = "it", *, shown: bool = True) -> Iterable[T]:
    """The same items, and on stderr how far they are: all the time on a terminal, else every half minute."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, what, total, unit=unit, mininterval=seconds, dynamic_ncols=True, disable=not shown)


def last_word(text: str) -> None:
    """Say on stderr, bare and on a line of its own, why this process ends now; from a signal's handler, which may have
    come in the middle of a print."""
    with suppress(OSError):
        # A progress bar may stand in the line: a terminal clears it, a file keeps it.
        own_line = "\r\x1b[K" if os.isatty(2) else "\n"
        os.write(2, f"{own_line}{text}\n".encode())


def _wait_for_first_word() -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(FIRST_WORD_SECONDS)


def _has_said(text: str) -> bool:
    """Whether the start before this one ended with this text; notes it for the start after it.

    It is noted where torchrun wants each start's errors: in a folder that this launch alone knows.
    """
    place = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    folder = place.parent.parent
    if folder.name != f"attempt_{start}":
        return False
    with suppress(OSError):  # then it is said once more
        place.with_name(LAST_WORDS).write_text(text)
        before = folder.with_name(f"attempt_{int(start) - 1}")
        return any(words.read_text() == text for words in before.glob(f"*/{LAST_WORDS}"))
    return False


def rank() -> int:
    """This process's number among all of the launch."""
    return int(os.environ.get("RANK", "0"))


@cache
def _logger() -> logging.Logger:
    logger = logging.getLogger("engine")
    logger.setLevel(SAID)
    if not logger.handlers:
        logger.addHandler(_Console())
        logger.propagate = False  # else a program's own root handler would say everything twice
    return logger


class _Console(logging.Handler):
    """stdout and stderr as they are at each line; a line leaves tqdm's bar whole and is out at once."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno == SAID else sys.stderr
        lead = "" if stream.isatty() else f"{_TIME.formatTime(record, _TIME.datefmt)} r{rank()}  "
        tqdm.write("\n".join(lead + line for line in record.getMessage().split("\n")), file=stream)
        stream.flush()


_TIME = logging.Formatter(datefmt="%Y-%m-%d %H:%M:%S")
