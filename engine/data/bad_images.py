"""Images that could not be read, and how they are reported."""

import sys
from collections.abc import Sequence
from typing import NamedTuple


class Bad(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


def report(bad: Sequence[Bad], consequence: str) -> None:
    """Each unreadable image, from the rank that met it."""
    for image in bad:
        print(f"warning: {image.name} could not be read ({image.reason}); {consequence}", file=sys.stderr)
