"""Every process of the tests computes on the CPU with one thread: several share the cores, and sums have one order.

What a GPU has to show is tests/on_a_gpu.py's; CUDA_VISIBLE_DEVICES=0 lets these tests see one nevertheless.
"""

import multiprocessing
import os
import signal

import pytest
from hypothesis import settings

# Before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # two ranks want two GPUs
# A shell without job control lets what it starts in the background ignore Ctrl-C, and so would doors under test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
# Processes of the one forkserver begin with what takes seconds to load, whichever test asks for the first.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.distributed.fsdp", "engine.checkpoint.background", "engine.evaluation.subject"]
)


@pytest.fixture(scope="module")
def world():
    """This process as the only rank."""
    from engine.distributed.world import process_group

    with process_group() as world:
        yield world


@pytest.fixture
def here(monkeypatch):
    """Proofs in this process, to save the seconds in which another one would import everything again."""
    monkeypatch.setattr("engine.weights.export._in_own_process", lambda function, *arguments: function(*arguments))
