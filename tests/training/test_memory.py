"""Memory is counted as it is kept."""

import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.benchmarks.step import Subject
from engine.data.loader import Batch
from engine.data.splits import open_labelled_splits
from engine.distributed.world import World
from engine.recipe.load import load
from engine.runs import finetune
from engine.runs.finetune import Finetuning, make_classifiers
from engine.runs.pretrain import make_moco
from engine.torch_internals import keeping
from engine.training.activation_checkpoint import KEPT_SHARE
from engine.training.memory import GIB, count_kept, memory_of, memory_of_finetuning, trunk_bytes
from models.architecture import vit as vit_of
from models.norm import GlobalBatchNorm, set_views
from models.resnet import build_resnet
from models.trunk import blocks
from models.vit import build_vit
from tests.alive import most_alive
from tests.recipe.shipped import FILES
from tests.runs.small import EVERYTHING, finetune_recipe, undrawn

ROOT = Path(__file__).parents[2]


def test_the_readme_says_what_is_counted_for_one_gpu():
    """ViT-B at the paper's batch: in micro-batches of 512 images and whole, by each activation checkpoint."""
    text = " ".join((ROOT / "engine/training/README.md").read_text().split())
    words = re.search(r"ViT-B at batch 4096 on one GPU of 80 GB: (.*?)\. ", text)[1]
    found = []
    for size in (512, "null"):
        for mode in KEPT_SHARE:
            values = [f"train.micro_batch_size={size}", f"parallel.activation_checkpoint={mode}"]
            recipe = load(FILES["vit_b"], values)
            found.append(round(memory_of(recipe, make_moco(recipe), 1).gib))
    assert re.findall(r"\b\d+(?= GiB|,| and|$)", words.replace("=512", "")) == [str(gib) for gib in found]
    assert max(found[:3]) < 0.9 * 80e9 / GIB


def vit(depth: int = 3) -> nn.Module:
    return build_vit(image_size=32, patch_size=8, dim=64, depth=depth, heads=4).module.train()


def resnet() -> nn.Module:
    module = build_resnet((1, 1, 1, 1), 64).module.train()
    set_views(module, 2)
    return module


def held(module: nn.Module, images: Tensor) -> int:
    """Bytes that a real forward keeps, beside its images, weights and buffers."""
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers(), images)}
    found: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        module(images)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)


@pytest.mark.parametrize("make", [vit, resnet])
def test_what_is_counted_without_data_is_what_is_kept(make):
    with torch.device("meta"):
        twins = [make() for _ in range(3)]
    two, four, six = (
        count_kept(twin, (n, 3, 32, 32), torch.float32)[0] for n, twin in zip((2, 4, 6), twins, strict=True)
    )
    assert two == held(make(), torch.ones(2, 3, 32, 32))
    assert six - four == four - two  # the rest is a few numbers for each channel


def test_numbers_for_each_channel_are_not_counted_for_each_crop():
    """Of images so small that a batch of two keeps as much of BatchNorm's numbers as of activations."""
    with torch.device("meta"):
        twin = resnet()
    four, eight = (held(resnet(), torch.ones(n, 3, 32, 32)) for n in (4, 8))
    parallel = load(FILES["resnet50_100ep"], ["parallel.precision=float32", "parallel.compile=false"]).parallel
    assert trunk_bytes(twin, 32, parallel).kept("none") == pytest.approx((eight - four) / 4, rel=0.02)


@pytest.mark.parametrize("mode", KEPT_SHARE)
def test_compiled_blocks_keep_what_is_counted(mode):
    """Of a ViT: a whole block, by each checkpoint."""
    with torch.device("meta"):
        twin = vit().bfloat16()
    (_, counted), *_ = count_kept(twin, (2, 3, 32, 32), torch.bfloat16)[1]
    block = blocks(vit().bfloat16())[0]
    block.forward = torch.compile(
        block.forward, fullgraph=True, dynamic=False, backend=keeping(KEPT_SHARE[mode], "aot_eager_decomp_partition")
    )
    tokens = torch.ones(2, 17, 64, dtype=torch.bfloat16, requires_grad=True)
    added = 0 if counted.full == 0 else tokens.nbytes  # `held` leaves the input out
    assert held(block, tokens) + added == pytest.approx(getattr(counted, mode), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_with_batch_norm_keep_what_is_counted(mode):
    recipe = load(FILES["resnet50_100ep"])
    with torch.device("meta"):
        moco = make_moco(recipe)
    module = build_resnet((3, 4, 6, 3), 64).module.train()
    set_views(module, 2)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
        assert not isinstance(part, GlobalBatchNorm) or part.running_mean.dtype == torch.float32
    with torch._dynamo.config.patch(recompile_limit=64):
        for block in blocks(module):
            backend = keeping(KEPT_SHARE[mode], "aot_eager_decomp_partition")
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        found = held(module, torch.ones(2, 3, 224, 224, dtype=torch.bfloat16))
    assert found / 2 == pytest.approx(trunk_bytes(moco.base.trunk, 224, recipe.parallel).kept(mode), rel=0.03)


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.micro_batch_size=2"], ["parallel.precision=float32"], ["parallel.precision=float64"]],
    ids=["whole", "micro-batches", "float32", "float64"],
)
def test_a_rank_that_is_alone_takes_what_is_counted(world, overrides):
    """Of a step whose weights take far more than its images."""
    small = ["train.global_batch_size=4", "model.depth=2", "parallel.compile=false", "parallel.precision=bf16"]
    recipe = load(FILES["quickstart"], [*small, "model.dim=192", "model.heads=3", "data.root=none", *overrides])
    subject = Subject(recipe, world, 2)
    subject.run(1)  # until then nothing has been planned or kept
    own = {t.data_ptr(): t.nbytes for t in (*subject.state.tensors().values(), subject.crops_VBCSS)}
    taken = sum(own.values()) + most_alive(partial(subject.run, 1), own)
    counted = memory_of(recipe, make_moco(recipe), 1).gib * GIB
    assert 0.9 * counted < taken < counted


@pytest.mark.parametrize("precision", ["bf16", "float32", "float64"])
@pytest.mark.parametrize(("batch", "dim", "depth"), [(4, 256, 2), (128, 64, 12)], ids=["weights", "images"])
def test_a_rank_that_fine_tunes_alone_takes_what_is_counted(world, tmp_path, precision, batch, dim, depth):
    """Of two steps: one whose weights take most, and one whose images do."""
    values = [f"train.global_batch_size={batch}", f"parallel.precision={precision}", "optimizer.min_lr=0"]
    recipe = finetune_recipe(tmp_path, *EVERYTHING, *values)
    splits = open_labelled_splits(recipe.data, world, seed=0, batch=batch)
    weights, classes = undrawn(vit_of(32, 8, dim, depth, 4, conv_stem=False), 32), len(splits.train.classes)
    task = Finetuning(recipe, world, splits, weights, *make_classifiers(recipe, weights, classes))
    task.start(resumes=False)
    sample_B = torch.arange(batch)
    step = Batch(0, 0, torch.zeros(1, batch, 3, 32, 32, dtype=torch.uint8), sample_B, sample_B, [])
    task.train_step(step)
    own = {t.data_ptr(): t.nbytes for t in (*task.tensors().values(), step.crops)}
    taken = sum(own.values()) + most_alive(partial(task.train_step, step), own)
    counted = memory_of_finetuning(recipe, *make_classifiers(recipe, weights, classes), 32, 1).gib * GIB
    assert 0.9 * counted < taken < counted


def test_images_that_were_mixed_are_gone_when_the_network_goes_forward(world, tmp_path, monkeypatch):
    """Those of the rank at the other end too: of all that came, the mixed ones alone are there."""
    recipe = finetune_recipe(tmp_path, "augment.mixup=0.8")
    splits = open_labelled_splits(recipe.data, world, seed=0, batch=100)
    weights = undrawn(vit_of(32, 8, 64, 2, 4, conv_stem=False), 32)
    task = Finetuning(recipe, world, splits, weights, *make_classifiers(recipe, weights, len(splits.train.classes)))
    task.trained, came, there = None, [], []

    def exchanged(images: Tensor, labels: Tensor, world: World) -> tuple[Tensor, Tensor]:
        theirs = images.flip(0)
        came.extend(weakref.ref(tensor.untyped_storage()) for tensor in (images, theirs))
        return theirs, labels.flip(0)

    monkeypatch.setattr(finetune, "exchanged", exchanged)
    monkeypatch.setattr(finetune, "finetune_step", lambda *_: there.extend(ref() is not None for ref in came))
    sample_B = torch.arange(4)
    task.train_step(Batch(0, 0, torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8), sample_B, sample_B, []))
    assert there == [False, False]


def test_what_saves_memory_is_counted_so():
    def counted(*overrides: str, gpus: int = 8) -> float:
        recipe = load(FILES["vit_s_1024"], overrides)
        return memory_of(recipe, make_moco(recipe), gpus).gib

    by_mode = [counted(f"parallel.activation_checkpoint={mode}") for mode in ("none", "selective", "full")]
    assert by_mode == sorted(by_mode, reverse=True)
    assert counted() < 0.6 * counted(gpus=4)
    assert counted("train.micro_batch_size=32") < 0.5 * counted()
    assert counted("parallel.precision=float32") > 1.5 * counted()
    assert counted("parallel.shard=full") < counted("parallel.shard=replicate")
