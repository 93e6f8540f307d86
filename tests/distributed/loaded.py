"""Ranks that are forked from processes which have loaded PyTorch and the engine: a launch without the seconds of that.

For what ranks compute and say. How launchers start, signal and end them is shown by real ones (commands.py).

Two such processes serve all launches of a test process and end with it. Their hash seeds differ, as those of any two
launched processes do: the order of a set is another one on every second rank. What a rank leaves running is waited for.
"""

import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Timer

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
LOADED = ("engine.runs.pretrain", "engine.runs.finetune", "engine.runs.linear", "torch._dynamo", "tensorboard.summary")
LOOK_SECONDS = 0.02
PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>: what its ranks leave behind becomes a child of this process


# ---- in the test's process -------------------------------------------------------------------------------------------


@cache
def _server(number: int) -> subprocess.Popen:
    """Ends when this process does: it then reads the end of its requests."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(ranks: int, module: str, arguments: list[str], env: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """Run `python -m module arguments` on so many ranks, or for 0 in one process that knows of no launcher; returns
    (the largest exit status, stdout, stderr)."""
    if ranks:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        place = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
        env = env | {name: str(value) for name, value in place.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        request = {"module": module, "arguments": arguments, "env": env, "out": out.name, "err": err.name}
        places = [str(rank) for rank in range(ranks)] or [None]
        servers = [_server(number) for number in range(min(len(places), 2))]
        timer = Timer(timeout, _end, [servers])
        timer.start()
        for number, server in enumerate(servers):
            server.stdin.write(json.dumps(request | {"ranks": places[number::2]}) + "\n")
            server.stdin.flush()
        ends = [server.stdout.readline() for server in servers]
        timer.cancel()
        said = out.read().decode(), err.read().decode()
    assert all(ends), f"{module} hangs on {ranks} ranks, and said {said}"
    return max(status for line in ends for status in json.loads(line)), *said


def _end(servers: list[subprocess.Popen]) -> None:
    """With their ranks; the next launch starts others."""
    _server.cache_clear()
    for server in servers:
        os.killpg(server.pid, signal.SIGKILL)


# ---- in a process that has loaded them -------------------------------------------------------------------------------


def _serve() -> str | None:
    """Fork ranks as requests say; returns in a rank with what it shall run, and here after the last request."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks, statuses = set(), []
        for rank in request["ranks"]:
            if (pid := os.fork()) == 0:
                _become(rank, request)
                return request["module"]
            ranks.add(pid)
        for pid, status in _ends():
            if pid in ranks:
                statuses.append(abs(os.waitstatus_to_exitcode(status)))
        print(json.dumps(statuses), flush=True)
    return None


def _ends() -> Iterator[tuple[int, int]]:
    """(process, status) of all that runs, until nothing does; where the test's process has ended, at once."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                yield pid, status
            elif select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
                os.killpg(0, signal.SIGKILL)


def _become(rank: str | None, request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["env"] if rank is None else request["env"] | {"RANK": rank, "LOCAL_RANK": rank})
    sys.argv = [request["module"], *request["arguments"]]
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


if __name__ == "__main__":
    for name in LOADED:
        import_module(name)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if module := _serve():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
