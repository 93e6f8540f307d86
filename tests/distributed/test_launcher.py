"""What a process takes of its machine before PyTorch is loaded, and as a rank."""

import os
import resource

import pytest

from engine.distributed import launcher
from engine.distributed.launcher import allow_open_files, share_compilers


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
