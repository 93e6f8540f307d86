"""Fine-tuning: the classifier is timm's, the step is plain AdamW, and what a run does and refuses."""

import math
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from engine.data.augment import flip_and_normalise
from engine.data.loader import train_batches
from engine.data.sources import open_source
from engine.distributed import process_group
from engine.encoders import open_encoder, open_weights
from engine.evaluation import finetune as finetuning
from engine.recipe import load
from engine.tasks import Finetune
from engine.weights.weights import fill_trunk
from models.classifier import ChosenDropPath, Classifier
from models.resnet import build_resnet
from models.trunk import build_trunk
from models.vit import build_vit
from tests.test_linear import CHECKPOINT, ROOT, VAL, rows

RECIPE = ROOT / "recipes/finetune_quickstart.yaml"
EVERYTHING = [  # every kind of regularization at once
    "model.drop_path=0.3",
    "train.ema_decay=0.9",
    "augment.randaugment=rand-m9-mstd0.5-inc1",
    "augment.erase_probability=0.5",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.repeats=3",
    "augment.interpolation=bicubic",
]


def small_recipe(directory: Path, *overrides: str) -> Finetune:
    """1,000 images of the quickstart in batches of 100, four steps."""
    values = [f"run.dir={directory}", f"data.root={VAL}", f"data.val_root={VAL}", "train.global_batch_size=100"]
    values += ["train.max_steps=4", "log.every_steps=1", "checkpoint.every_steps=2", "optimizer.base_lr=1e-3"]
    return load(RECIPE, [*values, "parallel.precision=float64", *overrides], Finetune)


def run(recipe: Finetune, checkpoint: str = CHECKPOINT, baseline: str | None = None) -> dict:
    with process_group() as world:
        return finetuning.finetune(recipe, checkpoint, "base", baseline, world)


# ---- the network -----------------------------------------------------------------------------------------------------


def test_the_classifier_is_timms():
    """Weights moved over by name, the same logits; and its branches are dropped as often as timm drops them."""
    shape = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 4, "heads": 3}
    ours = Classifier(build_vit(**shape), classes=7, drop_path=0.3)
    theirs = VisionTransformer(32, 8, embed_dim=24, depth=4, num_heads=3, num_classes=7, drop_path_rate=0.3)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    for parameter in ours.parameters():  # a ViT of ours is built without values
        nn.init.normal_(parameter, std=0.2)
    state = {name.removeprefix("trunk."): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    rates = [[block.drop_path1, block.drop_path2] for block in theirs.blocks]
    expected = [path.drop_prob for pair in rates for path in pair if not isinstance(path, nn.Identity)]
    assert [path.probability for path in ours.drop_paths] == pytest.approx(expected)
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_a_branch_is_dropped_for_the_samples_chosen_and_grows_for_the_others():
    path = ChosenDropPath(0.25)
    classifier = Classifier(build_vit(image_size=16, patch_size=8, dim=8, depth=2, heads=2), 3, 0.25)
    classifier.choose_paths(torch.tensor([[0.2, 0.9], [0.25, 0.1]], dtype=torch.float64))
    scales = torch.stack([path.scale_B for path in classifier.drop_paths])
    torch.testing.assert_close(scales, torch.tensor([[0, 4 / 3], [4 / 3, 0]]))
    path.scale_B = torch.tensor([0.0, 2.0])
    branch = torch.randn(2, 3, 4)
    assert not path(branch)[0].any() and torch.equal(path(branch)[1], 2 * branch[1])
    assert path.eval()(branch) is branch


def test_other_trunks_drop_paths_too_or_say_that_they_cannot():
    trunk = build_trunk("timm/convnext_atto", image_size=32, freeze_patch_projection=False)
    paths = Classifier(trunk, 3, 0.2).drop_paths
    assert len(paths) == 11 and paths[-1].probability == 0.2
    with pytest.raises(ValueError, match=r"model.drop_path \(0.2\) must be 0"):
        Classifier(build_resnet(), 3, 0.2)


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_against_plain_torch(tmp_path):
    """Loader's crops and flips; the rest is written anew: timm's ViT, groups, warm-up and cosine, AdamW, EMA."""
    options = ["optimizer.layer_decay=0.6", "train.ema_decay=0.9", "train.label_smoothing=0.1"]
    run(small_recipe(tmp_path, *options, "train.epochs=2", "train.warmup_epochs=0.2"))
    encoder, source = open_encoder(CHECKPOINT), open_source("shards", VAL, "all")
    network = VisionTransformer(64, 16, embed_dim=48, depth=2, num_heads=12, num_classes=10).double()
    start = dict(finetuning.first_values(*_fresh(), seed=0))
    network.load_state_dict({name.removeprefix("trunk."): tensor for name, tensor in start.items()})
    for norm in (module for module in network.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = 1e-6
    groups = param_groups_layer_decay(network, 0.05, ("cls_token", "pos_embed"), layer_decay=0.6)
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([0.6**3, 0.6**2, 0.6, 1])
    adamw, average = torch.optim.AdamW(groups, lr=0.0), [p.detach().clone() for p in network.parameters()]
    augment = flip_and_normalise(0.5, encoder.about.mean, encoder.about.std, seed=0, dtype=torch.float64)
    losses = []
    batches = train_batches(
        source,
        seed=0,
        global_batch_size=100,
        rank=0,
        world_size=1,
        first_step=0,
        last_step=4,
        workers=0,
        image_size=64,
        crop_min=0.5,
        pin_memory=False,
        views=1,
    )
    for step, batch in enumerate(batches):
        images = augment(batch.crops, batch.sample_B, batch.epoch)
        label_B = torch.from_numpy(source.labels)[batch.shown_B]
        loss = F.cross_entropy(network(images), label_B, label_smoothing=0.1)
        adamw.zero_grad()
        loss.backward()
        peak, epoch = 1e-3 * 100 / 512, step / 10
        cosine = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi * (epoch - 0.2) / 1.8))
        for group in adamw.param_groups:
            group["lr"] = group["lr_scale"] * (peak * epoch / 0.2 if epoch < 0.2 else cosine)
        adamw.step()
        for mean, parameter in zip(average, network.parameters(), strict=True):
            mean.mul_(0.9).add_(parameter.detach(), alpha=0.1)
        losses.append(loss.item())
    assert [row["loss"] for row in rows(tmp_path, "loss")] == pytest.approx(losses, rel=1e-6)
    network.head = nn.Identity()
    trunk = fill_trunk(open_weights(str(tmp_path)).trunk("base"))
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(trunk(images), network.float()(images), rtol=1e-3, atol=1e-3)


def _fresh() -> tuple[Classifier, object]:
    weights = open_weights(CHECKPOINT).trunk("base")
    return Classifier(weights.known().architecture.build(), 10), weights
