"""A rank, a launcher or a node dies: torchrun starts again by itself, and the run ends as if nothing had been."""

import os
import secrets
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed.commands import (
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
from tests.distributed.launch import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

LAST = 9
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


def kill_rank(command: Command, rank: int) -> None:
    os.kill(torchrun_ranks(command)[rank], signal.SIGKILL)


def test_torchrun_restarts_after_a_rank_was_killed(tmp_path):
    """With the store that torchrun keeps, as for those who have not read the README."""
    with Command(*RESTARTING, *arguments(tmp_path / "run")) as command:
        command.wait_for("step 3/")
        kill_rank(command, 1)
        ended = command.end()
    assert ended.code == 0, ended
    assert ended.out.count("resumed ") == 1
    assert [row["step"] for row in timeless(tmp_path / "run")] == list(range(1, LAST + 1))


@pytest.mark.faults
@STORES
def test_two_ranks_killed_one_after_the_other(tmp_path, undisturbed, more):
    with Command(*RESTARTING, *arguments(tmp_path / "run"), env=environment(**more)) as command:
        command.wait_for("step 3/")
        kill_rank(command, 0)
        command.wait_for("step 6/")
        kill_rank(command, 1)
        ended = command.end()
    assert ended.code == 0, ended
    assert ended.out.count("resumed ") == 2
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


def of_rank(nodes: list[Command], rank: int) -> Command:
    """The node that has this rank."""
    return next(node for node in nodes if rank in torchrun_ranks(node))


def ends(nodes: list[Command]) -> list[Ended]:
    return [node.end() for node in nodes]


@pytest.mark.faults
@STORES
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_nodes(tmp_path, undisturbed, more, rank):
    """The other node's rank is held for a while: its launcher notices later, and counts for itself."""
    with ExitStack() as stack:
        nodes = Nodes(tmp_path / "run", stack, more).both()
        wait_for_any(nodes, "step 3/")
        other = torchrun_ranks(of_rank(nodes, 1 - rank))[1 - rank]
        os.kill(other, signal.SIGSTOP)
        kill_rank(of_rank(nodes, rank), rank)
        time.sleep(2)
        os.kill(other, signal.SIGCONT)
        for ended in ends(nodes):
            assert ended.code == 0, ended
    assert_equal(tmp_path / "run", undisturbed)


@pytest.mark.faults
def test_a_node_is_replaced_while_the_other_launcher_stays(tmp_path, undisturbed):
    with ExitStack() as stack:
        pair = Nodes(tmp_path / "run", stack, OWN_STORE)
        nodes = pair.both()
        wait_for_any(nodes, "step 3/")
        for pid in nodes[1].processes():
            os.kill(pid, signal.SIGKILL)
        nodes[1].process.wait()
        for ended in ends([nodes[0], pair.start(hosts=False)]):
            assert ended.code == 0, ended
    assert_equal(tmp_path / "run", undisturbed)


def wait_for_any(nodes: list[Command], text: str) -> None:
    """Returns when one of them, the one with rank 0, has said it."""
    deadline = time.monotonic() + 120
    while not any(text in node.said()[0] for node in nodes):
        assert time.monotonic() < deadline, [node.said() for node in nodes]
        time.sleep(0.05)
