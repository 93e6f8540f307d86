"""Imported weights: a checkpoint that pre-training goes on from, in the weights that the file has."""

import json
from pathlib import Path

import pytest
import timm
import torch

from engine.checkpoint.load import read_tensors
from engine.checkpoint.manifest import read_manifest
from engine.errors import UserError
from engine.import_weights import main
from engine.recipe.load import load
from engine.recipe.sections import Pretrain
from engine.runs.importing import import_weights
from engine.weights.formats.table import format_page
from engine.weights.opening import open_weights
from engine.weights.read import read_weights
from models.vit import sincos_position
from tests.distributed.launch import on_ranks
from tests.weights.files import GOLDEN, ROOT, assert_same, state_dict, trunk_of

PUBLISHED = GOLDEN / "I_vit_small_shape.pth.tar"
HEADS = ["model.projector_hidden_dim=64", "model.output_dim=32"]
SHAPE = [
    *("model.image_size=64", "model.patch_size=16", "model.dim=48", "model.depth=2", "model.heads=12", *HEADS),
    *("data.workers=0", "evaluate.knn_every_epochs=0", "train.max_steps=2"),
]


def recipe(folder: Path, *overrides: str) -> Pretrain:
    return load(ROOT / "recipes" / "quickstart.yaml", [*SHAPE, f"run.dir={folder}", *overrides])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_tensors(folder / "checkpoints" / "step_0000000"))


def test_a_published_file_becomes_a_checkpoint_that_a_run_goes_on_from(tmp_path, capsys):
    folder = tmp_path / "run"
    main([str(PUBLISHED), str(folder), "--recipe", str(ROOT / "recipes" / "quickstart.yaml"), *SHAPE])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result == {"checkpoint": str(folder / "checkpoints" / "step_0000000"), "fresh": ["optimizer"]}
    assert "fresh: optimizer" in captured.err
    assert "pth.tar: state_dict; left: scaler" in captured.err

    tensors = tensors_of(folder)
    assert not any(t.any() for n, t in tensors.items() if n.startswith("optimizer."))
    format_page("moco_v3").write(open_weights(str(folder)), tmp_path / "back.pth.tar")
    assert_same(state_dict(tmp_path / "back.pth.tar"), state_dict(PUBLISHED))

    out, _ = on_ranks(1, "engine.run", "recipes/quickstart.yaml", f"run.dir={folder}", *SHAPE)
    assert "step_0000000 at step 0" in out
    trained = read_manifest(folder / "checkpoints" / "step_0000002")
    assert trained.state["licence"] == "CC-BY-NC-4.0"
    assert trained.state["images"]["train"]
    assert trained.state["order"] == "permuted"  # what begins with imported weights is a new run
    assert trained.state["decoder"].startswith("simplejpeg")
    after = dict(read_tensors(folder / "checkpoints" / "step_0000002"))
    name = "model.base.trunk.norm.weight"  # in two steps it moves by no more than two learning rates
    assert 0 < (after[name] - tensors[name]).abs().max() < 0.01
    assert open_weights(str(folder)).about.licence == "CC-BY-NC-4.0"

    with pytest.raises(UserError, match="no checkpoint yet"):
        import_weights(PUBLISHED, recipe(folder))


@pytest.mark.parametrize(("name", "ending"), [("safetensors", ".safetensors"), ("moco_v3", ".pth.tar")])
def test_our_exports_come_back_bit_for_bit(name, ending, tmp_path):
    file = tmp_path / f"a{ending}"
    format_page(name).write(read_weights(PUBLISHED), file)
    assert import_weights(file, recipe(tmp_path / "run"))["fresh"] == ["optimizer"]
    format_page("moco_v3").write(open_weights(str(tmp_path / "run")), tmp_path / "back.pth.tar")
    assert_same(state_dict(tmp_path / "back.pth.tar"), state_dict(PUBLISHED))


def trunk_file(form: str, file: Path) -> dict[str, torch.Tensor]:
    """A timm ViT's weights as others publish them; returns the trunk's own."""
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 12}
    model = timm.models.VisionTransformer(**sizes, num_classes=10)
    torch.nn.init.normal_(model.pos_embed)
    trunk = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    head = {"weight": torch.zeros(10, 48), "bias": torch.zeros(10)}
    content = {
        "timm": model.state_dict(),
        "deit": {"model": model.state_dict()},
        "mae": {"model": trunk | {"mask_token": torch.zeros(1, 1, 48), "decoder_embed.weight": torch.zeros(8, 48)}},
        "dino": trunk,
        "dino, whole": {
            "student": {f"module.backbone.{n}": t + 1 for n, t in trunk.items()},
            "teacher": {f"backbone.{n}": t for n, t in trunk.items()}
            | {"head.mlp.0.weight": torch.zeros(8, 48), "head.last_layer.weight_v": torch.zeros(8, 8)},
            "epoch": 3,
        },
        "classifier": trunk | {f"head.{n}": t for n, t in head.items()},
    }[form]
    torch.save(content, file)
    return trunk


@pytest.mark.parametrize("form", ["timm", "deit", "mae", "dino", "dino, whole", "classifier"])
def test_trunks_of_others_start_fresh_heads(form, tmp_path, capsys):
    trunk = trunk_file(form, tmp_path / "trunk.pth")
    result = import_weights(tmp_path / "trunk.pth", recipe(tmp_path / "run"))
    assert result["fresh"] == ["base.projector", "momentum.trunk", "momentum.projector", "predictor", "optimizer"]
    said = capsys.readouterr().err
    assert "fresh: base.projector" in said
    assert ("; left: " in said) == (form != "dino")
    assert "how many heads" in said
    tensors = tensors_of(tmp_path / "run")
    for name, tensor in trunk.items():
        assert torch.equal(tensors[f"model.base.trunk.{name}"], tensor), name
        assert torch.equal(tensors[f"model.momentum.trunk.{name}"], tensor), name
    assert torch.equal(tensors["model.base.projector.0.weight"], tensors["model.momentum.projector.0.weight"])
    assert tensors["model.base.projector.0.weight"].std() > 0


def test_sine_positions_are_computed_anew_for_another_grid(tmp_path):
    import_weights(PUBLISHED, recipe(tmp_path / "run", "model.image_size=96"))
    tensors = tensors_of(tmp_path / "run")
    for encoder in ("base", "momentum"):
        assert torch.equal(tensors[f"model.{encoder}.trunk.pos_embed"], sincos_position(6, 6, 48))
    images = torch.zeros(1, 3, 96, 96)
    assert trunk_of(tmp_path / "run")(images).isfinite().all()


def test_positions_of_the_same_grid_are_taken_from_the_file(tmp_path):
    content = torch.load(PUBLISHED, weights_only=True)
    content["state_dict"]["module.base_encoder.pos_embed"][0, 3, 5] = 7.25
    torch.save(content, tmp_path / "a.pth.tar")
    import_weights(tmp_path / "a.pth.tar", recipe(tmp_path / "run"))
    assert tensors_of(tmp_path / "run")["model.base.trunk.pos_embed"][0, 3, 5] == 7.25


def test_learned_positions_are_interpolated_on_request_alone(tmp_path):
    trunk = trunk_file("dino", tmp_path / "trunk.pth")
    larger = recipe(tmp_path / "run", "model.image_size=96")
    with pytest.raises(UserError, match="--interpolate-positions"):
        import_weights(tmp_path / "trunk.pth", larger)
    assert not (tmp_path / "run" / "checkpoints").exists()
    import_weights(tmp_path / "trunk.pth", larger, interpolate=True)
    position = tensors_of(tmp_path / "run")["model.base.trunk.pos_embed"]
    assert position.shape == (1, 37, 48)
    assert torch.equal(position[:, 0], trunk["pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=6", "heads 12, not 6"),
        ("model.depth=3", "depth 2, not 3"),
        ("model.dim=96", "dim 48, not 96"),
        ("model.patch_size=8", "patch_size 16, not 8"),
        ("model.output_dim=16", r"predictor.3.weight is \[32, 64\] instead of \[16, 64\]"),
    ],
)
def test_weights_of_another_network_are_refused(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        import_weights(PUBLISHED, recipe(tmp_path / "run", override))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_values_that_are_not_finite_are_refused(tmp_path):
    content = torch.load(PUBLISHED, weights_only=True)
    content["state_dict"]["module.predictor.0.weight"][0, 0] = float("nan")
    torch.save(content, tmp_path / "a.pth.tar")
    with pytest.raises(UserError, match=r"predictor\.0\.weight is not"):
        import_weights(tmp_path / "a.pth.tar", recipe(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_bare_trunk_with_this_method_s_positions_takes_the_recipe_s_heads(tmp_path, capsys):
    """As the quickstarts have 4: nothing but the recipe can say so."""
    trunk = {n.removeprefix("base.trunk."): t for n, t in tensors_of_trunk(PUBLISHED).items()}
    torch.save(trunk, tmp_path / "bare.pth")
    import_weights(tmp_path / "bare.pth", recipe(tmp_path / "run", "model.heads=6"))
    assert "the recipe's model.heads (6) are taken" in capsys.readouterr().err
    assert open_weights(str(tmp_path / "run")).about.architecture.arguments["heads"] == 6


def tensors_of_trunk(file: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(str(file)).trunk("base")
    return dict(weights.read(list(weights.shapes)))
