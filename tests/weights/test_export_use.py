"""Exports as their users take them: from an image file, with a new head, by the Python of their model cards."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine
from engine.errors import RunFailed, UserError
from engine.weights.export import export_classifier
from engine.weights.formats.table import NAMES, format_page
from engine.weights.opening import open_trunk
from engine.weights.weights import Head
from tests.weights.exports import close, export_here, fresh_checkpoint
from tests.weights.files import GOLDEN, trunk_of

FRACTIONS = (1.0, 0.875, 0.92, 0.7)  # 0.92 of 243 pixels are 224, beside which no whole ones lie on both sides


@pytest.fixture
def photograph(tmp_path) -> Path:
    """Three times as wide as high."""
    coarse = torch.randint(0, 256, (9, 5, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    Image.fromarray(coarse.numpy()).resize((1002, 334), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_an_image_file_has_the_evaluation_s_features_by_the_other_library_s_own_transform(
    fraction, photograph, tmp_path, here
):
    """From files alone, as their users have them: neither transform is told anything of ours."""
    import timm
    from transformers import AutoImageProcessor, ViTModel

    large = ["model.image_size=224", "model.patch_size=28"]
    source = fresh_checkpoint(tmp_path / "run", f"evaluate.crop_fraction={fraction}", *large)
    encoder = engine.load(source)
    ours = encoder(encoder.transform(Image.open(photograph))[None])
    export_here(source, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    export_here(source, tmp_path / "hf", "transformers")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        by_timm = model(transform(Image.open(photograph))[None])
        by_transformers = theirs(**processor(Image.open(photograph), return_tensors="pt")).last_hidden_state[:, 0]
    assert torch.equal(transform(Image.open(photograph)), encoder.transform(Image.open(photograph)))
    assert torch.cosine_similarity(by_timm, ours).item() >= 0.99999
    assert torch.cosine_similarity(by_transformers, ours).item() >= 0.9999


def test_a_centre_between_two_pixels_is_said(tmp_path, here, capsys):
    """28 of 31 pixels: evaluation leaves two above and one below, transformers would leave one above."""
    source = fresh_checkpoint(tmp_path / "run", "evaluate.crop_fraction=0.9")
    export_here(source, tmp_path / "hf", "transformers")
    said = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert said["size"]["shortest_edge"] == 32
    assert "transformers resizes images to 32 pixels and evaluation to 31" in capsys.readouterr().err
    export_here(source, tmp_path / "timm", "timm")
    assert "resizes" not in capsys.readouterr().err


ALONE = """
import sys
sys.modules.update(engine=None, models=None)  # importing them is an error
import timm, torch
from PIL import Image
from transformers import AutoImageProcessor, ViTModel

by_timm, by_transformers, file, out = sys.argv[1:]
photo = Image.open(file)
found = {}
with torch.no_grad():
    for name, wanted in (("plain", {}), ("head", {"num_classes": 10}), ("grey", {"in_chans": 1})):
        model = timm.create_model(f"local-dir:{by_timm}", pretrained=True, **wanted).eval()
        images = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(photo.convert("RGB"))[None]
        found[name] = model(images[:, :1] if name == "grey" else images)
    inputs = AutoImageProcessor.from_pretrained(by_transformers)(photo, return_tensors="pt")
    vit = ViTModel.from_pretrained(by_transformers, add_pooling_layer=False).eval()
    found["transformers"] = vit(**inputs).last_hidden_state[:, 0]
torch.save(found, out)
"""


def test_exports_are_used_where_this_project_is_not(trained, photograph, tmp_path, here):
    folders = [tmp_path / name for name in ("timm", "transformers")]
    for folder in folders:
        export_here(trained, folder, folder.name)
    command = [sys.executable, "-c", ALONE, *map(str, folders), str(photograph), str(tmp_path / "found.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    encoder, found = engine.load(trained), torch.load(tmp_path / "found.pt", weights_only=True)
    ours = encoder(encoder.transform(Image.open(photograph))[None])
    for name in ("plain", "transformers"):
        assert torch.cosine_similarity(found[name], ours).item() >= 0.9999
    assert (found["head"].shape, found["grey"].shape) == ((1, 10), ours.shape)


@pytest.mark.parametrize(
    ("name", "file", "wrong"),
    [
        ("timm", "config.json", {"crop_pct": 0.8}),
        ("timm", "config.json", {"crop_mode": "squash"}),
        ("transformers", "preprocessor_config.json", {"size": {"height": 28, "width": 28}}),
        ("transformers", "preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}),
    ],
)
def test_another_transform_is_refused_by_the_proof(name, file, wrong, trained, tmp_path, monkeypatch, here):
    page = format_page(name)

    def write_config(weights, folder):
        page.config(weights, folder)
        content = json.loads((folder / file).read_text())
        content.get("pretrained_cfg", content).update(wrong)
        (folder / file).write_text(json.dumps(content))

    changed = dataclasses.replace(page, config=write_config)
    monkeypatch.setattr("engine.weights.export.format_page", lambda _: changed)
    with pytest.raises(RunFailed, match="own transform"):
        export_here(trained, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def run_card(folder: Path) -> torch.Tensor:
    """The `features` that the Python of a model card makes of photo.jpg in this folder."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(code, found)
    return torch.as_tensor(found["features"])


def test_the_python_of_every_model_card_runs_as_it_stands(trained, other_runs, photograph, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    Image.open(photograph).save("photo.jpg", quality=95)
    resnet = other_runs("resnet50", 64)
    for source, format in [(trained, name) for name in NAMES if name != "torchvision"] + [(resnet, "torchvision")]:
        encoder, out = engine.load(source), Path(f"out-{format}")
        export_here(source, out, format, licence="apache-2.0")
        ours = encoder(encoder.transform(Image.open("photo.jpg"))[None])
        assert torch.cosine_similarity(run_card(out), ours).item() >= 0.9999, format
        card = (out / "README.md").read_text()
        assert "license: apache-2.0\n" in card
        assert not re.search("PATH|ARCH|TRANSFORM|fill in", card)


def test_weights_keep_the_licence_that_binds_them(tmp_path, here):
    with pytest.raises(UserError, match=r"--license \(mit\) must be left out: .* CC-BY-NC-4\.0"):
        export_here(GOLDEN / "I_vit_small_shape.pth.tar", tmp_path / "out", "timm", licence="mit")
    assert not list(tmp_path.iterdir())


# ---- timm adapts what it loads ---------------------------------------------------------------------------------------


def adapted(folder: Path, **wanted) -> torch.nn.Module:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True, **wanted).eval()


@torch.no_grad()
def check_adaptations(folder: Path, trunk: torch.nn.Module, size: int) -> None:
    """Of an export without or with a classifier: other heads, other channels, other sizes, on the same trunk."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = trunk(images)
    for classes in (0, 10):
        model = adapted(folder, num_classes=classes)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        assert close(pooled, features)
        assert model(images).shape == (2, classes or features.shape[1])
    grey = adapted(folder, in_chans=1, num_classes=0)
    one_channel = images[:, :1]
    assert close(grey(one_channel), trunk(one_channel.expand(-1, 3, -1, -1)))


def test_a_timm_export_takes_a_new_head(trained, other_runs, tmp_path, here):
    import timm

    for source, size in ((trained, 28), (other_runs("resnet50", 64), 64), (other_runs("timm/test_convnext", 64), 64)):
        out = tmp_path / f"out{size}-{Path(source).name}"
        export_here(source, out, "timm")
        check_adaptations(out, trunk_of(source), size)
        if source == trained:  # a plain ViT has no stages
            assert adapted(out, img_size=2 * size).pos_embed.shape[1] == 1 + 64
            continue
        model, whole, images = adapted(out, features_only=True), adapted(out), torch.randn(1, 3, size, size)
        with torch.no_grad():
            last = whole.forward_intermediates(images, indices=1, intermediates_only=True)
            assert close(model(images)[-1], last[-1])
    config = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    theirs = timm.create_model("test_convnext").pretrained_cfg
    assert [config[key] for key in ("classifier", "first_conv")] == [
        theirs[key] for key in ("classifier", "first_conv")
    ]


def test_a_trunk_with_its_classifier_goes_to_timm_as_a_whole(tmp_path):
    import timm

    source, out = GOLDEN / "I_vit_small_shape.pth.tar", tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    head = Head(torch.randn(3, 48), torch.randn(3), ("a", "b", "c"), "bicubic", 0.9)
    export_classifier(open_trunk(str(source)), head, out)
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json"}
    assert list(tmp_path.iterdir()) == [out]
    model, images = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(model(images), torch.nn.functional.linear(trunk_of(source)(images), head.weight, head.bias))
    config = json.loads((out / "config.json").read_text())
    check_adaptations(out, trunk_of(source), 64)
    assert adapted(out, num_classes=3)(images).shape == (2, 3)
    assert (config["label_names"], config["license"]) == (["a", "b", "c"], "CC-BY-NC-4.0")

    with pytest.raises(UserError, match="timm has no ViT with a conv stem"):
        export_classifier(open_trunk(str(GOLDEN / "I_vit_conv_small_shape.pth.tar")), head, out)
