"""Every process of the tests computes with one thread: several share the cores, and sums have one order."""

import os

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def world():
    """This process as the only rank."""
    from engine.distributed.world import process_group

    with process_group() as world:
        yield world
