"""Networks: golden positions and initial weights, shapes, names; and every recipe's networks on the meta device."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from models.architecture import of_name, of_shapes
from models.norm import GlobalBatchNorm, set_views
from models.resnet import build_resnet
from models.shapes import RESNET_SHAPES, VIT_SHAPES
from models.trunk import HasStem, as_convolutions_want, blocks
from models.vit import PatchProjection, build_vit, sincos_position
from tests.replay import our_name

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if "\ntask: pretrain\n" in p.read_text())


def test_positions():
    golden = load_file(GOLDEN / "D_position.safetensors")
    for name, (side, dim) in {"grid4_dim48": (4, 48), "vit_small_224": (14, 384)}.items():
        torch.testing.assert_close(sincos_position(side, side, dim)[0], golden[name], rtol=0, atol=2e-6)


def test_positions_of_an_oblong_grid_count_row_by_row():
    """The first half of the channels tells the row, the second the column."""
    position_RCD = sincos_position(3, 5, 16)[0, 1:].view(3, 5, 16)
    assert (position_RCD[:, :1, :8] == position_RCD[:, :, :8]).all()
    assert (position_RCD[:1, :, 8:] == position_RCD[:, :, 8:]).all()
    assert len({tuple(p.tolist()) for p in position_RCD.flatten(0, 1)}) == 15


@pytest.mark.parametrize("name", ["vit_small", "vit_conv_small"])
def test_initial_weights_have_the_reference_statistics(name):
    golden = json.loads((GOLDEN / "E_initial_weights.json").read_text())[name]
    recipe = load(ROOT / f"recipes/{'vit_s' if name == 'vit_small' else 'vit_conv_s'}.yaml")
    moco = make_moco(recipe)
    trained = {n: p.requires_grad for n, p in moco.named_parameters() if not n.startswith("momentum.")}
    expected = {our_name(n): v for n, v in golden.items()}
    assert trained.keys() == expected.keys()
    for parameter, value in moco.initial_values(seed=0):
        if parameter not in expected:
            continue
        wanted = expected[parameter]
        assert (list(value.shape), trained[parameter]) == (wanted["shape"], wanted["trained"]), parameter
        tolerance = 0.03 if value.numel() > 10_000 else 0.15
        assert value.std(correction=0).item() == pytest.approx(wanted["std"], rel=tolerance, abs=1e-9), parameter
        if value.numel() > 10_000 and wanted["largest"] > 1e-5:  # near the bound of a uniform draw, never above
            assert value.abs().max().item() == pytest.approx(wanted["largest"], rel=0.02), parameter


def test_momentum_encoder_starts_as_a_copy_and_takes_no_gradient():
    moco = make_moco(load(ROOT / "recipes/quickstart_conv.yaml"))
    values = dict(moco.initial_values(seed=1))
    copies = [n for n in values if n.startswith("momentum.")]
    assert len(copies) > 30
    assert all(torch.equal(values[n], values[n.replace("momentum.", "base.", 1)]) for n in copies)
    assert not any(p.requires_grad for p in moco.momentum.parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_on_the_meta_device(path):
    recipe = load(path)
    moco = make_moco(recipe)
    assert {p.device.type for p in (*moco.parameters(), *moco.buffers())} == {"meta"}
    trunk = moco.base.trunk
    size = recipe.model.image_size
    with torch.device("meta"):
        features, queries = moco.queries(torch.empty(4, 3, size, size))
    assert features.shape == (4, moco.width)
    assert queries.shape == (4, recipe.model.output_dim)
    named = VIT_SHAPES.get(recipe.model.name)
    if named:
        assert (trunk.embed_dim, len(trunk.blocks)) == (named["dim"], named["depth"])
        assert trunk.blocks[0].attn.num_heads == named["heads"]
        assert trunk.patch_embed.patch_size[0] == named["patch_size"]
    frozen = {n for n, p in trunk.named_parameters() if not p.requires_grad}
    projection = {"patch_embed.proj.weight", "patch_embed.proj.bias"} if recipe.model.freeze_patch_projection else set()
    assert frozen == projection | ({"pos_embed"} if recipe.model.name != "resnet50" else set())
    linears = [m for m in moco.base.projector if isinstance(m, torch.nn.Linear)]
    norms = [m for m in moco.base.projector if isinstance(m, GlobalBatchNorm)]
    assert len(linears) == (2 if recipe.model.name == "resnet50" else 3)
    assert norms[-1].weight is None
    last = moco.predictor[-1]
    assert isinstance(last, torch.nn.Linear) if recipe.model.name == "resnet50" else last.weight is None


@pytest.mark.parametrize(("patch_size", "convolutions"), [(16, 4), (8, 3), (4, 2)])
def test_conv_stem_halves_as_often_as_the_patch_size_asks(patch_size, convolutions):
    trunk = build_vit(image_size=32, patch_size=patch_size, dim=32, depth=1, heads=2, conv_stem=True).module
    found = [m for m in trunk.patch_embed.proj if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in found] == [32 >> (convolutions - n) for n in range(1, convolutions + 1)] + [32]
    assert trunk.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 32)
    assert trunk.pos_embed.shape[1] == 1 + (32 // patch_size) ** 2


def test_resnet_is_torchvisions():
    """The same function as torchvision's resnet50 in evaluation, under the same names."""
    from torchvision.models import resnet50

    theirs = resnet50(weights=None).eval()
    ours = build_resnet(**RESNET_SHAPES["resnet50"]).module.eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"fc.weight", "fc.bias"}
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESNET_SHAPES)
def test_every_resnet_of_a_name_is_torchvisions_and_may_be_trained(name):
    import torchvision

    recipe = load(ROOT / "recipes/resnet50_100ep.yaml", [f"model.name={name}"])
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
    found = {n: t.shape for n, t in make_moco(recipe).base.trunk.state_dict().items()}
    assert found == {n: t.shape for n, t in theirs.items() if not n.startswith("fc.")}
    assert of_shapes(found, None, None).name == of_name(name, 224, None).name == name


def test_chance_level_of_a_new_network():
    """A fresh network knows nothing: ten random images give about the loss of guessing, 4 T ln(G)."""
    from engine.training.loss import contrastive_loss

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, 256, generator=generator), torch.randn(64, 256, generator=generator)
    found = contrastive_loss(q, k, 0, temperature=0.2).loss.item()
    assert found == pytest.approx(2 * 0.2 * math.log(64), rel=0.05)


@pytest.mark.parametrize("kind", ["vit", "vit_conv", "resnet"])
def test_what_runs_before_the_blocks_runs_in_the_stem(kind):
    """So compiling stem and blocks leaves one small operation on the features outside."""
    with torch.device("meta"):
        shape = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 4, "conv_stem": kind == "vit_conv"}
        trunk = (build_resnet([1, 1, 1, 1], 8) if kind == "resnet" else build_vit(**shape)).module
        images = torch.empty(2, 3, 32, 32)
    assert isinstance(trunk, HasStem)
    within = {module for block in blocks(trunk) for module in block.modules()}
    called = []
    for module in trunk.modules():
        is_whole = not list(module.children()) or isinstance(module, PatchProjection)  # it calls no child
        if is_whole and module not in within:
            module.register_forward_hook(lambda module, *_: called.append(module))
    trunk.stem_forward(images)
    in_stem, called[:] = list(called), []
    trunk(images)
    assert in_stem
    assert called[: len(in_stem)] == in_stem
    assert called[len(in_stem) :] == [trunk.get_submodule("avgpool" if kind == "resnet" else "norm")]


@pytest.mark.parametrize("kind", ["vit_conv", "resnet"])
def test_channels_that_are_last_in_memory_stay_so_and_change_nothing(kind):
    shape = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 1, "heads": 4, "conv_stem": True}
    trunk = (build_resnet([1, 1, 1, 1], 8) if kind == "resnet" else build_vit(**shape)).module.double().train()
    generator = torch.Generator().manual_seed(0)
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    set_views(trunk, 2)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    last = images.to(memory_format=torch.channels_last)
    maps = trunk.stem_forward(last) if kind == "resnet" else trunk.patch_embed.proj(last)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(trunk(last), trunk(images), rtol=1e-9, atol=1e-9)


def test_a_gpu_has_its_channels_last():
    with FakeTensorMode():
        on_gpu, on_cpu = (as_convolutions_want(torch.empty(2, 3, 8, 8, device=device)) for device in ("cuda", "cpu"))
        assert on_gpu.is_contiguous(memory_format=torch.channels_last)
        assert on_cpu.is_contiguous()
