"""`model.weights`: both encoders of a new run begin with a trunk that has learned elsewhere, and its heads anew."""

import shutil

import pytest
import timm
import torch
from torch.distributed.tensor import DTensor

from engine.checkpoint.load import read_tensors
from engine.checkpoint.manifest import read_manifest
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.importing import import_weights
from engine.runs.pretrain import Pretraining, pretrain
from engine.runs.preview import preview
from engine.runs.starting import opened
from engine.weights.opening import open_weights
from tests.distributed.trajectories import KINDS, RECIPE, SMALL
from tests.machine import trajectory
from tests.runs.small import CHECKPOINT as PUBLISHED

LAST = "checkpoints/step_0000002"
OF_PUBLISHED = [  # the shape of that file
    *("model.image_size=64", "model.patch_size=16", "model.dim=48", "model.depth=2", "model.heads=12"),
]


def recipe(run, *overrides):
    values = [*SMALL, "model.dim=16", "model.heads=2", "data.workers=0", f"run.dir={run}", "train.max_steps=2"]
    return load(RECIPE, [*values, *overrides])


def train(world, run, *overrides) -> list[dict]:
    pretrain(recipe(run, *overrides), RECIPE, world)
    return trajectory(run)


@pytest.fixture(scope="module")
def source(world, tmp_path_factory):
    run = tmp_path_factory.mktemp("source") / "run"
    train(world, run)
    return run


@pytest.fixture
def begun(monkeypatch):
    """{run's folder: every tensor with which it begins}."""
    found, start = {}, Pretraining.start

    def spied(task, *, resumes):
        start(task, resumes=resumes)
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in task.tensors().items()}
        found[task.recipe.run.dir] = {name: tensor.detach().clone() for name, tensor in whole.items()}

    monkeypatch.setattr(Pretraining, "start", spied)
    return lambda run: found[str(run)]


def trunk_of_timm(file, **sizes) -> dict[str, torch.Tensor]:
    """A bare ViT of others: learned positions, and no word on its heads."""
    torch.manual_seed(0)
    trunk = timm.models.VisionTransformer(num_classes=0, **sizes).state_dict()
    torch.save(trunk, file)
    return trunk


def test_encoders_begin_with_the_trunk_and_all_else_as_in_a_fresh_run(world, source, begun, tmp_path, capfd):
    rows = train(world, tmp_path / "run", f"model.weights={source}")
    assert f"weights   both encoders begin with the trunk of {source}; heads begin anew" in capfd.readouterr().out
    fresh = train(world, tmp_path / "fresh")
    ours, others, theirs = begun(tmp_path / "run"), begun(tmp_path / "fresh"), dict(read_tensors(source / LAST))
    learned = 0
    for name, tensor in ours.items():
        if ".trunk." in name and name.startswith("model."):
            expected = theirs[name.replace("momentum.", "base.")]
            learned += not torch.equal(tensor, others[name])
        else:
            expected = others[name]
        assert torch.equal(tensor, expected), name
    assert learned > 40
    for key in ("step", "epoch", "lr", "momentum"):
        assert [row[key] for row in rows] == [row[key] for row in fresh]
    assert [row["loss"] for row in rows] != [row["loss"] for row in fresh]


def test_a_resume_does_not_read_the_weights(world, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "source")
    values = (f"model.weights={other}", "run.seed=1", "train.max_steps=4")
    whole = train(world, tmp_path / "whole", *values)
    train(world, tmp_path / "halves", *values, "train.max_steps=2")
    shutil.rmtree(other)
    assert train(world, tmp_path / "halves", *values) == whole
    last = "checkpoints/step_0000004"
    ours, theirs = (read_manifest(tmp_path / run / last) for run in ("halves", "whole"))
    assert ours.files == theirs.files
    assert ours.state["network"] == theirs.state["network"]
    assert len(ours.state["network"]) == 64
    with pytest.raises(UserError, match=r"model.weights \(.* -> null\); go on with its own, or pass another run.dir$"):
        train(world, tmp_path / "halves", "run.seed=1")


def test_a_published_file_binds_the_run_by_its_licence(world, begun, tmp_path):
    values = [*OF_PUBLISHED, f"model.weights={PUBLISHED}"]
    train(world, tmp_path / "run", *values, "train.max_steps=1")
    trunk = open_weights(PUBLISHED).trunk("base")
    for name, tensor in trunk.read(list(trunk.shapes)):
        assert torch.equal(begun(tmp_path / "run")[f"model.{name}"].float(), tensor), name
    train(world, tmp_path / "run", *values)
    assert read_manifest(tmp_path / "run" / LAST).state["licence"] == "CC-BY-NC-4.0"
    assert open_weights(str(tmp_path / "run")).about.licence == "CC-BY-NC-4.0"


def test_a_bare_trunk_of_others_on_another_grid(world, begun, tmp_path, capfd):
    file = tmp_path / "bare.pth"
    trunk = trunk_of_timm(file, img_size=56, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    train(world, tmp_path / "run", "model.depth=2", f"model.weights={file}", "augment.mean=[0.5, 0.5, 0.5]")
    said = capfd.readouterr().err
    assert "does not say how many heads its attention has; 2 are assumed, from the recipe's model.heads" in said
    assert "has positions of 8 x 8 patches, which become 4 x 4" in said
    tensors = begun(tmp_path / "run")
    for name, tensor in trunk.items():
        if name != "pos_embed":
            assert torch.equal(tensors[f"model.momentum.trunk.{name}"].float(), tensor), name
    assert tensors["model.base.trunk.pos_embed"].shape == (1, 17, 16)


def test_mistakes_are_one_line_before_there_are_images(world, source, tmp_path, monkeypatch):
    for module in ("pretrain", "preview"):
        monkeypatch.setattr(f"engine.runs.{module}.open_splits", None)
    monkeypatch.setattr("engine.weights.opening.unreachable", lambda config: "huggingface.co does not answer")
    trunk = trunk_of_timm(tmp_path / "bare.pth", img_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=2)
    torch.save(trunk | {"cls_token": trunk["cls_token"] * float("nan")}, tmp_path / "nan.pth")
    named = ["model.name=vit_small", "model.dim=24", "model.depth=2", "model.heads=null"]
    of_timm = KINDS["resnet"]
    for words, values in {
        r"CHECKPOINT \(.*none.pth\) must exist": [f"model.weights={tmp_path / 'none.pth'}"],
        "its trunk has dim 16, not 32": [f"model.weights={source}", "model.dim=32"],
        "its trunk is a vit, not ": [f"model.weights={source}", *of_timm],
        r"it does not say how many heads .*; pass model.heads=12 \(": [
            f"model.weights={tmp_path / 'bare.pth'}",
            *named,
        ],
        "must be finite; base.trunk.cls_token is not": [f"model.weights={tmp_path / 'nan.pth'}", *named[1:3]],
        "did you mean timm/test_resnet": ["model.weights=timm/tesst_resnet", *of_timm],
        "huggingface.co does not answer; mend that": ["model.weights=timm/test_resnet.r160_in1k", *of_timm],
    }.items():
        with pytest.raises(UserError, match=rf"^model.weights \(.*\) must hold this recipe's network: .*{words}"):
            train(world, tmp_path / "run", *values)
    with pytest.raises(UserError, match="must hold this recipe's network"):
        preview(recipe(tmp_path / "run", f"model.weights={tmp_path / 'none.pth'}"), RECIPE, world)
    with pytest.raises(UserError, match=r"model.weights \(a\) must be null where run.continue_from is given"):
        recipe(tmp_path / "run", "model.weights=a", "run.continue_from=b")
    with pytest.raises(UserError, match=r"model.weights \(a\) must be null where FILE is imported"):
        import_weights(source, recipe(tmp_path / "run", "model.weights=a"))
    assert not (tmp_path / "run").exists()


def test_published_weights_of_timm_begin_a_network_of_timm(world, begun, tmp_path, monkeypatch):
    """Its name may leave out the tag of the weights; their licence is timm's word."""
    torch.manual_seed(0)
    published = timm.create_model("test_resnet", num_classes=0)
    published.pretrained_cfg["license"] = "cc-by-nc-4.0"
    monkeypatch.setattr("engine.weights.opening._create", lambda checkpoint, pretrained: published)
    monkeypatch.setattr("engine.weights.opening.unreachable", lambda config: None)
    train(world, tmp_path / "run", *KINDS["resnet"], "model.weights=timm/test_resnet.r160_in1k")
    for name, tensor in published.state_dict().items():
        for encoder in ("base", "momentum"):
            assert torch.equal(begun(tmp_path / "run")[f"model.{encoder}.trunk.{name}"].float(), tensor), name
    assert read_manifest(tmp_path / "run" / LAST).state["licence"] == "cc-by-nc-4.0"


def test_heads_that_a_network_of_timm_has_are_not_asked_for(tmp_path, capfd):
    values = ["model.image_size=160", "model.patch_size=16", "model.dim=64", "model.depth=6"]
    assert opened("timm/test_vit", recipe(tmp_path, *values, "model.heads=2").model).about is not None
    assert not capfd.readouterr().err


def test_nodes_that_find_other_weights_are_told(world, source, tmp_path, monkeypatch):
    """This rank's digest beside that of another one, as if a node had another file under the same name."""
    gathered = {str: lambda digest: [digest, "0" * 64], bool: lambda begun: [begun, begun]}
    monkeypatch.setattr("engine.runs.starting.all_gather", lambda value, group: gathered[type(value)](value))
    with pytest.raises(UserError, match=r"model.weights \(.*\) must be the same on every node, and differs"):
        train(world, tmp_path / "run", f"model.weights={source}")
    assert not (tmp_path / "run").exists()
