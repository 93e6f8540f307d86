"""A trained run, exported to every format that fits, each loaded by its own library; OUT is whole or not there."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import RunFailed, UserError
from engine.export import main
from engine.weights.export import is_file
from engine.weights.formats import transformers
from engine.weights.formats.table import NAMES, format_page
from engine.weights.opening import open_weights
from engine.weights.weights import MARK
from tests.distributed.launch import on_ranks
from tests.weights.exports import NO_SHAPE, TOLERANCE, close, export_here, fresh_checkpoint
from tests.weights.files import GOLDEN, ROOT, trunk_of


def test_a_run_exports_to_timm_from_the_command_line(trained, features, tmp_path):
    import timm

    out = tmp_path / "out"
    said, err = on_ranks(0, "engine.export", trained, out, "--format", "timm")
    result = json.loads(said.splitlines()[-1])
    assert result["max_feature_difference"] <= TOLERANCE
    assert {Path(file).name for file in result["files"]} == {"model.safetensors", "config.json", "README.md"}
    assert "proof: the largest difference" in err

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


def test_timm_s_published_weights_are_a_checkpoint_too(tmp_path, monkeypatch, here):
    """From the cache of downloads, as timm itself finds them there."""
    import timm

    network = timm.create_model("test_vit")
    folder = tmp_path / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(network.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main(["timm/test_vit", str(tmp_path / "out.safetensors"), "--format", "timm"])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["cls_token"], network.state_dict()["cls_token"])

    with pytest.raises(UserError, match="must be a timm model"):
        open_weights("timm/nothing")


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


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path, here):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for folder in (tmp_path / "photos", tmp_path):
        with pytest.raises(UserError, match="must be an export or empty for --force"):
            export_here(GOLDEN / "I_vit_small_shape.pth.tar", folder, "timm", force=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


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
