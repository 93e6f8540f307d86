"""What a process takes of its machine before PyTorch is loaded, and as a rank."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.distributed import launcher
from engine.distributed.launcher import allow_open_files, share_compilers
from tests.distributed.commands import ON_LINUX
from tests.distributed.launch import ROOT


@pytest.mark.parametrize(("cores", "ranks", "each"), [(96, 8, "12"), (2, 8, "1"), (128, 1, "32")])
def test_ranks_share_the_cores_for_compiling(monkeypatch, cores, ranks, each):
    monkeypatch.setattr(launcher, "cores", lambda: cores)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    share_compilers(ranks)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "7"
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    share_compilers(ranks)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == each


def test_as_many_files_as_the_system_allows():
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, 256), most))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@ON_LINUX
def test_what_takes_over_a_rank_whose_launcher_died_is_no_launcher():
    """It may have died before the rank first looked who its parent is."""
    commands = {("sleep", True): False, ("sleep", False): True, (sys.executable, True): True}
    for (command, alone), expected in commands.items():
        arguments = [command, "60"] if command == "sleep" else [command, "-c", "import time; time.sleep(60)"]
        with subprocess.Popen(arguments, start_new_session=alone) as process:
            try:
                while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                    time.sleep(0.01)
                assert launcher.may_be_launcher(process.pid) == expected
            finally:
                process.kill()
    with subprocess.Popen(["sleep", "0"]) as process:
        pass
    assert launcher.may_be_launcher(process.pid)  # unknown


@ON_LINUX
def test_a_rank_that_begins_after_its_launcher_died_ends(tmp_path):
    code = "import os, time, engine.distributed.launcher as l; l.end_with_launcher(os.getppid()); time.sleep(60)"
    script = '(sleep 1; exec "$0" -c "$1" 2> "$2") &'
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "0", "PYTHONPATH": str(ROOT)}
    said = tmp_path / "said"
    subprocess.run(
        ["sh", "-c", script, sys.executable, code, said], env=environment, start_new_session=True, check=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and "this rank exits" not in (said.read_text() if said.exists() else ""):
        time.sleep(0.2)
    assert "the launcher is gone: this rank exits" in said.read_text()
