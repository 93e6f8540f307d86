"""Fine-tuning on 2 and 3 ranks is that of one rank, with every random thing that it does."""

from pathlib import Path

import pytest

from engine.weights.opening import open_weights
from tests.data.images import thinned
from tests.distributed.launch import results
from tests.runs.small import CHECKPOINT, EVERYTHING, FINETUNE, FOUR_STEPS, VAL, finetune_recipe, rows, run_finetune

# 2 and 3 ranks divide the batch, and an epoch has three.
OPTIONS = [*EVERYTHING, "data.labels=0.3", "train.global_batch_size=90", "train.max_steps=5"]


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    """A hundred images."""
    return thinned(VAL, 10, tmp_path_factory.mktemp("val") / "val.tar")


def launched(ranks: int, val: Path, directory: Path, *overrides: str) -> dict:
    roots = ("--train", VAL, "--val", val, "--out", directory)
    values = [*FOUR_STEPS, *OPTIONS, *overrides]
    (found,) = results(ranks, "engine.evaluate", "finetune", CHECKPOINT, *roots, "--recipe", FINETUNE, *values)
    return found


@pytest.fixture(scope="module")
def alone(val, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("alone")
    return directory, run_finetune(finetune_recipe(directory, *OPTIONS, f"data.val_root={val}"))


def check_same(directory: Path, found: dict, alone: tuple[Path, dict]) -> None:
    ours, theirs = rows(directory, "loss"), rows(alone[0], "loss")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5]
    for key in ("loss", "lr", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-8)
    assert found == pytest.approx(alone[1], abs=0.002)
    tensors = [
        dict(weights.read(list(weights.shapes))) for weights in map(open_weights, (str(directory), str(alone[0])))
    ]
    for name, tensor in tensors[1].items():
        # Keys' biases get nothing but rounding noise for a gradient, which AdamW turns into steps.
        floor = 1e-3 if name.endswith("qkv.bias") else 1e-8
        assert (tensors[0][name] - tensor).abs().max() <= floor, name


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["full", "replicate"])
def test_two_ranks(alone, val, tmp_path, shard):
    check_same(tmp_path, launched(2, val, tmp_path, f"parallel.shard={shard}"), alone)


def test_three_ranks_go_on_from_the_checkpoint_of_one(alone, val, tmp_path):
    """The first and the last exchange what they mix with; the one in the middle mixes with its own."""
    run_finetune(finetune_recipe(tmp_path, *OPTIONS, "train.max_steps=2", f"data.val_root={val}"))
    check_same(tmp_path, launched(3, val, tmp_path, "parallel.shard=grad_op"), alone)
