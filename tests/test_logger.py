"""One voice: who speaks, where, and what a line in a log file begins with."""

import ast
import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from engine import logger
from engine.logger import complain_once, note, say, warn

ENGINE = Path(__file__).parents[1] / "engine"
LEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d r(\d+)  (.*)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_voice_has_its_stream(capsys):
    say("step 1/2")
    note("loading PyTorch")
    warn("a.png could not be read")
    out, err = capsys.readouterr()
    assert [LEAD.fullmatch(line).groups() for line in out.splitlines()] == [("0", "step 1/2")]
    assert [LEAD.fullmatch(line).groups() for line in err.splitlines()] == [
        ("0", "loading PyTorch"),
        ("0", "warning: a.png could not be read"),
    ]


def test_other_ranks_only_warn(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    say("step 1/2")
    note("loading PyTorch")
    warn("a.png could not be read")
    out, err = capsys.readouterr()
    assert out == ""
    assert LEAD.fullmatch(err.strip()).groups() == ("3", "warning: a.png could not be read")


def test_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    say("data      12 images\nloss      by chance 3.1")
    assert terminal.getvalue() == "data      12 images\nloss      by chance 3.1\n"


def test_every_line_of_a_text_has_time_and_rank(capsys):
    say("data      12 images\n100% of them  %s")
    said = [LEAD.fullmatch(line)[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["data      12 images", "100% of them  %s"]


def test_a_line_leaves_the_bar_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", terminal)
    with tqdm(total=2, file=terminal, ncols=40):
        say("step 1/2")
    cleared = terminal.getvalue().split("step 1/2\n")
    assert cleared[0].endswith("\r")
    assert "0/2" in cleared[1]


@pytest.fixture
def foreign():
    """A program's own handler at the logger `engine`."""
    kept, logger._logger().handlers[:] = logger._logger().handlers[:], []
    logger._logger.cache_clear()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("engine").addHandler(handler)
    yield records
    logging.getLogger("engine").handlers[:] = kept
    logger._logger.cache_clear()


def test_a_program_may_take_the_lines_over(foreign, capsys):
    say("step 1/2")
    warn("full")
    assert [(r.levelname, r.getMessage()) for r in foreign] == [("INFO", "step 1/2"), ("WARNING", "warning: full")]
    assert capsys.readouterr() == ("", "")


def test_there_is_no_other_voice():
    """But engine.door, which prints results bare."""
    speaks = re.compile(r"^(print|warnings\.warn|tqdm\.write|sys\.(__)?std(out|err)(__)?\.write)$")
    for path in sorted(ENGINE.rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        said = [name for name in map(ast.unparse, calls) if speaks.match(name)]
        assert not said or path in (ENGINE / "door.py", ENGINE / "logger.py"), (path, said)


def test_a_mistake_is_said_once_over_restarts(monkeypatch, tmp_path, capsys):
    """Each start under torchrun has a folder for its errors; what is new since the last start is always said."""
    said = []
    for start, words in enumerate(["error: a", "error: a", "error: b", "error: a"]):
        folder = tmp_path / f"attempt_{start}/0"
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{folder}/error.json")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        complain_once(words)
        said.append(capsys.readouterr().err)
    assert said == ["error: a\n", "", "error: b\n", "error: a\n"]
    for place in (os.devnull, f"{tmp_path}/gone/attempt_1/0/error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
        complain_once("error: a")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    complain_once("error: a")
    assert capsys.readouterr().err == "error: a\n" * 3
