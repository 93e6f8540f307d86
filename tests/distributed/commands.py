"""A command as a user starts it, watched from outside: its words, its processes and what they leave behind."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import loaded
from tests.distributed.launch import ROOT, TIMEOUT, environment
from tests.machine import trajectory

LEAD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d r\d+  ", re.MULTILINE)
GONE = 60  # seconds after which a process that nobody waits for counts as left behind
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ONE_PROCESS = (sys.executable, "-m", "engine.run")
OWN_RANKS = (*ONE_PROCESS, "--ranks", "2")
TWO_RANKS = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "engine.run")

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
QUICKSTART = ROOT / "recipes/quickstart.yaml"
SMALL = {
    "model.dim": 32,
    "model.projector_hidden_dim": 64,
    "model.output_dim": 32,
    "train.global_batch_size": 32,
    "data.workers": 1,
    "log.every_steps": 1,
    "checkpoint.every_steps": 2,
    "evaluate.knn_every_epochs": 0,
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """A running command. Its descendants are known by a mark in their environment, whoever their parent is now.

    A context manager, which ends what still runs.
    """

    def __init__(self, *arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None, **more: bool):
        self.mark = secrets.token_hex(8)
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        # Without devices: what is promised here holds anywhere, and two ranks need no two of them.
        marked = {"COMMAND_MARK": self.mark, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=cwd,
            env=(env or environment()) | marked,
            stdin=subprocess.DEVNULL,
            stdout=self.files[0],
            stderr=self.files[1],
            **more,
        )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        for file in self.files:
            file.close()

    def said(self) -> tuple[str, str]:
        """What it wrote so far to stdout and to stderr, without the time and the rank at the head of a line."""
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self.files)
        return LEAD.sub("", out), LEAD.sub("", err)

    def processes(self) -> set[int]:
        """Those of the command that are alive now."""
        self.process.poll()
        return {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if self._is_mine(entry)}

    def _is_mine(self, entry: Path) -> bool:
        try:
            return self.mark.encode() in (entry / "environ").read_bytes()
        except OSError:  # it has ended meanwhile
            return False

    def wait_for(self, text: str) -> None:
        """Returns when stdout has the text."""
        self._wait(lambda: text in self.said()[0] or self.process.poll() is not None, TIMEOUT, repr(text))
        assert text in self.said()[0], f"it ended before {text!r} and said {self.said()}"
        self.processes()

    def end(self) -> Ended:
        """Wait for the end, and see that nothing is left of it."""
        self._wait(lambda: self.process.poll() is not None, TIMEOUT, "its end")
        self._wait(lambda: not self.processes(), GONE, "the end of all its processes")
        return Ended(self.process.returncode, *self.said())

    def _wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"no {what}; processes {self.processes()}; it said {self.said()}"
            time.sleep(0.05)


def ranks_of(command: Command) -> list[int]:
    """The processes of its ranks, which were started in their order."""
    threads = Path(f"/proc/{command.process.pid}/task").glob("*/children")
    children = [int(pid) for path in threads for pid in path.read_text().split()]
    return sorted({pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()})


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in order; of a rank, its loading processes."""
    found = {int(p) for path in Path(f"/proc/{pid}/task").glob("*/children") for p in path.read_text().split()}
    return sorted(p for p in found if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes())


def run(*arguments: object, **options) -> Ended:
    with Command(*arguments, **options) as command:
        return command.end()


def forked(ranks: int, *arguments: object, env: dict[str, str] | None = None) -> Ended:
    """How `engine.run` ends on so many ranks, or in a process of its own (0), where it matters to nobody who starts it;
    torchrun would say 1 where a rank says 2."""
    bare = (env or environment()) | {"CUDA_VISIBLE_DEVICES": ""}
    code, *said = loaded.launch(ranks, "engine.run", list(map(str, arguments)), bare, TIMEOUT)
    return Ended(code, *(LEAD.sub("", text) for text in said))


def torchrun_ranks(command: Command) -> dict[int, int]:
    """{rank: process} of what torchrun has started; their loader workers are none."""
    return {
        int(found[1]): pid
        for pid in command.processes()
        if (found := _rank_in(pid)) and not _rank_in(int(_status(pid).partition("PPid:\t")[2].split()[0]))
    }


def _rank_in(pid: int) -> re.Match | None:
    with suppress(OSError):
        return re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes().decode())
    return None


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


# ---- small runs, and what is read of them ----------------------------------------------------------------------------


def overrides(folder: Path, **values: object) -> list[str]:
    """Arguments of a small run in `folder`; `train__max_steps=3` stands for train.max_steps=3."""
    values = SMALL | {"run.dir": folder} | {name.replace("__", "."): value for name, value in values.items()}
    return [f"{name}={value}" for name, value in values.items()]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    """The rows of losses without what depends on the clock."""
    return [row for row in trajectory(folder) if "loss" in row]


def stopped_at(ended: Ended) -> int:
    """The step that a run, asked to stop, says is saved."""
    (line,) = [line for line in ended.out.splitlines() if line.startswith("stopped by ")]
    words = re.fullmatch(r"stopped by .+ after step (\d+), which is saved.*; the same command goes on", line)
    assert words, line
    return int(words[1])


def resumed_at(ended: Ended) -> int:
    line = next(line for line in ended.out.splitlines() if line.startswith("resumed "))
    return int(line.partition(" at step ")[2].split()[0].rstrip(":"))


def checkpoint_sums(folder: Path) -> dict[str, str]:
    """{file: checksum} of the newest checkpoint's tensors."""
    newest = folder / "checkpoints" / (folder / "checkpoints/latest").read_text().strip()
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".distcp")}
