"""Weights of others: renamed exactly, given back bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.errors import UserError
from engine.weights.export import fitting_architecture
from engine.weights.formats import moco_v3, transformers
from engine.weights.formats.table import NAMES, format_page
from engine.weights.formats.timm import create_arguments
from engine.weights.names import TRUNK
from engine.weights.opening import open_weights
from engine.weights.prove import prove
from engine.weights.read import read_weights
from engine.weights.weights import MARK, About, Weights
from models.architecture import Architecture, by_shape, of_shapes, trunk_shapes, vit
from models.moco import MoCo
from tests.weights.files import GOLDEN, PUBLISHED, ROOT, assert_same, state_dict, trunk_of, write

TOLERANCE = 1e-5  # of the largest value


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def expected(file: Path) -> dict[str, torch.Tensor]:
    return load_file(str(file).replace(".pth.tar", ".expected.safetensors"))


# ---- published files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_published_files_give_the_reference_s_features_and_projections(file):
    golden = expected(file)
    images = golden["images"].float()
    assert difference(trunk_of(file)(images), golden["features"]) <= TOLERANCE

    weights = open_weights(str(file))
    with torch.device("meta"):
        moco = MoCo(weights.about.architecture.build, *weights.head_dims)
    moco.load_state_dict(dict(weights.read(list(weights.shapes))), strict=True, assign=True)
    with torch.no_grad():
        moco.eval()
        assert difference(moco.base(images)[1], golden["projection"]) <= TOLERANCE
        assert difference(moco.momentum(images)[1], golden["momentum_projection"]) <= TOLERANCE
    assert difference(trunk_of(file, "momentum")(images), golden["features"]) > 100 * TOLERANCE


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_round_trips_are_the_identity(file, tmp_path):
    ours = write(tmp_path / "ours.safetensors", "safetensors", file)
    back = write(tmp_path / "back.pth.tar", "moco_v3", ours)
    assert_same(state_dict(back), state_dict(file))
    again = write(tmp_path / "again.safetensors", "safetensors", back)
    assert_same(load_file(again), load_file(ours))

    content, original = torch.load(back, weights_only=True), torch.load(file, weights_only=True)
    assert content.keys() == original.keys() | {"model_args", MARK}
    assert (content["arch"], content["epoch"]) == (original["arch"], original["epoch"])
    assert content["optimizer"] is None
    assert content["model_args"]["num_heads"] == 12
    note = "optimizer, scaler" if original["optimizer"] else "scaler"
    assert [n.rpartition(": ")[2] for n in read_weights(file).notes] == [note]
    assert read_weights(back).about == read_weights(file).about
    torch.save({key: value for key, value in content.items() if key != MARK}, tmp_path / "former.pth.tar")
    assert "ImageNet" in read_weights(tmp_path / "former.pth.tar").notes[0]


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_the_deit_form_is_the_base_trunk_without_prefix_and_head(file, tmp_path):
    content = torch.load(write(tmp_path / "deit.pth", "deit", file), weights_only=True)
    prefix = "module.base_encoder."
    trunk = {
        n.removeprefix(prefix): t for n, t in state_dict(file).items() if n.startswith(prefix) and ".head." not in n
    }
    assert content.keys() == {"model", "model_args", MARK}
    assert_same(content["model"], trunk)
    golden = expected(file)
    assert difference(trunk_of(tmp_path / "deit.pth")(golden["images"].float()), golden["features"]) <= TOLERANCE

    torch.save({"model": trunk}, tmp_path / "theirs.pth")  # as the reference's own script writes it
    assert open_weights(str(tmp_path / "theirs.pth")).about.architecture.arguments["heads"] == 12
    torch.save(trunk, tmp_path / "bare.pth")  # its positions are this method's
    assert open_weights(str(tmp_path / "bare.pth")).about.architecture.arguments["heads"] == 12


def test_a_file_s_own_model_args_decide_over_twelve_heads(tmp_path):
    content = torch.load(PUBLISHED[0], weights_only=True)
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 4}
    torch.save(content | {"model_args": arguments}, tmp_path / "a.pth.tar")
    assert open_weights(str(tmp_path / "a.pth.tar")).about.architecture.arguments["heads"] == 4
    for wrong in ({"depth": 3}, {"img_size": 96}, {"num_heads": 5}, {"num_heads": "4"}, {"embed_dim": 10**12}):
        torch.save(content | {"model_args": arguments | wrong}, tmp_path / "b.pth.tar")
        with pytest.raises(UserError, match=r"model_args|heads"):
            open_weights(str(tmp_path / "b.pth.tar"))


# ---- complete published files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Files of every name and shape that a published one has, filled at random."""

    def make(name: str) -> Path:
        shapes = json.loads((GOLDEN / "J_published_names.json").read_text())[name]
        generator = torch.Generator().manual_seed(0)
        tensors = {n: random_tensor(n, shape, generator) for n, shape in shapes.items()}
        file = tmp_path_factory.mktemp("complete") / f"{name}.pth.tar"
        torch.save({"epoch": 300, "arch": name, "state_dict": tensors, "optimizer": None}, file)
        return file

    return make


def random_tensor(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Of a size that keeps a network's activations near one."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    value = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return value.square() + 0.5
    return (
        1 + 0.1 * value
        if len(shape) == 1 and name.endswith("weight")
        else value * torch.Size(shape)[1:].numel() ** -0.5
    )


@pytest.mark.parametrize(("name", "format"), [("vit_small", "timm"), ("resnet50", "torchvision")])
def test_complete_published_files_export_with_equal_features_and_round_trip(name, format, complete, tmp_path):
    file = complete(name)
    source = open_weights(str(file))
    assert source.about.architecture.name == name
    out = write(tmp_path / "trunk.safetensors", format, file)
    difference = prove(lambda: source, "base", format, out, source.about.architecture).difference
    assert difference <= TOLERANCE
    if name == "resnet50":
        both = prove(
            lambda: source, "base", "timm", write(tmp_path / "timm.pt", "timm", file), source.about.architecture
        )
        assert both.difference <= TOLERANCE
    ours = write(tmp_path / "ours.safetensors", "safetensors", file)
    assert_same(state_dict(write(tmp_path / "back.pth.tar", "moco_v3", ours)), state_dict(file))


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "vit_conv_small", "vit_conv_base", "resnet50"])
def test_every_published_name_has_its_place(name):
    shapes = json.loads((GOLDEN / "J_published_names.json").read_text())[name]
    naming = moco_v3.RESNET if name == "resnet50" else moco_v3.VIT
    ours = {naming.ours(n): torch.Size(shape) for n, shape in shapes.items()}
    assert [naming.theirs(n) for n in ours] == [(n,) for n in shapes]
    trunk = {n.removeprefix("base.trunk."): s for n, s in ours.items() if n.startswith("base.trunk.")}
    architecture = of_shapes(trunk, None, 12)
    assert architecture.name == name
    assert trunk_shapes(architecture) == trunk


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", [moco_v3.VIT, moco_v3.RESNET, transformers.VIT, TRUNK])
def test_renaming_there_and_back_is_the_identity(naming):
    names = [f"base.trunk.{n}" for n in trunk_shapes(vit(28, 7, 96, 12, 4, False))]
    if naming in (moco_v3.VIT, moco_v3.RESNET):
        names += [n.replace("base.", "momentum.") for n in names] + ["base.projector.0.weight", "predictor.1.bias"]
    theirs = [other for name in names for other in naming.theirs(name)]
    assert len(set(theirs)) == len(theirs)
    assert all(name == naming.ours(other) for name in names for other in naming.theirs(name))


def test_every_page_of_formats_is_in_the_table():
    pages = {path.stem for path in (ROOT / "engine" / "weights" / "formats").glob("*.py")}
    assert pages == {*NAMES, "table", "__init__"}


def test_timm_s_small_vit_is_not_ours():
    """The classic trap: the name is the same, the number of heads is not."""
    architecture = vit(224, 16, 384, 12, 12, False)
    assert create_arguments(architecture)[0] == "vit_small_patch16_224"
    assert create_arguments(architecture)[1]["num_heads"] == 12
    theirs = by_shape(Architecture("timm", {"name": "vit_small_patch16_224", "image_size": 224}))
    assert theirs.arguments["heads"] == 6
    assert theirs.differs_from(architecture) == "its trunk has heads 6, not 12"


def test_the_proof_sees_another_number_of_heads_and_another_order_of_positions(tmp_path):
    source = read_weights(PUBLISHED[0])
    about = source.about
    fewer = about.architecture.arguments | {"heads": 4}
    wrong_heads = vars(about) | {"architecture": Architecture("vit", fewer)}
    swapped = torch.cat([torch.arange(24, 48), torch.arange(24)])  # columns before rows

    def read(names):
        for name, tensor in source.read(names):
            yield name, tensor[..., swapped] if name.endswith("pos_embed") else tensor

    for wrong in (
        Weights(About(**wrong_heads), source.shapes, source.read, "heads"),
        Weights(about, source.shapes, read, "positions"),
    ):
        format_page("timm").write(wrong.trunk("base"), tmp_path / "wrong.safetensors")
        with pytest.raises(Exception, match="has other features than its original"):
            prove(lambda: source, "base", "timm", tmp_path / "wrong.safetensors", about.architecture)


@pytest.mark.parametrize(
    ("name", "by_shape_as"),
    [
        ("vit_tiny_patch16_224", "vit"),
        ("resnet50", "resnet"),
        ("vit_base_patch16_clip_224", "timm"),
        ("convnext_atto", "timm"),
    ],
)
def test_timm_trunks_count_as_what_their_names_and_shapes_say(name, by_shape_as):
    assert by_shape(Architecture("timm", {"name": name, "image_size": 224})).kind == by_shape_as


def test_metadata_says_what_a_single_file_needs(tmp_path):
    file = write(tmp_path / "a.safetensors", "timm", PUBLISHED[0])
    metadata = safe_open(file, "pt").metadata()
    assert metadata["architecture"] == "vit_base_patch16_224"
    assert json.loads(metadata["model_args"]) == {
        "img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 12, "num_classes": 0,
    }  # fmt: skip


# ---- what does not fit -----------------------------------------------------------------------------------------------


def changed(change, tmp_path) -> Path:
    content = torch.load(PUBLISHED[0], weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "changed.pth.tar")
    return tmp_path / "changed.pth.tar"


def test_unknown_missing_and_misshaped_names_are_listed(tmp_path):
    def change(tensors):
        tensors["module.base_encoder.extra"] = torch.zeros(1)
        del tensors["module.momentum_encoder.norm.bias"]
        tensors["module.base_encoder.norm.weight"] = torch.zeros(47)

    with pytest.raises(UserError) as caught:
        read_weights(changed(change, tmp_path))
    for part in (
        "base.trunk.extra is unknown",
        "momentum.trunk.norm.bias is missing",
        "base.trunk.norm.weight is [47] instead of [48]",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_of_no_network_is_an_error(tmp_path):
    with pytest.raises(UserError, match="stranger is unknown"):
        read_weights(changed(lambda tensors: tensors.update(stranger=torch.zeros(1)), tmp_path))


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_a_conv_stem_is_refused_where_it_has_no_place(format):
    with pytest.raises(UserError, match="without conv stem"):
        fitting_architecture(read_weights(PUBLISHED[1]), format, None)


def test_tensors_that_share_their_memory_are_written_one_by_one(tmp_path):
    def share(tensors):
        for name in list(tensors):
            if name.startswith("module.momentum_encoder."):
                tensors[name] = tensors[name.replace("momentum", "base")]

    file = changed(share, tmp_path)
    ours = write(tmp_path / "ours.safetensors", "safetensors", file)
    back = write(tmp_path / "back.pth.tar", "moco_v3", ours)
    assert_same(state_dict(back), state_dict(file))
    deit = write(tmp_path / "deit.pth", "deit", ours)
    assert deit.stat().st_size < 0.5 * back.stat().st_size
