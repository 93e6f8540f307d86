"""timm's networks as trunks: the same functions, trained for a step or refused in one line."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.world import process_group
from engine.errors import UserError
from engine.files import read_rows
from engine.recipe.load import load
from engine.runs.pretrain import make_moco, pretrain
from models.architecture import of_name
from models.dry_step import why_untrainable
from models.moco import MoCo
from models.norm import replace_batch_norm
from models.shapes import TIMM, WELL_KNOWN
from models.timm_trunk import build_timm
from models.trunk import blocks

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_any_timm_model_is_a_trunk(name):
    """Global BatchNorm takes the place of timm's, names and function in evaluation stay, initial values are timm's."""
    build = partial(build_timm, name, image_size=64)
    with torch.device("meta"):
        moco = MoCo(build, 32, 16)
    moco.to_empty(device="cpu")
    tensors = {**dict(moco.named_parameters()), **dict(moco.named_buffers())}
    values = dict(moco.initial_values(seed=2))
    assert values.keys() == tensors.keys()
    for tensor_name, value in values.items():
        tensors[tensor_name].data.copy_(value)
    moco.eval()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in moco.modules())
    size = {"img_size": 64} if "vit" in name else {}
    theirs = timm.create_model(name, num_classes=0, **size).eval()
    theirs.load_state_dict(moco.base.trunk.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(moco.base.trunk(x), theirs(x), rtol=1e-4, atol=1e-5)
    layers = [m for m in moco.base.projector if isinstance(m, torch.nn.Linear)]
    assert len(layers) == (3 if name == "test_vit" else 2)
    assert blocks(moco.base.trunk)


def test_no_random_numbers_are_drawn_for_a_network_without_memory():
    """Its tensors are those of a network with memory, which is filled."""
    for device, is_filled in (("meta", False), ("cpu", True)):
        with torch.device(device), Operations() as seen:
            module = build_timm("test_vit", image_size=64).module
        assert ("uniform_" in seen.names) == is_filled
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        assert shapes == {
            n: t.shape for n, t in timm.create_model("test_vit", num_classes=0, img_size=64).state_dict().items()
        }


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_width_of_a_timm_trunk_is_that_of_its_output():
    """timm's `num_features` leaves out a last layer that some networks have."""
    with torch.device("meta"):
        trunk = build_timm("mobilenetv3_small_050", image_size=64)
        assert trunk.width == trunk.module(torch.empty(2, 3, 64, 64)).shape[1] == 1024


def test_impossible_trunks_say_why():
    with pytest.raises(ValueError, match=r"model.name \(timm/resnet18.no_such_tag\) must be a timm model: Invalid"):
        build_timm("resnet18.no_such_tag", image_size=64)
    with pytest.raises(ValueError, match=r"model.name \(timm/no_such_net\) must be a timm model"):
        build_timm("no_such_net", image_size=64)
    with pytest.raises(ValueError, match=r"freeze_patch_projection \(true\) must be false"):
        of_name("timm/test_convnext", 64, None).build(freeze_patch_projection=True)


# ---- a step, or one line ---------------------------------------------------------------------------------------------

SMALL = ("test_byobnet", "test_nfnet", "test_vit4", "test_mambaout")
LARGE = {
    **dict.fromkeys(("deit_tiny_distilled_patch16_224", "levit_128s", "volo_d1_224", "eva02_tiny_patch14_224"), 224),
    **dict.fromkeys(("beit_base_patch16_224", "swin_tiny_patch4_window7_224", "coat_lite_tiny", "pit_ti_224"), 224),
    **dict.fromkeys(("convit_tiny", "ghostnet_050", "vit_tiny_r_s16_p8_224", "caformer_s18", "inception_v3"), 224),
}


def recipe(name: str, size: int, *overrides: str):
    model = [f"model.name=timm/{name}", f"model.image_size={size}", "model.freeze_patch_projection=false"]
    model += [f"model.{key}=null" for key in ("patch_size", "dim", "depth", "heads")]
    short = ["train.max_steps=2", "train.global_batch_size=8", "data.workers=0", "evaluate.knn_every_epochs=0"]
    return load(QUICKSTART, [*model, *short, "evaluate.online_probe=false", *overrides])


def check_trains(folder: Path, name: str, size: int, precision: str) -> None:
    run = recipe(name, size, f"run.dir={folder}/run", f"parallel.precision={precision}")
    with process_group() as world:
        pretrain(run, QUICKSTART, world)
    rows = list(read_rows(folder / "run/metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["skipped_steps"] == 0 for row in rows)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_train(tmp_path, name):
    check_trains(tmp_path, name, 64, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("name", LARGE)
def test_networks_of_every_kind_train(tmp_path, name, precision):
    check_trains(tmp_path, name, LARGE[name], precision)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"])
def test_constants_of_a_network_take_the_type_of_its_step(name):
    of_name(f"timm/{name}", 224, None).check_step(bf16=True)


@pytest.mark.parametrize(
    ("name", "precision", "words"),
    [
        ("bat_resnext26ts", "float32", r"model.name \(timm/bat_resnext26ts\) must .*it draws random numbers of a"),
        ("csatv2", "bf16", r"parallel.precision \(bf16\) must be float32 for .*: its step fails \(bmm of bfl"),
        ("deepseek_vit_412m_enc", "float32", r"must give one row of features for an image; 2 images give \[2, 169, 51"),
    ],
)
def test_a_network_that_does_not_train_is_refused_before_the_run(name, precision, words):
    size = timm.get_pretrained_cfg(name).input_size[-1]
    with pytest.raises(UserError, match=words) as error:
        make_moco(recipe(name, size, f"parallel.precision={precision}"))
    assert "\n" not in str(error.value)


class Odd(nn.Module):
    """A trunk with one fault."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 4)
        self.register_buffer("scale", torch.ones(4))
        if kind == "unused":
            self.spare = nn.Linear(2, 2)
        if kind == "passed by":
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        if kind == "hidden":
            self.weights = [self.linear.weight]

    def forward(self, images: Tensor) -> Tensor:
        x = self.linear(images.mean((2, 3)))
        if self.kind == "statistic":
            self.scale.copy_(x.detach().std(0))
        if self.kind == "passed by":
            x = self.blocks[1](self.blocks[0][0](x))
        if self.kind == "dropout":
            x = nn.functional.dropout(x, 0.1, self.training)
        return nn.functional.linear(x, torch.eye(4, dtype=torch.float32, device=x.device)) if self.kind == "type" else x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", None),
        ("unused", "parameters take no part in its features: spare.weight, spare.bias"),
        ("hidden", "it keeps tensors that are neither parameters nor buffers: weights"),
        ("passed by", "its forward passes by 1 of its blocks"),
        ("statistic", "it keeps statistics of a rank's own batch: scale"),
        ("dropout", "it draws random numbers of a rank's own: bernoulli_"),
        ("type", "its step fails (mm of bfloat16 and float32)"),
    ],
)
def test_faults_show_on_the_meta_device(kind, words):
    with torch.device("meta"):
        found = why_untrainable(Odd(kind), 8, torch.bfloat16)
    assert found is None if words is None else found and re.match(re.escape(words), found), found


def test_blocks_that_share_a_part_are_no_units():
    """FSDP would give the part to the first of them, and the others would run without it."""
    shared = nn.Linear(4, 4)
    assert not blocks(nn.ModuleList(nn.Sequential(nn.Linear(4, 4), shared) for _ in range(2)))
    assert len(blocks(nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))) == 2


def test_a_batch_norm_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"its BatchNorm \(SyncBatchNorm\) must be torch's or timm's"):
        replace_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)))


def test_names_that_are_suggested_are_timm_s_and_half_a_name_finds_its_network():
    assert all(timm.is_model(name.removeprefix(TIMM)) for name in WELL_KNOWN)
    for name, nearest in {"vit_tiny": "vit_tiny_patch16_224", "vit_tini_patch16_224": "vit_tiny_patch16_224"}.items():
        with pytest.raises(ValueError, match=rf"must be a timm model; did you mean timm/{nearest}\?"):
            build_timm(name, 224)
