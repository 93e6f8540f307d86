"""Launches for tests, over gloo or whatever the devices ask for: ranks of torchrun's, and ranks that are at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.distributed import loaded

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds after which a launch counts as hanging: one that compiles takes minutes on a busy machine


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without a launcher's variables in it; one thread per process."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return inherited | {"OMP_NUM_THREADS": "1"} | extra


def command(ranks: int, module: str, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", module, *map(str, arguments)]


def torchrun(ranks: int, module: str, *arguments: object, **extra: str) -> subprocess.CompletedProcess:
    """Launch and wait; output as text."""
    return subprocess.run(
        command(ranks, module, *arguments),
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def on_ranks(ranks: int, module: str, *arguments: object) -> tuple[str, str]:
    """(stdout, stderr) of a module that ends well on so many ranks, which no launcher has to start."""
    status, out, err = loaded.launch(ranks, module, list(map(str, arguments)), environment(), TIMEOUT)
    assert status == 0, out[-2000:] + err[-6000:]
    return out, err


def results(ranks: int, module: str, *arguments: object) -> list[dict[str, Any]]:
    """The JSON objects that a module prints on rank 0."""
    out, _ = on_ranks(ranks, module, *arguments)
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]
