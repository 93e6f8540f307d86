"""The same command twice, and once in two halves: the sha256 of all that each run's last checkpoint holds.

    python -m tests.distributed.same_bits FOLDER RECIPE [dotted.key=value ...]

20 steps in one process, on the GPU where there is one. Prints one JSON line, whose three values must be equal.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from engine.checkpoint.load import read_tensors
from tests.distributed.launch import ROOT, environment

STEPS = {"once": (20,), "again": (20,), "halves": (10, 20)}


def digest(checkpoint: Path) -> str:
    """Of every tensor: name, type, shape and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(read_tensors(checkpoint)):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(folder: Path, recipe: Path, *overrides: str) -> dict[str, str]:
    """{run: digest}; each run, and each half of one, is a process of its own."""
    for name, ends in STEPS.items():
        for steps in ends:
            values = [*overrides, f"run.dir={folder / name}", f"train.max_steps={steps}"]
            command = [sys.executable, "-m", "engine.run", str(recipe), *values]
            subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=sys.stderr)
    return {name: digest(folder / name / f"checkpoints/step_{max(ends):07d}") for name, ends in STEPS.items()}


if __name__ == "__main__":
    print(json.dumps(digests(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])))
