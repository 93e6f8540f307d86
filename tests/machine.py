"""What a row of metrics.jsonl says of the machine, and not of the trajectory."""

import json
from pathlib import Path

MACHINE = frozenset({"images_per_second", "unix_time", "memory_gb"})


def trajectory(run: Path) -> list[dict]:
    """All rows of a run, without what depends on the machine."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in rows]
