"""Real launches for tests: torchrun on this machine, over gloo or whatever the devices ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def results(ranks: int, module: str, *arguments: object) -> list[dict[str, Any]]:
    """Launch a module that prints JSON objects on rank 0; returns them, or fails with what it said."""
    done = torchrun(ranks, module, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
