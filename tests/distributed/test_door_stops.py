"""A door that is asked to stop, or killed: it ends at once, and no draft stays beside what it was to write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import embed
from engine.files import shared_draft
from tests.distributed.launch import ROOT, TIMEOUT, command, environment
from tests.runs.small import CHECKPOINT, FEW, VAL

DATA = VAL.parent  # 6,000 images


def begun(out: Path, *line: str) -> subprocess.Popen:
    """A door's process, in a session of its own, once it has begun to write `out`."""
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + TIMEOUT
    while not [file for draft in drafts(out) for file in (draft.rglob("*") if draft.is_dir() else [draft])]:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def drafts(out: Path) -> list[Path]:
    return [path for folder in (out.parent, out) for path in folder.glob("*.tmp-*")]


def door(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"engine.{name}", *map(str, arguments)]


def check_stopped(out: Path, line: list[str], signum: signal.Signals, ranks: int = 1) -> None:
    process = begun(out, *line)
    os.killpg(process.pid, signum)
    _, said = process.communicate(timeout=TIMEOUT)
    lines = [line for line in said.decode().replace("\r", "\n").splitlines() if "stopped by" in line]
    assert lines == [f"stopped by {signum.name}; nothing half done is left"], said.decode()
    assert "Traceback" not in said.decode() or ranks > 1  # torchrun's own
    assert process.returncode == (128 + signum if ranks == 1 else 1)
    assert not drafts(out)


def test_a_stopped_embedding_leaves_nothing_and_what_a_killed_one_leaves_is_swept(tmp_path):
    out = tmp_path / "a.npy"
    line = door("embed", CHECKPOINT, out, "--data", DATA, "--workers", 1)
    check_stopped(out, line, signal.SIGTERM)
    assert not list(tmp_path.iterdir())

    process = begun(out, *line)
    process.kill()
    process.communicate(timeout=TIMEOUT)
    mine = tmp_path / "a.npy.tmp-mine"
    mine.touch()
    assert len(drafts(out)) == 3
    with shared_draft(out) as of_another_call:
        embed.main([CHECKPOINT, str(out), "--data", str(FEW), "--workers", "0"])
        assert sorted(drafts(out)) == sorted([mine, of_another_call])


@pytest.mark.slow
def test_ranks_of_an_embedding_stop_together(tmp_path):
    out = tmp_path / "a.npy"
    line = command(2, "engine.embed", CHECKPOINT, out, "--data", DATA, "--workers", 1)
    check_stopped(out, line, signal.SIGTERM, ranks=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_export_and_its_proof_leave_nothing(tmp_path):
    line = door("export", CHECKPOINT, tmp_path / "out", "--format", "timm")
    for signum in (signal.SIGINT, signal.SIGHUP):
        check_stopped(tmp_path / "out", line, signum)
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stopped_packing_keeps_whole_tars_alone(tmp_path):
    check_stopped(tmp_path / "to" / "x", door("pack", DATA, tmp_path / "to"), signal.SIGINT)


FAILS = """
import os, signal, sys
from engine.door import enter
from engine.errors import RunFailed

def main(arguments):
    try:
        raise RunFailed("a rank is gone")
    finally:  # a run takes its leave, and meanwhile its launcher ends this rank
        os.kill(os.getpid(), signal.SIGTERM)

enter(main)
"""


@pytest.mark.parametrize(("rank", "said"), [("0", "failed: a rank is gone"), ("1", "")])
def test_a_run_that_fails_says_why_though_its_launcher_ends_it(rank, said):
    line = [sys.executable, "-c", FAILS]
    ended = subprocess.run(line, cwd=ROOT, env=environment(RANK=rank), capture_output=True, text=True, timeout=TIMEOUT)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (1, "", said)
