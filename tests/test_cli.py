"""The options that front doors share mean one thing, and a result is the last line, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import Parser, add_images, decoding_workers, given_source, image_roots
from engine.distributed.launcher import MOST_DECODERS
from engine.door import result
from engine.errors import UserError
from engine.weights.opening import open_weights


def parsed(*arguments: str):
    parser = Parser("engine.door")
    add_images(parser, "--data", required=False)
    return parser.parse_args(arguments)


def kind(*arguments: str, at: Path) -> str:
    (root,) = image_roots(parsed("--data", str(at), *arguments), "--data")
    assert root.key == "--data"
    assert root.path == at
    return root.kind


def test_a_source_is_given_or_implied_or_guessed(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").touch()
    assert kind(at=tmp_path) == "folder"
    assert kind(at=tmp_path / "tars") == kind(at=tmp_path / "tars/a.tar") == "shards"
    assert kind("--source", "folder", at=tmp_path / "tars") == "folder"
    assert kind("--dataset", "CIFAR10", at=tmp_path / "tars") == "torchvision"
    assert given_source(parsed()) is None
    assert given_source(parsed("--source", "torchvision")) == "torchvision"


def test_a_root_is_expanded_where_the_shell_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (root,) = image_roots(parsed("--data", "[~/a, $HOME/b]"), "--data")
    assert root.paths == (tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match=r"^--data \(\$NOPE/a\) must name variables that are set; set \$NOPE"):
        image_roots(parsed("--data=$NOPE/a"), "--data")


def test_several_roots_are_a_list_in_brackets(tmp_path):
    (tmp_path / "a.tar").touch()
    (root,) = image_roots(parsed("--data", f"[{tmp_path}/a.tar, b]"), "--data")
    assert (root.kind, root.path, root.more) == ("shards", tmp_path / "a.tar", (Path("b"),))
    for text in ("[]", "[1]", "[a, '']"):
        with pytest.raises(UserError, match="must be a path, or a list of paths such as"):
            parsed("--data", text)
    with pytest.raises(UserError, match="must be plain YAML"):
        parsed("--data", "[a, [b]")


def test_a_dataset_goes_with_torchvision_alone(tmp_path):
    with pytest.raises(UserError, match=r"^--dataset \(CIFAR10\) must be left out for --source folder$"):
        given_source(parsed("--dataset", "CIFAR10", "--source", "folder"))
    with pytest.raises(UserError, match=r"^--dataset \(missing\) must be a class of torchvision.datasets; pass it"):
        kind("--source", "torchvision", at=tmp_path)


def test_workers_are_what_is_given_or_the_cores_that_ranks_leave(monkeypatch):
    assert decoding_workers(parsed("--workers", "40")) == 40
    with pytest.raises(UserError, match=r"^--workers \(-1\) must be >= 0; leave it out"):
        parsed("--workers", "-1")
    with pytest.raises(UserError, match=r"^argument --workers: invalid integer value: 'many'; see"):
        parsed("--workers", "many")
    for cores, ranks, expected in ((64, 2, MOST_DECODERS), (16, 2, 7), (1, 1, 0), (2, 4, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert decoding_workers(parsed()) == expected


def test_a_result_is_printed_by_the_first_rank(monkeypatch, capsys):
    result({"top1": 0.5}, "a table\nof two lines")
    assert capsys.readouterr().out.splitlines() == ["a table", "of two lines", json.dumps({"top1": 0.5})]
    monkeypatch.setenv("RANK", "1")
    result({"top1": 0.5})
    assert capsys.readouterr().out == ""


def test_a_path_that_the_system_refuses_is_one_line():
    """pathlib tells of what is not there, and raises where a name is too long or a folder is closed."""
    code = (
        "import pathlib; from engine.door import carry_out; carry_out(lambda _: pathlib.Path('x' * 300).is_dir(), [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    line = f"error: path ({'x' * 300}) must be one that you can use: File name too long; pass another\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has\\n...')",
            "the GPU had no memory left for 2.50 GiB more",
        ),
        (
            "torch.AcceleratorError('CUDA error: out of memory\\nCompile with `TORCH_USE_CUDA_DSA`')",
            "the GPU, or the host for batches on their way there, had no memory left (CUDA error: out of memory)",
        ),
    ],
)
def test_a_full_gpu_is_one_line_of_every_door(raised, said):
    code = f"""
import torch
from engine.door import carry_out

def main(_):
    raise {raised}

carry_out(main, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    other = "set CUDA_VISIBLE_DEVICES to the number of another GPU, or to nothing to compute on the CPU"
    assert (done.returncode, done.stderr) == (1, f"failed: {said}; end what else uses it, or {other}\n")


def test_nothing_is_no_path():
    """As of a variable that is not set; the working directory is not meant."""
    parser = Parser("engine.check")
    add_images(parser, "--data")
    with pytest.raises(UserError, match=r"^--data \(\) must be a path"):
        parser.parse_args(["--data", ""])
    with pytest.raises(UserError, match=r"CHECKPOINT \(\) must exist"):
        open_weights("")
