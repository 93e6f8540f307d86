"""A rank, a launcher or a node dies: torchrun starts again by itself, and the run ends as if nothing had been."""

import itertools
import os
import secrets
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed.commands import (
    ON_LINUX,
    QUICKSTART,
    TORCHRUN,
    TWO_RANKS,
    Command,
    Ended,
    checkpoint_sums,
    overrides,
    run,
    timeless,
    torchrun_ranks,
)
from tests.distributed.launch import TIMEOUT, environment

pytestmark = ON_LINUX

LAST = 16
STARTED = "ranks     2 on CPU"  # what a start says first
RESTARTING = (*TWO_RANKS[:-2], "--max-restarts=2", *TWO_RANKS[-2:])
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a store of its own for every start: what the README advises
STORES = pytest.mark.parametrize("more", [{}, OWN_STORE], ids=["kept store", "own store"])


def arguments(folder: Path) -> list:
    return [QUICKSTART, *overrides(folder, train__max_steps=LAST)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(*TWO_RANKS, *arguments(folder)).code == 0
    return folder


def assert_equal(folder: Path, undisturbed: Path) -> None:
    assert timeless(folder) == timeless(undisturbed)
    assert checkpoint_sums(folder) == checkpoint_sums(undisturbed)


def ranks_in_training(launchers: list[Command], start: int = 1) -> dict[int, int]:
    """{rank: process} of a launch's start of this number, when it has made three steps: all in all there are more."""
    deadline = time.monotonic() + TIMEOUT

    def said_by_this_start() -> str:
        assert time.monotonic() < deadline, [launcher.said() for launcher in launchers]
        time.sleep(0.02)
        starts = [launcher.said()[0].split(STARTED)[1:] for launcher in launchers]
        return next(iter([*itertools.chain(*starts), *[""] * start][start - 1 :]))

    while not said_by_this_start():
        pass
    ranks = {rank: pid for launcher in launchers for rank, pid in torchrun_ranks(launcher).items()}
    while said_by_this_start().count("\nstep ") < 3:
        pass
    return ranks


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_was_killed(tmp_path):
    """With the store that torchrun keeps, as for those who have not read the README."""
    with Command(*RESTARTING, *arguments(tmp_path / "run")) as command:
        os.kill(ranks_in_training([command])[1], signal.SIGKILL)
        ended = command.end()
    assert ended.code == 0, ended
    assert ended.out.count(STARTED) == 2
    assert [row["step"] for row in timeless(tmp_path / "run")] == list(range(1, LAST + 1))


@pytest.mark.faults
@STORES
def test_two_ranks_killed_one_after_the_other(tmp_path, undisturbed, more):
    with Command(*RESTARTING, *arguments(tmp_path / "run"), env=environment(**more)) as command:
        for rank in (0, 1):
            os.kill(ranks_in_training([command], start=rank + 1)[rank], signal.SIGKILL)
        ended = command.end()
    assert ended.code == 0, ended
    assert ended.out.count(STARTED) == 3
    assert_equal(tmp_path / "run", undisturbed)


@pytest.mark.faults
def test_what_the_user_must_put_right_is_said_once(tmp_path):
    """torchrun starts again whatever has ended; a mistake that its ranks see alike comes back each time."""
    ended = run(*RESTARTING, QUICKSTART, *overrides(tmp_path / "run", data__root=tmp_path / "none"))
    assert ended.code == 1
    assert ended.out.count("loading PyTorch") == 3, "it starts twice more"
    assert [line for line in ended.err.splitlines() if "error: " in line] == [
        f"error: data.root ({tmp_path}/none) must exist; pass data.root=/path/to/images"
    ]


# ---- two nodes -------------------------------------------------------------------------------------------------------


class Nodes:
    """Two launchers with one rank each, which meet at one address of this machine."""

    def __init__(self, folder: Path, stack: ExitStack, more: dict[str, str]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.endpoint = f"localhost:{free.getsockname()[1]}"
        self.folder, self.stack, self.more, self.name = folder, stack, more, secrets.token_hex(4)

    def start(self, *, hosts: bool) -> Command:
        """hosts: whether it keeps the launchers' meeting place; the first must."""
        launcher = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        launcher += [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.name}", "--local-addr=localhost"]
        conf = f"--rdzv-conf=is_host={hosts},join_timeout=120"
        node = Command(*launcher, conf, "-m", "engine.run", *arguments(self.folder), env=environment(**self.more))
        return self.stack.enter_context(node)

    def both(self) -> list[Command]:
        first = self.start(hosts=True)
        return [first, self.start(hosts=False)]


def ends(nodes: list[Command]) -> list[Ended]:
    return [node.end() for node in nodes]


@pytest.mark.faults
@STORES
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_nodes(tmp_path, undisturbed, more, rank):
    """The other node's rank is held for a while: its launcher notices later, and counts for itself."""
    with ExitStack() as stack:
        nodes = Nodes(tmp_path / "run", stack, more).both()
        ranks = ranks_in_training(nodes)
        os.kill(ranks[1 - rank], signal.SIGSTOP)
        os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(2)
        os.kill(ranks[1 - rank], signal.SIGCONT)
        for ended in ends(nodes):
            assert ended.code == 0, ended
    assert_equal(tmp_path / "run", undisturbed)


@pytest.mark.faults
def test_a_node_is_replaced_while_the_other_launcher_stays(tmp_path, undisturbed):
    with ExitStack() as stack:
        pair = Nodes(tmp_path / "run", stack, OWN_STORE)
        nodes = pair.both()
        ranks_in_training(nodes)
        for pid in nodes[1].processes():
            os.kill(pid, signal.SIGKILL)
        nodes[1].process.wait()
        for ended in ends([nodes[0], pair.start(hosts=False)]):
            assert ended.code == 0, ended
    assert_equal(tmp_path / "run", undisturbed)
