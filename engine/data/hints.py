"""What some images show of how all of them should be read, in a line each that names the key."""

from collections.abc import Sequence

import numpy as np

from engine.data.contents import spread
from engine.data.decode import Reading
from engine.data.jpeg import Jpeg
from engine.data.source import Source

_LOOKED_AT = 16  # images
_DARK = 65535 // 4  # 14 bits of 16, or fewer


def hints(source: Source, reading: Reading) -> list[str]:
    """Lines on images that come out dark as they are read; images that cannot be read say nothing here."""
    if reading.range is not None:
        return []
    found = [most for i in spread(len(source), _LOOKED_AT) if (most := _largest(source, i)) is not None]
    return [line] if (line := in_words(found)) else []


def in_words(largest: Sequence[int]) -> str | None:
    """What some images of 16 bits show by the largest value of each; None where they are not dark."""
    if not largest or not 0 < max(largest) <= _DARK:
        return None
    white = (1 << max(largest).bit_length()) - 1
    return (
        f"16-bit images hold values up to {max(largest)} of 65535 ({len(largest):,} looked at), and so come out dark; "
        f"data.range=[0, {white}] makes them bright"
    )


def _largest(source: Source, i: int) -> int | None:
    """The largest value of a grey image of 16 bits; None for another."""
    try:
        image = source.read(i)
        if isinstance(image, Jpeg) or not image.mode.startswith("I"):
            return None
        return int(np.asarray(image).max())
    except Exception:  # it is reported where it is used
        return None
