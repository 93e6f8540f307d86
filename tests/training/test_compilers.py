"""What compiling needs is looked for before a run, and what is left of a killed compilation is said in one line."""

import ctypes
from pathlib import Path

import pytest
import torch

from engine.errors import RunFailed, UserError
from engine.recipe.sections import Parallel
from engine.runs.failures import torn_code_in_words
from engine.training.parallelize import check_compiler, has_c_compiler

FOUND = [(None, "gcc", True), (None, "clang", True), (None, "icx", False), ("icx", "icx", True), ("icx", "gcc", False)]


@pytest.mark.parametrize(("named", "there", "found"), FOUND)
def test_tritons_compiler_is_looked_for_where_triton_looks(tmp_path, monkeypatch, named, there, found):
    (tmp_path / there).write_text("#!/bin/sh")
    (tmp_path / there).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    assert has_c_compiler() is found


def test_a_gpu_without_a_c_compiler_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"^parallel.compile \(true\) needs a C compiler on a GPU, .*=false$"):
        check_compiler(Parallel(compile=True, precision="bf16"), torch.device("cuda"))
    check_compiler(Parallel(compile=False, precision="bf16"), torch.device("cuda"))


HEADER = Path(torch._C.__file__).read_bytes()[:64]


@pytest.mark.parametrize("found", [b"", b"\x7fELF", HEADER, bytes(1000)], ids=["none", "begun", "header", "zeros"])
def test_half_a_file_of_compiled_code_names_the_folder_to_delete(tmp_path, monkeypatch, found):
    """The words are the system's own, inside an error of torch's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torn = tmp_path / "ab/cd.so"
    torn.parent.mkdir()
    torn.write_bytes(found)

    @torn_code_in_words()
    def load() -> None:
        try:
            ctypes.CDLL(str(torn))
        except OSError as error:
            raise RuntimeError("backend='inductor' raised:\nand many lines") from error

    with pytest.raises(RunFailed) as failed:
        load()
    assert str(failed.value) == (
        f"compiled code is broken ({torn}), as of a compilation that was killed; delete the folder {tmp_path}, and the "
        "same command goes on"
    )
    with pytest.raises(RuntimeError, match="another"), torn_code_in_words():
        raise RuntimeError("another")
