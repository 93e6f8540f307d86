"""One trajectory: ranks, sharding and workers change a run by rounding alone; a stop and a resume by nothing.

The online probe learns beside all runs but those that say otherwise.
"""

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint.load import read_tensors
from tests.distributed.launch import on_ranks
from tests.machine import MACHINE

WITHOUT = "evaluate.online_probe=false"
MONITORED = ["train.max_steps=1", "evaluate.knn_every_epochs=1", "evaluate.knn_bank=6"]
# 4 steps an epoch, which leave 4 images: 11 steps cross two ends of an epoch and leave the warm-up.
STEPS, HALF = 11, 5
SHORT = ["data.dataset_options={size: 36, image_size: [3, 36, 40], num_classes: 4}", f"train.max_steps={STEPS}"]
WORKERS = {"full": 1, "grad_op": 3, "hybrid": 0, "replicate": 0}  # by sharding
FLOOR = 0.01  # of a tensor's largest entry, under which differences are absolute (tests/golden/README.md)


def launch(ranks: int, directory: Path, *runs: tuple) -> None:
    """Train (name, kind, overrides) each below `directory`, all in one launch."""
    described = [{"dir": str(directory / name), "kind": kind, "overrides": [*SHORT, *o]} for name, kind, *o in runs]
    on_ranks(ranks, "tests.distributed.trajectories", json.dumps(described))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return dict(read_tensors(run / f"checkpoints/step_{step:07d}"))


def assert_same_run(run: Path, other: Path, names: tuple[str, ...] = ("model.", "probe.")) -> None:
    """Losses to 1e-10, the tensors that begin as one of `names` to 1e-7 after the last step, in float64."""
    ours, theirs = rows(run), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=1e-10)
        assert mine["grad_norm"] == pytest.approx(yours["grad_norm"], rel=1e-7)
        assert mine["rankme"] == pytest.approx(yours["rankme"], rel=1e-6)
        assert (mine["lr"], mine["momentum"]) == (yours["lr"], yours["momentum"])
        if "probe." in names:
            assert mine["probe_loss"] == pytest.approx(yours["probe_loss"], rel=1e-7)
    mine, yours = tensors(run), tensors(other)
    assert [n for n in mine if n.startswith(names)] == [n for n in yours if n.startswith(names)]
    for name in (n for n in mine if n.startswith(names)):
        scale = yours[name].abs().max().clamp(min=FLOOR)
        assert ((mine[name] - yours[name]).abs().max() / scale).item() < 1e-7, name


def assert_bitwise(run: Path, other: Path, probe: bool = True) -> None:
    """Every tensor and every row, of the online probe too unless `probe` is false."""

    def kept(named: dict) -> dict:
        return {n: v for n, v in named.items() if n not in MACHINE and (probe or not n.startswith("probe"))}

    mine, yours = kept(tensors(run)), kept(tensors(other))
    assert mine.keys() == yours.keys()
    different = [name for name in mine if not torch.equal(mine[name], yours[name])]
    assert not different, different
    assert [kept(row) for row in rows(run)] == [kept(row) for row in rows(other)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of one rank, that all others are compared with."""
    directory = tmp_path_factory.mktemp("alone")
    runs = [(kind, kind, "data.workers=0") for kind in ("vit", "vit_conv", "resnet")]
    runs += [("without", "vit", "data.workers=0", WITHOUT), ("bank", "vit", *MONITORED)]
    launch(1, directory, *runs, continued(directory), started(directory))
    for kind in ("vit", "vit_conv", "resnet"):
        losses = [row["loss"] for row in rows(directory / kind)]
        assert len(set(losses)) == STEPS  # it moves: a trainer that does nothing would agree with itself
    return directory


def continued(alone: Path) -> tuple:
    """A run that begins with the weights of one rank's ViT."""
    return "continued", "vit", "data.workers=0", "run.seed=1", f"run.continue_from={alone / 'vit'}"


def started(alone: Path) -> tuple:
    """A run whose encoders begin with the trunk of one rank's ViT."""
    return "started", "vit", "data.workers=0", "run.seed=1", f"model.weights={alone / 'vit'}"


def test_the_online_probe_leaves_the_run_alone(alone):
    assert not [name for name in tensors(alone / "without") if name.startswith("probe")]
    assert_bitwise(alone / "without", alone / "vit", probe=False)
    assert len({row["probe_loss"] for row in rows(alone / "vit")}) == STEPS  # and it learns


def sharded(kind: str, shard: str) -> tuple:
    """The run of a kind under a sharding, with 0, 1 or 3 workers."""
    values = [f"parallel.shard={shard}", f"parallel.replicate={2 if shard == 'hybrid' else 1}"]
    return f"{kind}_{shard}", kind, *values, f"data.workers={WORKERS[shard]}"


def test_two_ranks(alone, tmp_path):
    """Every sharding, and 1 and 3 workers; then a run in two halves, one in micro-batches of 1 and then of 2, and one
    that goes on with one rank.

    One half of resnet_halves has no online probe.
    """
    pairs = [*(("vit", shard) for shard in WORKERS), ("resnet", "full")]
    runs = [sharded(*pair) for pair in pairs]
    runs += [("vit_halves", "vit", f"train.max_steps={s}") for s in (HALF, STEPS)]
    runs += [("resnet_halves", "resnet", f"train.max_steps={HALF}", WITHOUT), ("resnet_halves", "resnet")]
    runs += [
        continued(alone),
        started(alone),
        ("conv", "vit_conv"),
        ("to_one", "vit", f"train.max_steps={HALF}"),
        ("bank", "vit", *MONITORED),
    ]
    runs += [
        ("micro", "vit", f"train.max_steps={s}", f"train.micro_batch_size={m}") for s, m in ((HALF, 1), (STEPS, 2))
    ]
    launch(2, tmp_path, *runs)
    for kind, shard in pairs:
        assert_same_run(tmp_path / f"{kind}_{shard}", alone / kind)
    for kind in ("vit", "resnet"):
        assert_bitwise(tmp_path / f"{kind}_halves", tmp_path / f"{kind}_full", probe=kind == "vit")
    assert ["probe_loss" in row for row in rows(tmp_path / "resnet_halves")] == [False] * HALF + [True] * (STEPS - HALF)
    assert_same_run(tmp_path / "conv", alone / "vit_conv")
    for name in ("continued", "started"):
        assert_same_run(tmp_path / name, alone / name)
    assert_same_run(tmp_path / "micro", alone / "vit")
    knn = [[row["knn_top1"] for row in rows(at / "bank") if "knn_top1" in row] for at in (alone, tmp_path)]
    assert knn[0] == knn[1]
    assert len(knn[0]) == 2

    launch(1, tmp_path, ("to_one", "vit", "parallel.shard=replicate", "data.workers=0"))
    assert_same_run(tmp_path / "to_one", alone / "vit")


@pytest.mark.slow
def test_four_ranks_and_two_that_become_four(alone, tmp_path):
    hybrid = ["parallel.shard=hybrid", "parallel.replicate=2"]
    launch(2, tmp_path, ("to_four", "resnet", f"train.max_steps={HALF}"))
    launch(4, tmp_path, ("four", "vit", *hybrid), ("to_four", "resnet", *hybrid, WITHOUT))
    assert_same_run(tmp_path / "four", alone / "vit")
    assert_same_run(tmp_path / "to_four", alone / "resnet", ("model.",))


@pytest.mark.slow
def test_the_resnet_under_the_other_shardings_and_on_four_ranks(alone, tmp_path):
    """One of them in two halves, too."""
    halves = [("halves", *sharded("resnet", "replicate")[1:], f"train.max_steps={s}") for s in (HALF, STEPS)]
    launch(2, tmp_path, *(sharded("resnet", shard) for shard in ("grad_op", "hybrid", "replicate")), *halves)
    assert_bitwise(tmp_path / "halves", tmp_path / "resnet_replicate")
    launch(4, tmp_path, ("resnet_four", "resnet"))
    for name in ("resnet_grad_op", "resnet_hybrid", "resnet_replicate", "resnet_four"):
        assert_same_run(tmp_path / name, alone / "resnet")


@pytest.mark.faults
def test_fewer_and_more_ranks_in_a_chain(tmp_path):
    """1, 2, 3 and 1 ranks, three steps or two each, against one rank; batches of 12."""
    values = ["train.global_batch_size=12", "train.epochs=4", "data.workers=0"]
    launch(1, tmp_path, ("whole", "vit", *values), ("chain", "vit", *values, "train.max_steps=3"))
    for ranks, last in ((2, 6), (3, 9), (1, STEPS)):
        launch(ranks, tmp_path, ("chain", "vit", *values, f"train.max_steps={last}"))
    assert_same_run(tmp_path / "chain", tmp_path / "whole")
