"""A trained run, exported to every format that fits, each loaded by its own library; OUT is whole or not there."""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine
from engine.checkpoint.save import save
from engine.checkpoint.state import RunState
from engine.errors import RunFailed, UserError
from engine.export import main
from engine.recipe.identity import fingerprint
from engine.recipe.load import dump, load
from engine.runs.pretrain import make_moco
from engine.weights.export import export, export_classifier, is_file
from engine.weights.formats import transformers
from engine.weights.formats.table import NAMES, format_page
from engine.weights.opening import open_trunk, open_weights
from engine.weights.weights import MARK, Head
from tests.weights.files import GOLDEN, ROOT, trunk_of

TOLERANCE = 1e-5
# The checkpoint holds the online probe as well, which is no part of the networks.
FEW_STEPS = ["train.max_steps=3", "evaluate.knn_every_epochs=0", "evaluate.online_probe=true", "data.workers=0"]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The quickstart after three steps on two ranks: its checkpoint lies in two shards."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    done = run(
        *("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "engine.run"),
        *("recipes/quickstart.yaml", f"run.dir={folder}", *FEW_STEPS),
    )
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "checkpoints" / "step_0000003").glob("*.distcp"))) == 2
    return folder


@pytest.fixture(scope="session")
def features(trained):
    """Of both encoders, on fixed images, by our own networks."""
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return images, {name: trunk_of(trained, name)(images) for name in ("base", "momentum")}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return ((one - other).abs().max() / other.abs().max()).item() <= TOLERANCE


@pytest.fixture
def here(monkeypatch):
    """Proofs in this process, to save the seconds in which another one would import everything again."""
    monkeypatch.setattr("engine.weights.export._in_own_process", lambda function, *arguments: function(*arguments))


def export_here(checkpoint: Path, out: Path, name: str, **options) -> dict:
    return export(partial(open_weights, str(checkpoint)), out, name, **options)


def test_a_run_exports_to_timm_from_the_command_line(trained, features, tmp_path):
    import timm

    out = tmp_path / "out"
    done = run("engine.export", str(trained), str(out), "--format", "timm")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["max_feature_difference"] <= TOLERANCE
    assert {Path(file).name for file in result["files"]} == {"model.safetensors", "config.json", "README.md"}
    assert "proof: the largest difference" in done.stderr

    images, ours = features
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        assert close(model(images), ours["base"])
    assert json.loads((out / "config.json").read_text())["model_args"]["num_heads"] == 4
    assert list(tmp_path.iterdir()) == [out]

    card = (out / "README.md").read_text()
    for part in (
        "license: unknown",
        "| licence | not stated |",
        "| steps | 3 |",
        "shards",
        "engine.export",
        "base_lr: 0.004",
        "| encoder | base |",
    ):
        assert part in card


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("timm", "a.safetensors"),
        ("timm", "a.pt"),
        ("moco_v3", "a.pth.tar"),
        ("moco_v3", "folder"),
        ("deit", "a.pth"),
        ("safetensors", "a.safetensors"),
        ("transformers", "folder"),
        ("onnx", "a.onnx"),
    ],
)
def test_a_run_exports_to_every_format_that_fits(name, out, trained, features, tmp_path, here):
    encoder = None if format_page(name).whole else "momentum"
    result = export_here(trained, tmp_path / out, name, encoder=encoder)
    assert result["max_feature_difference"] <= TOLERANCE
    assert list(tmp_path.iterdir()) == [tmp_path / out]
    assert is_file(tmp_path / out) or (tmp_path / out / "README.md").is_file()
    images, ours = features
    if name == "onnx":
        with pytest.raises(UserError, match="ONNX"):
            open_weights(str(tmp_path / out))
        return
    assert close(trunk_of(tmp_path / out)(images), ours[encoder or "base"])
    about = open_weights(str(tmp_path / out)).known()
    assert (about.image_size, about.mean, about.std) == (28, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))


def test_transformers_reads_its_folder_without_our_help(trained, features, tmp_path, here):
    from transformers import AutoImageProcessor, ViTModel

    export_here(trained, tmp_path / "hf", "transformers")
    images, ours = features
    model = ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        assert close(model(pixel_values=images).last_hidden_state[:, 0], ours["base"])
    assert model.config.layer_norm_eps == 1e-6
    assert model.config.num_attention_heads == 4
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "hf").image_std) == (0.5, 0.5, 0.5)


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


def test_ours_to_safetensors_holds_every_weight_bit_for_bit(trained, tmp_path, here):
    export_here(trained, tmp_path / "all.safetensors", "safetensors")
    source, written = open_weights(str(trained)), load_file(tmp_path / "all.safetensors")
    names = list(source.shapes)
    assert written.keys() == set(names)
    assert {name.split(".")[0] for name in names} == {"base", "momentum", "predictor"}
    for name, tensor in source.read(names):
        assert torch.equal(tensor, written[name]), name
        assert tensor.dtype == written[name].dtype, name


@pytest.mark.parametrize("format", [n for n in NAMES if n != "torchvision"])
def test_a_published_file_exports_to_every_format_that_fits(format, tmp_path, here):
    result = export_here(GOLDEN / "I_vit_small_shape.pth.tar", tmp_path / "out", format)
    assert result["max_feature_difference"] <= TOLERANCE
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "CC-BY-NC-4.0, which binds" in card


@pytest.mark.parametrize("format", ["moco_v3", "deit", "safetensors", "onnx"])
def test_a_conv_stem_exports_to_every_format_that_fits(format, tmp_path, here):
    result = export_here(GOLDEN / "I_vit_conv_small_shape.pth.tar", tmp_path / "out", format)
    assert result["max_feature_difference"] <= TOLERANCE


def test_a_checkpoint_opens_under_every_name_of_it(trained):
    checkpoints = trained / "checkpoints"
    names = [trained, checkpoints, checkpoints / "latest", checkpoints / "step_0000003"]
    assert {open_weights(str(name)).origin for name in names} == {str(checkpoints / "step_0000003")}


def fresh_checkpoint(folder: Path, *overrides: str) -> Path:
    """A run at step 0, with random weights and BatchNorm statistics that are not those of a fresh network."""
    recipe = load(ROOT / "recipes" / "quickstart.yaml", [f"run.dir={folder}", *overrides])
    torch.manual_seed(0)
    tensors = {f"model.{name}": value for name, value in make_moco(recipe).initial_values(0)}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and name.endswith("weight"):  # zero where a fresh network's blocks do nothing
            tensor += 0.5
        if name.endswith(("running_mean", "running_var")):
            tensor += 0.1 * torch.rand(tensor.shape)
    state = RunState(0, dump(recipe), images={})
    save(folder / "checkpoints", tensors, state, recipe_sha256=fingerprint(recipe))
    return folder


NO_SHAPE = ["model.patch_size=null", "model.dim=null", "model.depth=null", "model.heads=null"]


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory):
    """Checkpoints of trunks by their model.name."""
    made = {}

    def get(name: str, size: int) -> Path:
        if name not in made:
            overrides = [f"model.name={name}", f"model.image_size={size}", "model.freeze_patch_projection=false"]
            made[name] = fresh_checkpoint(tmp_path_factory.mktemp("run"), *overrides, *NO_SHAPE)
        return made[name]

    return get


@pytest.mark.parametrize("format", ["torchvision", "moco_v3"])
def test_a_resnet_exports_to_every_format_that_fits(format, other_runs, tmp_path, here):
    result = export_here(other_runs("resnet50", 64), tmp_path / "out", format)
    assert result["max_feature_difference"] <= TOLERANCE
    if format == "torchvision":  # a bare table can hold tensors alone
        export_here(other_runs("resnet50", 64), tmp_path / "bare.pth", format)
        assert "ImageNet's are assumed" in open_weights(str(tmp_path / "bare.pth")).notes[-1]


@pytest.mark.parametrize(
    ("name", "formats", "refused"),
    [
        ("timm/vit_tiny_patch16_224", "timm deit transformers", "torchvision"),
        ("timm/test_resnet", "timm safetensors onnx", "torchvision deit moco_v3 transformers"),
        ("timm/test_convnext", "timm", "torchvision deit moco_v3 transformers"),
    ],
)
def test_a_timm_trunk_exports_to_every_format_that_fits(name, formats, refused, other_runs, tmp_path, here):
    source = other_runs(name, 64)
    for format in formats.split():
        assert export_here(source, tmp_path / format, format)["max_feature_difference"] <= TOLERANCE
    for format in refused.split():
        with pytest.raises(UserError, match="takes only"):
            export_here(source, tmp_path / "refused", format)


def test_timm_s_published_weights_are_a_checkpoint_too(tmp_path):
    """From the cache of downloads, as timm itself finds them there."""
    import timm

    network = timm.create_model("test_vit")
    folder = tmp_path / "hub" / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(network.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")

    cached = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run("engine.export", "timm/test_vit", str(tmp_path / "out.safetensors"), "--format", "timm", **cached)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["cls_token"], network.state_dict()["cls_token"])

    with pytest.raises(UserError, match="must be a timm model"):
        open_weights("timm/nothing")


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


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_nothing_is_replaced_unasked(tmp_path, here):
    source, out = GOLDEN / "I_vit_small_shape.pth.tar", tmp_path / "a.pth"
    out.write_text("precious")
    with pytest.raises(UserError, match="--force"):  # before anything is read
        export_here(tmp_path / "nothing", out, "deit")
    assert out.read_text() == "precious"
    export_here(source, out, "deit", force=True)
    assert torch.load(out, weights_only=True).keys() == {"model", "model_args", MARK}

    export_here(source, tmp_path / "folder", "deit")
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(UserError, match="--force"):
        export_here(source, tmp_path / "folder", "timm")
    export_here(source, tmp_path / "folder", "timm", force=True)
    assert {f.name for f in (tmp_path / "folder").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert {f.name for f in tmp_path.iterdir()} == {"a.pth", "folder"}


def test_a_failed_proof_leaves_no_file_and_the_old_one(tmp_path, monkeypatch, here):
    rows = tuple((ours, theirs[::-1]) for ours, theirs in transformers.VIT.rows)  # value, key, query
    monkeypatch.setattr(transformers, "VIT", transformers.VIT._replace(rows=rows))
    source = GOLDEN / "I_vit_small_shape.pth.tar"
    with pytest.raises(Exception, match="other features than its original"):
        export_here(source, tmp_path / "out", "transformers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("checkpoint", "out", "options", "message"),
    [
        ("I_vit_small_shape.pth.tar", "a.onnx", "--format timm", "must end in .safetensors"),
        ("I_vit_small_shape.pth.tar", "a.pt", "--format transformers", "no single file"),
        ("I_vit_small_shape.pth.tar", "none/a", "--format timm", "folder that exists"),
        ("I_vit_small_shape.pth.tar", "a", "--format torchvision", "takes only a ResNet"),
        ("I_vit_small_shape.pth.tar", "a", "--format moco_v3 --encoder momentum", "left out"),
        ("I_vit_conv_small_shape.pth.tar", "a", "--format timm", "conv stem"),
        ("I_vit_conv_small_shape.pth.tar", "a", "--format transformers", "conv stem"),
        ("I_vit_small_shape.pth.tar", "a/..", "--format timm --force", "a name of its own"),
        ("missing.pth", "a", "--format timm", "must exist"),
        ("A_vit_adamw.safetensors", "a", "--format timm", "which network they are of"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(checkpoint, out, options, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        main([str(GOLDEN / checkpoint), str(tmp_path / out), *options.split()])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else real(name))
    advice = r"needs onnxruntime, which is not installed; do `pip install -e '\.\[export\]'`"
    with pytest.raises(UserError, match=advice):
        main([str(GOLDEN / "I_vit_small_shape.pth.tar"), str(tmp_path / "a.onnx"), "--format", "onnx"])


def test_one_trunk_alone_cannot_become_a_whole(trained, tmp_path, here):
    export_here(trained, tmp_path / "timm", "timm")
    with pytest.raises(UserError, match="one trunk alone"):
        export_here(tmp_path / "timm", tmp_path / "out", "safetensors")
    with pytest.raises(UserError, match="one trunk alone"):
        export_here(tmp_path / "timm", tmp_path / "out", "deit", encoder="momentum")
    assert export_here(tmp_path / "timm", tmp_path / "out", "deit")["max_feature_difference"] <= TOLERANCE


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, here):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out, name in (("a.safetensors", "timm"), ("a.pt", "timm"), ("folder", "moco_v3"), ("a.onnx", "onnx")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(RunFailed, match="could not be written") as caught:
                export_here(trained, tmp_path / out, name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


# ---- memory ----------------------------------------------------------------------------------------------------------

WRITE = """
import sys
from pathlib import Path
from engine.weights.formats.table import format_page
from engine.weights.opening import open_trunk, open_weights
from engine.weights.weights import Head

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

checkpoint, out, name = sys.argv[1:]
form, weights = format_page(name), open_weights(checkpoint)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
start = status("VmRSS")
form.write(weights if form.whole else weights.trunk("base"), Path(out))
print((status("VmHWM") - start) / Path(out).stat().st_size)
"""


@pytest.mark.slow
def test_the_largest_vit_needs_little_more_memory_than_its_file(tmp_path):
    huge = ["model.name=vit_huge", "model.image_size=224", "model.projector_hidden_dim=4096", "model.output_dim=256"]
    fresh_checkpoint(tmp_path / "run", *huge, *NO_SHAPE)
    for name, out in (("timm", "a.pt"), ("safetensors", "a.safetensors"), ("moco_v3", "a.pth.tar")):
        command = [sys.executable, "-c", WRITE, str(tmp_path / "run"), str(tmp_path / out), name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= 1.3, name
