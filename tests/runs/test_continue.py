"""`run.continue_from`: a new run begins with another one's weights and optimizer state, and is a run of its own."""

import json
import shutil

import pytest
import torch
from torch.distributed.tensor import DTensor

from engine.checkpoint.load import read_tensors
from engine.checkpoint.manifest import NAME, own_checksum, read_manifest
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.linear import linear
from engine.runs.pretrain import Pretraining, pretrain
from tests.distributed.trajectories import KINDS, RECIPE, SMALL
from tests.machine import trajectory
from tests.runs.small import CHECKPOINT as PUBLISHED
from tests.runs.small import linear_recipe

CHECKPOINT = "checkpoints/step_0000004"


def train(world, run, *overrides) -> list[dict]:
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={run}", "train.max_steps=4"]
    pretrain(load(RECIPE, [*values, *overrides]), RECIPE, world)
    return trajectory(run)


@pytest.fixture(scope="module")
def source(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("source") / "run"
    train(world, run)
    return run


def test_it_begins_with_the_sources_state_at_step_0(world, source, tmp_path, monkeypatch, capfd):
    begun, begin = {}, Pretraining.begin_with

    def spied(task, *found):
        begin(task, *found)
        for name, tensor in task.tensors().items():
            begun[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        assert (task.step, task.update.skipped.item()) == (0, 0)

    monkeypatch.setattr(Pretraining, "begin_with", spied)
    values = (f"run.continue_from={source}", "train.epochs=5", "optimizer.base_lr=1e-3")
    rows = train(world, tmp_path / "run", *values, "run.seed=1")
    theirs = dict(read_tensors(source / CHECKPOINT))
    named = [name for name in theirs if name.startswith(("model.", "optimizer."))]
    assert len(named) > 50
    for name in named:
        assert torch.equal(begun[name], theirs[name]), name
    assert any(begun[name].any() for name in named if name.startswith("optimizer.exp_avg"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    fresh = train(world, tmp_path / "fresh", *values[1:], "run.seed=1")
    for key in ("lr", "momentum", "epoch"):
        assert [row[key] for row in rows] == [row[key] for row in fresh]
    assert [row["loss"] for row in rows] != [row["loss"] for row in fresh]
    steps = [value for name, value in read_tensors(tmp_path / "run" / CHECKPOINT) if name.startswith("optimizer.step.")]
    assert {step.item() for step in steps} == {8}  # AdamW's own count goes on
    assert "seed      " not in capfd.readouterr().out
    train(world, tmp_path / "same_seed", *values)
    assert "seed      0, as in that run: the same order of images" in capfd.readouterr().out


def test_a_resume_does_not_read_the_source(world, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "source")
    checksum = read_manifest(other / CHECKPOINT).sha256()
    values = (f"run.continue_from={other / CHECKPOINT}", "run.seed=1")
    whole = train(world, tmp_path / "whole", *values)
    train(world, tmp_path / "halves", *values, "train.max_steps=2")
    shutil.rmtree(other)
    assert train(world, tmp_path / "halves", *values) == whole
    ours, theirs = (read_manifest(tmp_path / run / CHECKPOINT) for run in ("halves", "whole"))
    assert ours.files == theirs.files
    assert ours.state["continued_from"] == theirs.state["continued_from"] == checksum
    with pytest.raises(UserError, match=r"run.continue_from \(.* -> null\); go on with its own"):
        train(world, tmp_path / "halves", "run.seed=1")
    with pytest.raises(
        UserError, match=r"run.continue_from \(.*\) must be a run with a checkpoint or a checkpoint itself"
    ):
        train(world, tmp_path / "new", *values)
    assert not (tmp_path / "new").exists()


def test_an_order_of_images_is_kept_by_its_run_and_not_handed_on(world, source, tmp_path, capfd):
    former, ours = (shutil.copytree(source, tmp_path / name) for name in ("former", "ours"))

    def rewrite(**order) -> None:
        content = json.loads((former / CHECKPOINT / NAME).read_text())
        content["state"].pop("order")
        content["state"] |= order
        (former / CHECKPOINT / NAME).write_text(json.dumps(content | {"manifest_sha256": own_checksum(content)}))

    rewrite(order="of_tomorrow")
    with pytest.raises(UserError, match="its order of images is of_tomorrow; go on with the version that wrote it"):
        train(world, former, "train.max_steps=6")
    rewrite()  # as a former version wrote it
    assert train(world, former, "train.max_steps=6")[-2:] != train(world, ours, "train.max_steps=6")[-2:]
    train(world, tmp_path / "new", f"run.continue_from={former}")
    assert "seed      0, as in that run: the same augmentations again" in capfd.readouterr().out
    found = [former / "checkpoints/step_0000006", ours / "checkpoints/step_0000006", tmp_path / "new" / CHECKPOINT]
    assert [read_manifest(path).state["order"] for path in found] == ["sorted", "permuted", "permuted"]


def test_a_source_of_a_later_version_is_refused_by_its_name(world, source, tmp_path):
    later = shutil.copytree(source, tmp_path / "later")
    content = json.loads((later / CHECKPOINT / NAME).read_text())
    content["state"]["recipe"] = content["state"]["recipe"].replace("train:", "train:\n  of_tomorrow: 1", 1)
    (later / CHECKPOINT / NAME).write_text(json.dumps(content | {"manifest_sha256": own_checksum(content)}))
    words = r"^run.continue_from \(.*later\) must be .* that this version knows; in its recipe .*of_tomorrow"
    with pytest.raises(UserError, match=words):
        train(world, tmp_path / "new", f"run.continue_from={later}")


def test_what_does_not_fit_is_refused_before_there_are_weights(world, source, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "start", None)
    must = r"run.continue_from \(.*\) must be a pre-training run of the same network and optimizer"
    for words, values in {
        "its trunk has dim 16, not 32; pass those": ["model.dim=32"],
        "its optimizer.name is adamw, not lars": ["optimizer.name=lars"],
        "its model.output_dim is 16, not 8": ["model.output_dim=8"],
        "its images have another size": ["model.image_size=35"],
        "its trunk is a vit, not a test_resnet": KINDS["resnet"],
    }.items():
        with pytest.raises(UserError, match=f"^{must}: .*{words}"):
            train(world, tmp_path / "run", f"run.continue_from={source}", *values)
    with pytest.raises(UserError, match=r"parallel.precision \(float32\) must be float64, in which run.continue_from"):
        train(world, tmp_path / "run", f"run.continue_from={source}", "parallel.precision=float32")
    with pytest.raises(UserError, match="must be a run with a checkpoint or a checkpoint itself"):
        train(world, tmp_path / "run", f"run.continue_from={tmp_path / 'run'}")
    linear(linear_recipe(tmp_path / "linear", "train.max_steps=1"), PUBLISHED, "base", world)
    with pytest.raises(UserError, match=f"{must}, and this one is of task linear; pass another"):
        train(world, tmp_path / "run", f"run.continue_from={tmp_path / 'linear'}")
    assert not (tmp_path / "run").exists()


def test_damage_is_refused_and_left_alone(world, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "source")
    file = next((other / CHECKPOINT).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"must be whole: .* does not match its checksum"):
        train(world, tmp_path / "run", f"run.continue_from={other}")
    assert (other / CHECKPOINT).is_dir()
    assert not (tmp_path / "run").exists()


def test_a_run_with_other_values_names_the_way_on(world, source):
    way = f"go on with its own, or pass another run.dir, where run.continue_from={source} begins with its weights"
    with pytest.raises(UserError, match=rf"train.epochs \(3 -> 60\); {way}$"):
        train(world, source, "train.epochs=60")
    with pytest.raises(UserError, match=r"model.dim \(16 -> 32\); go on with its own, or pass another run.dir$"):
        train(world, source, "model.dim=32")
