"""Memory is counted as it is kept, and the shipped recipes fit the GPUs that they name."""

import re
import weakref
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.benchmarks.step import Subject
from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from engine.torch_internals import keeping, watching
from engine.training.activation_checkpoint import KEPT_SHARE
from engine.training.memory import GIB, count_kept, memory_of, trunk_bytes
from models.norm import GlobalBatchNorm, set_views
from models.resnet import build_resnet
from models.trunk import blocks
from models.vit import build_vit
from tests.recipe.shipped import FILES, PRETRAIN

ROOT = Path(__file__).parents[2]
LARGE = [name for name in PRETRAIN if not name.startswith(("quickstart", "own_photos_small"))]
HEADER = re.compile(r"^# Fits (\d+) GPUs? of (\d+) GB: (\d+) GiB each, counted, not measured\.$", re.MULTILINE)


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_fits_the_gpus_that_it_names(name):
    gpus, card, said = map(int, HEADER.search(FILES[name].read_text()).groups())
    recipe = load(FILES[name], ["parallel.compile=true", "parallel.precision=bf16"])
    counted = memory_of(recipe, make_moco(recipe), gpus).gib
    assert abs(counted - said) < 1, counted
    assert counted < 0.9 * card * 1e9 / GIB


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
    assert found / 2 == pytest.approx(trunk_bytes(recipe, moco).kept(mode), rel=0.03)


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.micro_batch_size=2"], ["parallel.precision=float32"]],
    ids=["whole", "micro-batches", "float32"],
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


def most_alive(run: Callable[[], None], beside: Container[int]) -> int:
    """Bytes of the tensors that `run` makes, where most of them are alive; beside: addresses that do not count."""
    alive, sums = {}, [0]

    def see(_: object, results: object) -> None:
        for tensor in results if isinstance(results, list | tuple) else [results]:
            place = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
            if place and place not in alive and place not in beside:
                alive[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), alive.pop, place)
        sums.append(sum(alive.values()))

    with watching(see):
        run()
    return max(sums)


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
