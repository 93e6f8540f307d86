"""What measures many ranks on one machine still does."""

import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT, environment

pytestmark = pytest.mark.slow


def row_of(module: str, *arguments: object) -> dict[str, str]:
    """The row of the table that a module prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    names, _, cells = ([cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines())
    return dict(zip(names, cells, strict=True))


def test_ranks_meet():
    assert row_of("tests.distributed.handshake", 3)["ranks"] == "3"


def test_shards_of_ranks_that_are_not_there_are_counted():
    """Two replicas have the same ones."""
    full, hybrid = (row_of("tests.checkpoint.many", 4, *shard)["shards"] for shard in (("full",), ("hybrid", 2)))
    alone = row_of("tests.checkpoint.many", 1)["shards"]
    whole, spread = int(alone.replace(",", "")), int(full.replace(",", ""))
    assert whole < int(hybrid.replace(",", "")) < spread < 4 * whole
