"""Files and folders of other projects, as those write them: recognised by names, refused in one line, never guessed."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor
from torchvision.models import resnet50
from torchvision.transforms import ToTensor

import engine
from engine.errors import UserError
from engine.evaluation.subject import open_subject
from engine.export import main
from engine.weights.opening import open_trunk, open_weights
from models.vit import sincos_position
from tests.weights.exports import fresh_checkpoint
from tests.weights.files import PUBLISHED, SHAPE, photograph, small_vit, state_dict, trunk_of, under


def close(one: Tensor, other: Tensor) -> bool:
    return ((one - other).abs().max() / other.abs().max()).item() <= 1e-5


# ---- families --------------------------------------------------------------------------------------------------------

HEAD = {"fc.0.weight": torch.zeros(2, 2), "fc.2.bias": torch.zeros(2)}
QUEUE = {"module.queue": torch.zeros(2, 2), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
PREDICTOR = {"module.predictor.0.weight": torch.zeros(2, 2)}
SWAV = {"module.projection_head.0.weight": torch.zeros(2, 2), "module.prototypes.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    network = resnet50()
    network.fc = torch.nn.Identity()
    return network.eval()


FAMILIES = {
    "moco v2": lambda t: under("module.encoder_q.", t | HEAD) | under("module.encoder_k.", t | HEAD) | QUEUE,
    "simsiam": lambda t: under("module.encoder.", t | HEAD) | PREDICTOR,
    "byol": lambda t: under("online_encoder.net.", t) | {"online_encoder.projector.0.weight": torch.zeros(2, 2)},
    "swav": lambda t: under("module.", t) | SWAV,
    "dino": lambda t: under("module.backbone.", t) | {"module.head.last_layer.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_resnet_of_every_family_gives_its_features(family, resnet, tmp_path):
    arguments = argparse.Namespace(arch="resnet50", lr=0.03)
    content = {"state_dict": FAMILIES[family](dict(resnet.state_dict())), "args": arguments, "epoch": 200}
    torch.save(content, tmp_path / "a.pth.tar")
    images = torch.randn(2, 3, 64, 64)
    assert close(trunk_of(tmp_path / "a.pth.tar")(images), resnet(images))
    assert (
        "size, mean and std of its images: 224 pixels and ImageNet's are assumed"
        in open_weights(str(tmp_path / "a.pth.tar")).notes[-1]
    )


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (
            {
                "student": {},
                "teacher": "t",
                "optimizer": {"state": {0: 1}},
                "dino_loss": {},
                "args": {"lr": 1},
                "epoch": 9,
            },
            "teacher.backbone; left: student, optimizer, dino_loss, args, fc (2 tensors)",
        ),
        (
            {"state_dict": "t", "state_dict_ema": {}, "model_args": None},
            "state_dict.backbone; left: state_dict_ema, fc",
        ),
        ({"model": "t", "epoch": 9}, "model.backbone; left: fc (2 tensors)"),
    ],
)
def test_what_of_a_file_is_taken_and_left_is_one_line(content, taken, resnet, tmp_path):
    tensors = under(
        "module.backbone.", resnet.state_dict() | {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
    )
    others = under("module.", {"x": torch.zeros(1)})
    named = {key: tensors if value == "t" else others if value == {} else value for key, value in content.items()}
    torch.save(named, tmp_path / "a.pth")
    (line,) = (line for line in open_weights(str(tmp_path / "a.pth")).notes if "; left: " in line)
    assert line.startswith(f"taken from {tmp_path / 'a.pth'}: {taken.replace('.backbone', '.module.backbone')}")


def test_dinov2_is_timm_s_network(tmp_path):
    with torch.device("meta"):
        shapes = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    tensors = {name: torch.zeros(value.shape) for name, value in shapes.items()}
    torch.save(tensors | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    about = open_weights(str(tmp_path / "dinov2_vits14_pretrain.pth")).about
    assert about.architecture.arguments == {"name": "vit_small_patch14_dinov2", "image_size": 518}
    torch.save(tensors | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "registers.pth")
    with pytest.raises(UserError, match="without registers"):
        open_weights(str(tmp_path / "registers.pth"))


def test_an_unknown_family_is_told_by_its_first_names(tmp_path):
    tensors = {f"trunk.{name}": torch.zeros(1) for name in "abcde"}
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"trunk\.a, trunk\.b, trunk\.c and 2 more.*MoCo v1 to v3, SimSiam, BYOL.*as in ResNet-50"
    ):
        trunk_of(tmp_path / "a.pth")


@torch.no_grad()
def test_the_reference_s_linear_classifiers_are_checkpoints(tmp_path):
    prefix = "module.base_encoder."
    trunk = {n.removeprefix(prefix): t for n, t in state_dict(PUBLISHED[0]).items() if n.startswith(prefix)}
    trunk = {n: t for n, t in trunk.items() if not n.startswith("head.")}
    tensors = under("module.", trunk | {"head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)})
    content = {"epoch": 90, "arch": "vit_small", "state_dict": tensors, "best_acc1": torch.tensor(73.2)}
    torch.save(content, tmp_path / "linear-vit-s-300ep.pth.tar")
    images = torch.randn(2, 3, 64, 64)
    assert close(trunk_of(tmp_path / "linear-vit-s-300ep.pth.tar")(images), trunk_of(PUBLISHED[0])(images))
    assert open_weights(str(tmp_path / "linear-vit-s-300ep.pth.tar")).about.licence == "CC-BY-NC-4.0"


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["model", "state_dict", None])
@torch.no_grad()
def test_heads_are_asked_where_nothing_tells_them(wrapped, tmp_path, here):
    """A ViT-S of timm, DeiT or DINO has 6, of MoCo v3 12, with equal shapes."""
    network, file = small_vit(heads=6), tmp_path / "a.pth"
    tensors = network.state_dict()
    torch.save({wrapped: tensors, "args": argparse.Namespace(model="deit_small")} if wrapped else tensors, file)
    with pytest.raises(UserError, match=r"pass --heads 12 .* --heads 6 \(ViT-S of timm, DeiT and DINO\)"):
        engine.load(file)
    images = torch.randn(2, 3, 32, 32)
    assert close(engine.load(file, heads=6)(images), network(images))
    assert not close(engine.load(file, heads=12)(images), network(images))
    with pytest.raises(UserError, match="heads"):
        engine.load(file, heads=7)
    main([str(file), str(tmp_path / "out"), "--format", "timm", "--heads", "6"])
    assert close(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), network(images))


def test_this_method_s_positions_mean_twelve_and_mae_s_do_not(tmp_path):
    tensors = small_vit(heads=6).state_dict()
    ours = sincos_position(2, 2, 48)
    torch.save({"model": tensors | {"pos_embed": ours}}, tmp_path / "ours.pth")
    assert open_weights(str(tmp_path / "ours.pth")).about.architecture.arguments["heads"] == 12
    torch.save({"model": tensors | {"pos_embed": ours.roll(24, dims=2)}}, tmp_path / "mae.pth")  # columns first
    with pytest.raises(UserError, match="--heads"):
        engine.load(tmp_path / "mae.pth")


def test_heads_that_a_file_tells_are_not_overruled():
    with pytest.raises(UserError, match=r"--heads \(6\) must be 12"):
        engine.load(PUBLISHED[0], heads=6)


# ---- folders ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_of_timm_is_a_checkpoint(tmp_path, capsys):
    """As timm itself writes it: heads, size, mean and std from its config.json."""
    network = small_vit(heads=6, num_classes=3, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)})
    arguments = {**SHAPE, "num_heads": 6}
    save_for_hf(network, tmp_path / "timm", model_config={"model_args": arguments}, safe_serialization=True)
    encoder, images = engine.load(tmp_path / "timm"), torch.randn(2, 3, 32, 32)
    assert close(encoder(images), network.forward_head(network.forward_features(images), pre_logits=True))
    assert (encoder.image_size, encoder.subject.mean) == (32, (0.1, 0.2, 0.3))
    assert "images are prepared as" in capsys.readouterr().err

    convnext = timm.create_model("test_convnext", pretrained_cfg_overlay={"crop_mode": "squash"})
    save_for_hf(convnext, tmp_path / "convnext", safe_serialization=True)
    assert "crop_mode squash" in open_weights(str(tmp_path / "convnext")).notes[-1]
    assert open_weights(str(tmp_path / "convnext")).about.architecture.arguments["name"] == "test_convnext"


@torch.no_grad()
def test_a_folder_of_transformers_is_a_checkpoint(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
    torch.manual_seed(0)
    network = ViTModel(ViTConfig(image_size=32, layer_norm_eps=1e-6, **sizes)).eval()
    network.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    encoder = engine.load(tmp_path)
    pixels = torch.from_numpy(ToTensor()(Image.new("RGB", (32, 32), (10, 200, 30))).numpy())[None]
    assert close(encoder(pixels), network(pixel_values=pixels).last_hidden_state[:, 0])
    assert encoder.subject.mean == (0.1, 0.2, 0.3)
    assert "its resizing to a square" in open_weights(str(tmp_path)).notes[-1]


@pytest.mark.parametrize(("fraction", "by"), [(0.9, "bicubic"), (0.95, "bilinear"), (1.0, "bicubic")])
def test_images_are_prepared_as_a_network_s_own_library_does(fraction, by, tmp_path, here):
    said = {"input_size": (3, 32, 32), "crop_pct": fraction, "interpolation": by, "std": (0.3, 0.2, 0.1)}
    network = small_vit(heads=6, pretrained_cfg_overlay=said)
    arguments = {**SHAPE, "num_heads": 6}
    save_for_hf(network, tmp_path / "timm", model_config={"model_args": arguments}, safe_serialization=True)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(network))(photograph())
    torch.testing.assert_close(engine.load(tmp_path / "timm").transform(photograph()), theirs)
    main([str(tmp_path / "timm"), str(tmp_path / "again"), "--format", "timm"])
    torch.testing.assert_close(engine.load(tmp_path / "again").transform(photograph()), theirs)
    chosen = open_subject(str(tmp_path / "timm"), "cpu", crop_fraction=0.5)
    assert (chosen.crop_fraction, chosen.interpolation) == (0.5, by)

    crop, config = open_weights("timm/convnext_tiny").crop, timm.create_model("convnext_tiny").pretrained_cfg
    assert crop.resized_side == int(224 / config["crop_pct"]) == 235
    assert crop.interpolation == config["interpolation"] == "bicubic"


def test_a_border_that_others_leave_is_said(tmp_path):
    """As of timm's volo_d4_448, which resizes to less than its images have."""
    network = timm.create_model("test_convnext", pretrained_cfg_overlay={"crop_pct": 1.15, "input_size": (3, 64, 64)})
    save_for_hf(network, tmp_path, safe_serialization=True)
    for checkpoint, side in ((str(tmp_path), 55), ("timm/volo_d4_448", 389)):
        weights = open_weights(checkpoint)
        assert weights.crop.resized_side == weights.crop.size
        assert f"a border around images of {side} pixels; the centre" in weights.notes[-1]


def test_transformers_own_processor_prepares_images_alike(tmp_path):
    from transformers import AutoImageProcessor, BitImageProcessor, ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 192}
    ViTModel(ViTConfig(image_size=32, **sizes)).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(resample=3, image_mean=[0.1, 0.2, 0.3], **size).save_pretrained(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(photograph(), return_tensors="pt")["pixel_values"][0]
    ours = engine.load(tmp_path).transform(photograph())
    assert (ours - theirs).abs().mean() < 0.01  # of values that spread by 1; bilinear, or another crop, is 3 times off
    BitImageProcessor(size={"shortest_edge": 24}).save_pretrained(tmp_path)
    assert "a border around images of 24 pixels" in open_weights(str(tmp_path)).notes[-1]


SAID = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
CONFIG = {"architecture": "vit_small_patch16_224", "pretrained_cfg": SAID}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("nothing", "must be readable JSON"),
        ([], "a table of keys"),
        ({"model_type": "bert"}, "its model_type is bert"),
        ({"model_type": "vit"}, "num_attention_heads"),
        ({"model_type": "vit", "num_attention_heads": 6, "hidden_act": "relu"}, "hidden_act must be gelu"),
        (CONFIG | {"pretrained_cfg": {"input_size": [3, 32, 32]}}, "mean"),
        (CONFIG | {"pretrained_cfg": SAID | {"input_size": [3, 32, 64]}}, "squares"),
        (CONFIG | {"model_args": {"num_heads": 3}}, "model_args must be known; num_heads"),
        (CONFIG | {"model_args": {"in_chans": 1}}, "three channels"),
        *(
            (CONFIG | {"pretrained_cfg": SAID | {"crop_pct": x}}, "crop_pct must be from 0.01")
            for x in (0, 5e-324, 1e9)
        ),
        (CONFIG | {"pretrained_cfg": SAID | {"crop_pct": 0.9, "input_size": [3, 10**400, 10**400]}}, "too large"),
    ],
)
def test_a_config_that_tells_too_little_is_one_line(config, message, tmp_path):
    save_file({"cls_token": torch.zeros(1, 1, 48)}, tmp_path / "model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    Path(tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Namespace(argparse.Namespace):
    """One that would run code of its own."""

    def __setstate__(self, state):
        raise AssertionError("this ran")


@pytest.mark.parametrize("value", [Path("here"), Namespace(a=1)])
def test_the_stand_in_for_settings_opens_no_other_door(value, tmp_path):
    tensors = small_vit(heads=6).state_dict()
    torch.save({"model": tensors, "args": argparse.Namespace(output=value)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="its pickle asks for"):
        open_weights(str(tmp_path / "a.pth"))


# ---- timm's published weights without a network ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.weights", "run.continue_from"])
def test_the_baseline_of_a_run_that_began_with_weights_is_no_random_network(key, tmp_path):
    run = fresh_checkpoint(tmp_path / "run", f"{key}=elsewhere")
    with pytest.raises(UserError, match=rf"must be left out for .* {key} \(elsewhere\); pass those as CHECKPOINT"):
        open_trunk(str(run), untrained=True)
    assert open_trunk(str(run)).is_whole is False
