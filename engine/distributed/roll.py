"""How long ranks wait for each other, and which of them does not answer."""

import re
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from engine.distributed.world import LOST, ROLL_TIMEOUT, UNHURRIED, World
from engine.errors import one_line
from engine.torch_internals import all_groups, set_group_timeout

AFTERWARDS = timedelta(minutes=2)  # in which ranks say what happened: NCCL's watchdog ends them in many lines


def wait_at_most(world: World, timeout: timedelta) -> None:
    """From now on an operation that waits for other ranks fails after this time, on all groups but UNHURRIED ones; on
    groups of GPUs AFTERWARDS later, so that a rank has given up on its own GPU by then, and said so."""
    if world.size > 1:
        for group in all_groups():
            if group.group_desc != UNHURRIED:
                set_group_timeout(group, timeout + (dist.get_backend(group) == "nccl") * AFTERWARDS)


def lost_ranks(world: World, error: BaseException, timeout: timedelta) -> str | None:
    """Which ranks an operation has lost that failed with this error, in words; None for another error.

    Every rank that works calls it when an operation has failed so; it ends all communication. timeout: for which an
    operation of a step waits.
    """
    text = one_line(error)
    if world.size == 1 or not isinstance(error, RuntimeError) or not LOST.search(text):
        return None
    for group in (world.group, world.host_group, world.save_group):  # who waits for this rank is to come here, too
        with suppress(Exception):
            group.abort()
    waited = re.search(r"Timed out waiting (\d+)ms", text)  # which may be the long time that saves and evaluations have
    minutes = f"{int(waited[1]) / 60_000 if waited else timeout / timedelta(minutes=1):.2g} minutes"
    try:
        # Other ranks wait for rank 0, which ends when it knows, twice as long. All that lost a rank come at nearly the
        # same time.
        dist.monitored_barrier(world.roll_group, ROLL_TIMEOUT / 2, wait_all_ranks=True)
    except RuntimeError as absence:
        return _in_words(one_line(absence), minutes)
    return f"a rank did not answer for {minutes}, or its node was out of reach; now all of them do ({text[:300]})"


def _in_words(absence: str, minutes: str) -> str:
    silent = re.search(r"Ranks ([\d, ]+) failed to pass", absence)
    if silent or "Timed out waiting" in absence:
        numbers = silent[1].strip() if silent else "0"
        return f"rank{'s' if ',' in numbers else ''} {numbers} did not answer for {minutes}"
    if "received errors while waiting for send/recv from rank 0" in absence:
        return "rank 0 has ended, or has said which rank did not answer"
    return "another rank has ended, or its node is out of reach"
