"""Images that could not be read, and how they are reported."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.logger import warn


class Bad(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


def report(bad: Sequence[Bad], consequence: str) -> None:
    """Each unreadable image, from the rank that met it."""
    for image in bad:
        warn(f"{image.name} could not be read ({image.reason}); {consequence}")
