"""Who writes in a run directory, said in its `.lock`: where the file system has no locks, that is all there is.

A launch says its host, process and start, and touches the file while it lives. On its own host a process is alive or
it is not. Of another host's only the touches tell, and nobody takes its place by a guess: a person deletes the file.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import UserError, reason
from engine.files import draft
from engine.logger import warn

TOUCH_SECONDS = 10.0
FRESH_SECONDS = 120.0  # since the last touch, in which a launch elsewhere counts as alive
RETRY_SECONDS = 0.5
SETTLE_SECONDS = 2.0  # in which of two launches that came at once the earlier sees the later's name


@contextmanager
def claimed(path: Path, locked: bool, seconds: float = 0.0) -> Iterator[None]:
    """Say in `path` that this process holds it, and touch it to the end of the body or of the process.

    locked: whether it holds the file's lock, so that nobody else can. Raises UserError where it does not and another
    launch may be alive, still after `seconds`; and OSError.
    """
    deadline = time.monotonic() + seconds
    mine = json.dumps(_self())
    if locked:
        path.write_text(mine)
    while path.read_text() != mine:
        while who := _holder(path):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"run.dir ({path.parent}) must not be in use by another launch: {who}; "
                    "stop it, delete that file if it is gone, or pass another run.dir"
                )
            time.sleep(RETRY_SECONDS)
        path.write_text(mine)
        time.sleep(SETTLE_SECONDS)
    over = threading.Event()
    threading.Thread(target=_touch, args=(path, mine, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with suppress(OSError):
            if path.read_text() == mine:
                path.write_text("")


def _holder(path: Path) -> str | None:
    """Whose launch may be alive there, in words."""
    holder = _read(path)
    if holder is None:
        return None
    with draft(path) as place:
        place.touch()  # the file system's own clock, which may differ from this host's
        seconds = place.stat().st_mtime - path.stat().st_mtime
    alive = _is_alive(holder)
    if alive is False or (alive is None and seconds >= FRESH_SECONDS):
        return None
    who = f"process {holder.get('process', '(unknown)')} on {holder.get('host', 'an unknown host')}"
    return f"{who} touched {path} {seconds:.0f} s ago"


def _read(path: Path) -> dict | None:
    """What a holder has said; None where there is none, {} where it cannot be understood."""
    text = path.read_text(errors="replace")
    try:
        said = json.loads(text or "null")
    except ValueError:
        return {}
    return said if isinstance(said, dict | None) else {}


def _self() -> dict[str, str | int]:
    """What tells this process, and this claim of it, from all others."""
    return {
        "launch": secrets.token_hex(4),
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "process": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_alive(holder: dict) -> bool | None:
    """None where it is, or may be, another host's."""
    process = holder.get("process")
    is_here = (holder.get("host"), holder.get("namespace")) == (socket.gethostname(), _namespace())
    if not is_here or type(process) is not int:
        return None
    return _born(process) == holder.get("born") != ""


def _namespace() -> str:
    """In which process numbers count: containers of one host name may have several. Empty where the system has none."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _born(process: int) -> str:
    """When a process began, which tells it from a later one of its number; empty where none lives."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in ("Z", "X") else ""  # dead, and nobody has asked how it ended
    return ""


def _touch(path: Path, mine: str, over: threading.Event) -> None:
    said = False
    while not over.wait(TOUCH_SECONDS):
        try:
            if path.read_text() != mine:
                warn(f"{path} has another launch's name: two write in {path.parent}; stop one of them")
                return
            os.utime(path)
        except OSError as error:
            if over.is_set() or not path.parent.exists():
                return
            if not said:
                warn(f"{path} could not be touched, so another launch may write in {path.parent}: {reason(error)}")
            said = True
