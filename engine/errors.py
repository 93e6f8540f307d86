"""The three ways in which a command ends early, and an error as one line of text."""

from typing import Any


class UserError(Exception):
    """What the user must put right. Front doors print it as one line and exit with status 2."""


class RunFailed(Exception):
    """A run cannot go on: what happened, what was lost, how to go on. Front doors print it and exit with status 1."""


class Interrupted(Exception):
    """A signal ended the run in good order. Front doors exit with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def one_line(value: Any) -> str:
    """The value's text without line breaks or repeated blanks."""
    return " ".join(str(value).split())
