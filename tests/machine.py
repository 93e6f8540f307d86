"""What a row of metrics.jsonl says of the machine, and not of the trajectory."""

MACHINE = frozenset({"images_per_second", "unix_time", "memory_gb"})
