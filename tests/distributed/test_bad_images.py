"""What one rank has said of an unreadable image, no other says again (tests/distributed/bad_images.py)."""

import json

from tests.distributed.bad_images import RANKS
from tests.distributed.launch import on_ranks


def test_an_unreadable_image_is_said_once_in_all():
    """Though each epoch shows it to another rank."""
    out, err = on_ranks(RANKS, "tests.distributed.bad_images")
    said = [line.split("warning: ")[1].split()[0] for line in err.splitlines() if "could not be read" in line]
    assert sorted(said) == ["a.png", "b.png", "c.png", "d.png"]
    assert json.loads(out.splitlines()[-1])["counts"] == [2, 5, 7, 9]
