"""Weights of others in what trainers and libraries wrap them in, and as their configs say them: the same features."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import engine
from engine.errors import UserError
from engine.runs.finetune import open_fetched
from engine.weights import read
from engine.weights.opening import open_weights
from engine.weights.weights import MARK, About
from models.architecture import vit
from tests.weights.exports import close, export_here
from tests.weights.files import SHAPE, photograph, small_vit, under

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ONE = torch.zeros(1)

WRAPPED = {
    "compiled": lambda t: {"model": under("_orig_mod.", t)},
    "compiled and on ranks": lambda t: {"state_dict": under("module._orig_mod.", t)},
    "compiled blocks": lambda t: {n.replace("blocks.0.", "blocks.0._orig_mod."): value for n, value in t.items()},
    "Lightning": lambda t: {"state_dict": under("model.", t), "callbacks": {}, "hyper_parameters": {"lr": 1.0}},
    "Lightly": lambda t: {"state_dict": under("student_backbone.", t) | under("teacher_backbone.", t)},
    "DINOv2 in training": lambda t: {"model": under("student.backbone.", t) | under("teacher.backbone.", t)},
    "BYOL": lambda t: under("online_network.encoder.", t) | under("target_network.encoder.", t),
    "iBOT": lambda t: {"teacher": under("backbone.", t | {"masked_embed": ONE}), "student": {"module.x": ONE}},
    "MAE's linear": lambda t: {"model": t | {"head.0.running_mean": ONE, "head.1.weight": ONE}},
    "base encoder alone": lambda t: {"state_dict": under("module.base_encoder.", t | {"head.0.weight": ONE})},
    "DeepSpeed": lambda t: {"module": t, "optimizer": None},
    "two tables": lambda t: {"checkpoint": {"model": t, "optimizer": {"state": {0: {"step": ONE}}}}},
    "a table of its own name": lambda t: {"resnet": t, "head": {}, "epoch": 3},
    "NumPy's numbers": lambda t: {"model": t, "best": np.float64(0.5), "epoch": np.int64(3), "seen": np.arange(3)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_trunk_in_any_wrapping_gives_its_features(kind, tmp_path):
    network = small_vit(heads=6)
    torch.save(WRAPPED[kind](network.state_dict()), tmp_path / "a.pth")
    with pytest.raises(UserError, match="pass --heads 12"):
        engine.load(tmp_path / "a.pth")
    assert close(engine.load(tmp_path / "a.pth", heads=6)(IMAGES), network(IMAGES))


def test_of_several_tables_none_is_guessed(tmp_path):
    tensors = small_vit(heads=6).state_dict()
    torch.save({"first": tensors, "second": dict(tensors)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a table of tensors by name; found first, second"):
        open_weights(str(tmp_path / "a.pth"))


def test_tables_that_hold_each_other_are_looked_at_once(tmp_path, monkeypatch):
    """Of a hundred, each in each, there would be a million ways."""
    tables: list[dict] = [{} for _ in range(100)]
    for table in tables:
        table |= {str(number): other for number, other in enumerate(tables)}
    looked, look = [], read._keys
    monkeypatch.setattr(read, "_keys", lambda *of: looked.append(of) or look(*of))
    torch.save(tables[0], tmp_path / "a.pth")
    with pytest.raises(UserError, match="a table of tensors by name"):
        open_weights(str(tmp_path / "a.pth"))
    assert len(looked) <= 100


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_one_line(dtype, tmp_path):
    tensors = small_vit(heads=6).state_dict()
    torch.save(tensors | {"norm.weight": torch.ones(48, dtype=dtype)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"must be real numbers; base\.trunk\.norm\.weight is of {dtype}"):
        engine.load(tmp_path / "a.pth", heads=6)


# ---- what a config.json and its neighbour say ------------------------------------------------------------------------


def vit_of_transformers(folder: Path, **more):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
    network = ViTModel(ViTConfig(image_size=32, **sizes, **more)).eval()
    network.save_pretrained(folder)
    return lambda images: network(pixel_values=images).last_hidden_state[:, 0]


@pytest.mark.parametrize("said", [{}, {"layer_norm_eps": 1e-3}])
@torch.no_grad()
def test_the_eps_of_layer_norms_is_the_config_s(said, tmp_path, here, capsys):
    """transformers' usual one is 1e-12; elsewhere it is 1e-6, which makes a difference of 1e-3 here."""
    features = vit_of_transformers(tmp_path / "vit", **said)(IMAGES)
    assert close(engine.load(tmp_path / "vit")(IMAGES), features)
    export_here(tmp_path / "vit", tmp_path / "again", "transformers")
    assert close(engine.load(tmp_path / "again")(IMAGES), features)
    weights = open_fetched(str(tmp_path / "vit"), "base", untrained=False)
    assert weights.known().norm_eps is None
    assert "those that are trained have 1e-06" in capsys.readouterr().err


SIZES = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    "said", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"size": 36}]
)
def test_a_processor_that_scales_otherwise_is_obeyed(said, tmp_path):
    from transformers import AutoImageProcessor, BitImageProcessor

    vit_of_transformers(tmp_path)
    BitImageProcessor(**SIZES).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(photograph(), return_tensors="pt")["pixel_values"][0]
    ours = engine.load(tmp_path).transform(photograph())
    assert (ours - theirs).abs().mean() / theirs.std() < 0.01


@pytest.mark.parametrize(
    ("said", "note"),
    [
        ({"do_resize": False}, "that it does not resize images"),
        ({"crop_size": {"height": 24, "width": 24}}, "its crop_size of"),
        ({"do_center_crop": False}, "its resizing without a crop"),
    ],
)
def test_what_a_processor_does_otherwise_is_said(said, note, tmp_path):
    from transformers import BitImageProcessor

    vit_of_transformers(tmp_path)
    BitImageProcessor(**SIZES | said).save_pretrained(tmp_path)
    assert f"{note}" in open_weights(str(tmp_path)).notes[-1]


def folder_of_timm(network: torch.nn.Module, folder: Path, model_args: dict | None = None) -> Path:
    save_for_hf(network, folder, model_config={"model_args": model_args or {}}, safe_serialization=True)
    return folder


def test_other_pooling_than_the_network_s_own_is_refused(tmp_path):
    """It shows in no tensor, and makes other features."""
    for number, network in enumerate(
        [
            timm.create_model("test_resnet", global_pool="max"),
            timm.create_model("test_vit", global_pool="avg", fc_norm=False),
        ]
    ):
        folder = folder_of_timm(network, tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_args": {}}))
        with pytest.raises(UserError, match=r"its global_pool must be (avg|token), the network's own; (max|avg) makes"):
            open_weights(str(folder))


@torch.no_grad()
def test_arguments_that_change_no_feature_are_taken(tmp_path):
    beside: dict = {"dynamic_img_size": True, "drop_path_rate": 0.1}
    network = small_vit(heads=6, **beside)
    folder = folder_of_timm(network, tmp_path, {**SHAPE, "num_heads": 6, **beside})
    assert close(engine.load(folder)(IMAGES), network(IMAGES))


CHANGES: list[tuple[dict, str]] = [
    ({"input_size": [3, 0, 0]}, "must be squares"),
    ({"input_size": [3, 10**6, 10**6]}, "are too large: more than 16,384 pixels"),
    ({"std": [0, 0, 0]}, "std must be above 0"),
    ({"mean": [float("nan")] * 3}, "three numbers"),
]


@pytest.mark.parametrize(("said", "message"), CHANGES)
def test_a_config_of_odd_numbers_is_one_line(said, message, tmp_path):
    folder = folder_of_timm(timm.create_model("test_resnet"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(said)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_weights(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_args": [1]}))
    with pytest.raises(UserError, match="must be as timm or transformers write it"):
        open_weights(str(folder))


def test_only_unknown_arguments_are_called_unknown(tmp_path):
    folder = folder_of_timm(small_vit(heads=6, qk_norm=True), tmp_path, {**SHAPE, "num_heads": 6, "qk_norm": True})
    with pytest.raises(UserError, match="must be known; qk_norm is not"):
        open_weights(str(folder))


@pytest.mark.parametrize(
    "said",
    [{"image_size": n} for n in (0, -3, 64, 10**9)] + [{"mean": [float("nan")] * 3}, {"std": [0, 0, 0]}],
)
def test_a_file_s_own_words_of_odd_numbers_are_one_line(said, tmp_path):
    about = json.loads(About(vit(32, 16, 48, 2, 6, False), 32, (0.5,) * 3, (0.5,) * 3).to_json())
    save_file(small_vit(heads=6).state_dict(), tmp_path / "a.safetensors", metadata={MARK: json.dumps(about | said)})
    with pytest.raises(UserError, match=r"its metadata moco_v3_engine cannot be understood \((image_size|mean) must"):
        open_weights(str(tmp_path / "a.safetensors"))
