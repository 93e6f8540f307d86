"""The three ways in which a command ends early, and what an error says in one line of text."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(Exception):
    """What the user must put right. Front doors print it as one line and exit with status 2."""

    def __str__(self) -> str:
        """On one line, whatever the names in it."""
        return escaped(super().__str__())


class SystemRefused(UserError):
    """The system did not read or write for a reason that may pass: a full disk, a server that restarts."""


class RunFailed(Exception):
    """A run cannot go on: what happened, what was lost, how to go on. Front doors print it and exit with status 1.

    alone: it happened on this rank, and the others will only know that they have lost it.
    """

    def __init__(self, text: str, *, alone: bool = False):
        super().__init__(text)
        self.alone = alone


class Interrupted(BaseException):
    """A run was asked to stop, and ends in good order. Like KeyboardInterrupt it is no Exception, so that nothing on
    its way takes it for a fault.

    signum: of the signal that asked, 0 for the file STOP; where: at which point, and what is saved, in words. Both are
    said (engine.distributed.signals), and front doors exit with 128 + signum, as shells have it, or with 0.
    """

    def __init__(self, signum: int, where: str):
        super().__init__(signum, where)
        self.signum, self.where = signum, where

    @property
    def status(self) -> int:
        return 128 + self.signum if self.signum else 0


def escaped(text: str) -> str:
    """The text with line breaks, and what else a terminal would not show as it is, as Python writes them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(value: Any) -> str:
    """The value's text without line breaks or repeated blanks."""
    return " ".join(str(value).split())


def reason(error: BaseException) -> str:
    """Why it failed, in one line: of an OSError what the system says, without the path."""
    return one_line(getattr(error, "strerror", None) or error)


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """What an error ends with: the word that the user may have meant, or else `otherwise`."""
    names = list(known)
    nearest = [name for name in names if word and name.startswith(word)] or difflib.get_close_matches(word, names, 1)
    return f"did you mean {nearest[0]}?" if nearest else otherwise


def listed(names: Sequence[str], most: int = 10, between: str = ", ") -> str:
    """The first `most` of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
