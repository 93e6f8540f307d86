"""The step's laws on one and on two ranks, one launch each (tests/distributed/laws.py)."""

import pytest

from tests.distributed.launch import results
from tests.distributed.laws import LAWS


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_laws(ranks):
    assert [found["law"] for found in results(ranks, "tests.distributed.laws")] == [law.__name__ for law in LAWS]
