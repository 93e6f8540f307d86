"""Linear classification, kNN and RankMe from the command line: on 1, 2 and 3 or 4 ranks what one rank finds."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from engine import evaluate
from tests.data.images import thinned
from tests.distributed.launch import ROOT, on_ranks, results, torchrun

CHECKPOINT = ROOT / "tests/golden/I_vit_small_shape.pth.tar"
VAL = ROOT / "recipes/data/fashion_mnist/val.tar"
ROOTS = ("--train", VAL, "--val", VAL)
EPOCHS = 2


def output(ranks: int, *arguments: object) -> str:
    """What engine.evaluate prints; one rank needs no launch."""
    if ranks > 1:
        return on_ranks(ranks, "engine.evaluate", *arguments)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluate.main(list(map(str, arguments)))
    return printed.getvalue()


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    """A hundred images."""
    return thinned(VAL, 10, tmp_path_factory.mktemp("val") / "val.tar")


def linear(ranks: int, val: Path, directory: Path, *overrides: str) -> dict:
    """100 images in batches of 33: an epoch ends with a batch of one, which all ranks but one have nothing of."""
    recipe = ("--recipe", ROOT / "recipes/linear_vit.yaml", "--out", directory, "--workers", 0)
    small = (
        "data.labels=0.1",
        "train.global_batch_size=33",
        f"train.epochs={EPOCHS}",
        "optimizer.base_lr=0.5",
        "log.every_steps=1",
    )
    roots = ("--train", VAL, "--val", val)
    return json.loads(output(ranks, "linear", CHECKPOINT, *roots, *recipe, *small, *overrides).splitlines()[-1])


def rows(directory: Path, key: str) -> list[dict]:
    return [row for row in map(json.loads, (directory / "metrics.jsonl").open()) if key in row]


@pytest.fixture(scope="module")
def alone(val, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("alone")
    return directory, linear(1, val, directory)


def test_three_ranks_train_the_classifier_of_one_and_go_on_from_its_checkpoint(alone, val, tmp_path):
    """Three ranks divide 33; the loss is that of the global batch, the last partial one too."""
    linear(1, val, tmp_path, "train.max_steps=3")  # before the batch of one
    found = linear(3, val, tmp_path)
    ours, theirs = rows(tmp_path, "loss"), rows(alone[0], "loss")
    assert [row["step"] for row in ours] == list(range(1, 4 * EPOCHS + 1))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert found["top1"] == pytest.approx(alone[1]["top1"], abs=0.002)
    assert len(rows(tmp_path, "linear_top1")) == EPOCHS + 1  # the early end is evaluated too


@pytest.mark.parametrize(
    ("worlds", "name", "options"),
    [
        ((1, 2), "knn", (*ROOTS, "--k", "10,50")),
        pytest.param((1, 4), "knn", (*ROOTS, "--k", "10,50"), marks=pytest.mark.slow),
        pytest.param((1, 2), "rankme", ("--data", VAL), marks=pytest.mark.slow),
        pytest.param((1, 2), "linear", (*ROOTS, "--fast"), marks=pytest.mark.slow),
    ],
)
def test_measurements_have_the_same_digits_on_any_ranks(worlds, name, options):
    found = [output(ranks, name, CHECKPOINT, *options, "--workers", 0) for ranks in worlds]
    assert len(set(found)) == 1
    assert json.loads(found[0].splitlines()[-1])


def test_ranks_that_train_no_classifier_keep_no_rows_of_others():
    """Six ranks, of which four train one group of candidates each: the features of a large set would fill a node."""
    alone, six = (results(ranks, "tests.distributed.fast_linear")[0] for ranks in (1, 6))
    assert six["scores"] == alone["scores"] * 6
    assert len({top1 for _, top1, _ in alone["scores"][0]}) > 3
    assert max(six["largest"][4:]) < 0.25, "their own rows, filled up"
    assert max(alone["largest"] + six["largest"]) < 1.1, "no copy of all rows in float64"


@pytest.mark.slow
def test_a_mistake_is_one_line_from_one_rank():
    done = torchrun(2, "engine.evaluate", "knn", CHECKPOINT, *ROOTS, "--k", "5000")
    assert done.returncode == 1
    assert done.stderr.count("error: --k (5000) must be at most 1000") == 1
    assert 'File "engine' not in done.stderr
    assert done.stdout == ""
