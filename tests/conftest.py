"""Every process of the tests computes with one thread: two test processes share two cores, and sums have one order."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch
