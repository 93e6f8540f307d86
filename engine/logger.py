"""One voice: what a command says to its user."""

import os
import sys
from typing import TextIO


def say(text: str) -> None:
    """One line for the user, on stderr: the last line of stdout belongs to the front doors."""
    print(text, file=sys.stderr, flush=True)


def say_once(text: str, stream: TextIO | None = None) -> None:
    """A line, on stderr unless told otherwise, from one process of every node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=stream or sys.stderr, flush=True)
