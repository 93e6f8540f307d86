"""How much memory this process holds and held at most. Linux only; elsewhere the peak alone, since the start."""

import resource
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    return _from_status("VmRSS")


def peak_bytes() -> int:
    """The most since the start or `reset_peak`."""
    # Not getrusage where there is better: a child inherits its parent's figure there.
    return _from_status("VmHWM")


def reset_peak() -> None:
    if _RESET.exists():
        _RESET.write_text("5")


def _from_status(key: str) -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
