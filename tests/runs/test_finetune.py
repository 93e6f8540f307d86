"""Fine-tuning: the step is plain AdamW, and what a run does and refuses."""

import dataclasses
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

import engine
from engine import evaluate
from engine.checkpoint.layout import read_pointer
from engine.checkpoint.load import read_tensors
from engine.data.augment import Flip
from engine.data.decode import CenterCrop, Crops
from engine.data.loader import train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.source import Root
from engine.data.workers import Workers
from engine.distributed.world import process_group
from engine.errors import RunFailed, UserError
from engine.recipe.load import load
from engine.recipe.sections import Finetune, Linear
from engine.runs import finetune as finetuning
from engine.runs.linear import linear
from engine.weights.card import model_card
from engine.weights.export import export_classifier
from engine.weights.opening import open_trunk, open_weights
from engine.weights.weights import Head, fill_trunk
from models.architecture import resnet
from models.classifier import Classifier
from tests.runs.reading import unread_keys
from tests.runs.small import CHECKPOINT, EVERYTHING, FEW, ROOT, VAL, finetune_recipe, rows, run_finetune, undrawn

# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_against_plain_torch(tmp_path):
    """Loader's crops and flips; the rest is written anew: timm's ViT, groups, warm-up and cosine, AdamW, EMA."""
    options = ["optimizer.layer_decay=0.6", "train.ema_decay=0.9", "train.label_smoothing=0.1"]
    run_finetune(finetune_recipe(tmp_path, *options, "train.epochs=2", "train.warmup_epochs=0.2"))
    source = open_source(Root("shards", VAL), "all")
    network = VisionTransformer(64, 16, embed_dim=48, depth=2, num_heads=12, num_classes=10).double()
    weights = open_weights(CHECKPOINT).trunk("base")
    about = weights.known()
    fresh = Classifier(about.architecture.build(), 10)
    start = dict(fresh.initial_values(finetuning.trunk_values(weights), seed=0))
    network.load_state_dict({name.removeprefix("trunk."): tensor for name, tensor in start.items()})
    for norm in (module for module in network.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = 1e-6
    groups = param_groups_layer_decay(network, 0.05, ("cls_token", "pos_embed"), layer_decay=0.6)
    assert sorted({group["lr_scale"] for group in groups}) == pytest.approx([0.6**3, 0.6**2, 0.6, 1])
    adamw, average = torch.optim.AdamW(groups, lr=0.0), [p.detach().clone() for p in network.parameters()]
    augment = Flip(0.5, about.mean, about.std, seed=0, dtype=torch.float64)
    losses, rates = [], []
    order, crops = Order(0, len(source), 100), Crops(64, 0.5, views=1)
    batches = train_batches(source, order, crops, range(4), rank=0, world_size=1, workers=Workers(()))
    for step, batch in enumerate(batches):
        images = augment(batch.crops, batch.sample_B, batch.epoch)
        label_B = torch.from_numpy(source.labels[batch.shown_B.numpy()])
        loss = F.cross_entropy(network(images), label_B, label_smoothing=0.1)
        adamw.zero_grad()
        loss.backward()
        peak, epoch = 1e-3 * 100 / 512, step / 10
        cosine = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi * (epoch - 0.2) / 1.8))
        rates.append(peak * epoch / 0.2 if epoch < 0.2 else cosine)
        for group in adamw.param_groups:
            group["lr"] = group["lr_scale"] * rates[-1]
        adamw.step()
        for mean, parameter in zip(average, network.parameters(), strict=True):
            mean.mul_(0.9).add_(parameter.detach(), alpha=0.1)
        losses.append(loss.item())
    assert [row["loss"] for row in rows(tmp_path, "loss")] == pytest.approx(losses, rel=1e-6)
    assert [row["lr"] for row in rows(tmp_path, "loss")] == pytest.approx(rates, rel=1e-12)
    ema = dict(read_tensors(tmp_path / "checkpoints/step_0000004"))
    for (name, _), mean in zip(network.named_parameters(), average, strict=True):
        place = name if name.startswith("head.") else f"trunk.{name}"
        torch.testing.assert_close(ema[f"ema.{place}"], mean, rtol=1e-4, atol=1e-4)
    network.head = nn.Identity()
    trunk = fill_trunk(open_weights(str(tmp_path)).trunk("base"))
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(trunk(images), network.float()(images), rtol=1e-3, atol=1e-3)


# 300 images, of which an epoch has four batches.
SEVENTY_FIVE = [*EVERYTHING, "data.labels=0.3", "train.global_batch_size=75", f"data.val_root={VAL}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """All that a run can do at once, over the end of an epoch."""
    directory = tmp_path_factory.mktemp("finetune")
    return directory, run_finetune(finetune_recipe(directory, *SEVENTY_FIVE, "train.max_steps=6"))


def test_the_result_is_the_last_evaluations_and_files_are_there(finished):
    directory, result = finished
    found = rows(directory, "finetune_top1")
    assert [row["step"] for row in found] == [6]
    assert found[0]["epoch"] == 1.5
    assert result == {
        "top1": found[0]["finetune_top1"],
        "top5": found[0]["finetune_top5"],
        "ema_top1": found[0]["ema_top1"],
        "ema_top5": found[0]["ema_top5"],
    }
    assert result["top1"] != result["ema_top1"]
    assert 0 < result["top1"] <= result["top5"] <= 1
    assert len((directory / "classes.csv").read_text().splitlines()) == 11
    assert (directory / "confusion.png").exists()
    assert read_pointer(directory / "checkpoints", "best") == "step_0000006"


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path):
    run_finetune(finetune_recipe(tmp_path, *SEVENTY_FIVE, "train.max_steps=3"))
    assert run_finetune(finetune_recipe(tmp_path, *SEVENTY_FIVE, "train.max_steps=6")) == finished[1]
    ours, theirs = (rows(directory, "loss") for directory in (tmp_path, finished[0]))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert len(ours) == 6
    assert [row["lr"] for row in ours] == [row["lr"] for row in theirs]


@pytest.mark.slow
def test_compiled_is_eager(tmp_path):
    """In bf16 too it runs; in float32 it is the eager run but for rounding, and each network compiles a few graphs."""
    options = [*EVERYTHING, "train.global_batch_size=250", "parallel.precision=float32"]
    run_finetune(finetune_recipe(tmp_path / "eager", *options))
    run_finetune(finetune_recipe(tmp_path / "compiled", *options, "parallel.compile=true"))
    run_finetune(finetune_recipe(tmp_path / "bf16", *options, "parallel.compile=true", "parallel.precision=bf16"))
    eager, compiled, bf16 = (
        [row["loss"] for row in rows(tmp_path / name, "loss")] for name in ("eager", "compiled", "bf16")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert bf16 == pytest.approx(eager, rel=2e-2)
    assert len(eager) == 4


def test_a_finetuned_run_is_a_checkpoint_for_every_front_door(finished, capsys):
    """Its trunk is opened from the shards, and is not the one that it began with."""
    run, about = str(finished[0]), open_weights(str(finished[0])).known()
    assert about.licence == "CC-BY-NC-4.0"
    assert about.image_size == 64
    assert "task: finetune" in about.finetuned
    opened = [open_trunk(run), open_trunk(run, "momentum"), open_trunk(CHECKPOINT)]
    assert "fine-tuned on labels" in model_card(opened[0], "timm", "base", Path("out"), "")
    images = torch.rand(2, 3, 64, 64)
    features = [fill_trunk(weights)(images) for weights in opened]
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in itertools.combinations(features, 2))
    evaluate.main(["rankme", str(finished[0]), "--data", str(FEW), "--workers", "0"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rankme"] > 1


@pytest.mark.parametrize(("folder", "key"), [("timm", "top1"), ("timm_ema", "ema_top1")])
def test_timm_makes_the_finetuned_network_from_the_runs_folder(finished, folder, key):
    """Its top-1 on the validation images, normalised as its config says, is the run's."""
    directory, result = finished
    network = timm.create_model(f"local-dir:{directory / folder}", pretrained=True).eval()
    config, source = network.pretrained_cfg, open_source(Root("shards", VAL), "all")
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 1)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    crop = CenterCrop(64, config["crop_pct"], config["interpolation"])
    crops = [crop(source.read(i)) for i in range(len(source))]
    with torch.no_grad():
        prediction = network((torch.stack(crops) / 255 - mean) / std).argmax(1)
    found = (prediction == torch.from_numpy(source.labels)).float().mean().item()
    assert found == pytest.approx(result[key], abs=0.002)
    assert json.loads((directory / folder / "config.json").read_text())["label_names"] == list(source.classes)
    image = torch.randn(1, 3, 64, 64)
    encoder = {"timm": "base", "timm_ema": "momentum"}[folder]
    torch.testing.assert_close(engine.load(directory / folder)(image), engine.load(directory, encoder)(image))


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_mambaout"])
def test_timms_own_networks_too(tmp_path, name):
    weights = open_trunk(f"timm/{name}", untrained=True)
    width = weights.known().architecture.build().width
    head = Head(torch.randn(4, width), torch.randn(4), tuple("abcd"), "bicubic", 0.9)
    export_classifier(weights, head, tmp_path / "out")
    for classes in (4, 10, 0):
        adapted = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=classes)
        assert adapted.num_classes == classes
    assert open_weights(str(tmp_path / "out")).shapes == weights.shapes


def test_each_key_of_the_recipe_is_read(tmp_path):
    assert not unread_keys(finetune_recipe(tmp_path, *EVERYTHING, "train.max_steps=1"), run_finetune)


def test_bad_gradients_change_nothing_and_many_end_the_run(tmp_path, monkeypatch):
    """From step 2 on every loss is nan: the weights stay, and the tenth in a row is a failure."""
    plain = finetuning.finetune_step

    def poisoned(state, images, target_BC, uniform_BK):
        if state.update.step < 2:
            return plain(state, images, target_BC, uniform_BK)
        before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        output = plain(state, images * float("nan"), target_BC, uniform_BK)
        changed = {n for n, t in state.tensors().items() if not torch.equal(t, before[n])}
        assert {name for name in changed if not name.startswith("ema.")} == {"skipped", "skipped_in_a_row"}
        return output

    monkeypatch.setattr(finetuning, "finetune_step", poisoned)
    recipe = finetune_recipe(tmp_path, "train.max_steps=15", "train.ema_decay=0.5", "checkpoint.every_steps=50")
    with pytest.raises(RunFailed, match="the last 10 steps up to 12 had gradients that are not finite"):
        run_finetune(recipe)
    assert len(rows(tmp_path, "loss")) == 11


def test_a_share_of_the_labels_and_the_untrained_network(tmp_path):
    few = finetune_recipe(tmp_path / "a", "data.labels=0.1", "train.max_steps=1")
    run_finetune(few)
    other = dataclasses.replace(few, run=dataclasses.replace(few.run, dir=str(tmp_path / "b")))
    run_finetune(other, baseline="initial")
    assert rows(tmp_path / "a", "loss")[0]["epoch"] == 1  # a hundred images are one batch
    assert rows(tmp_path / "a", "loss")[0]["loss"] != rows(tmp_path / "b", "loss")[0]["loss"]
    with pytest.raises(
        UserError, match=r"train.global_batch_size \(100\) must be at most the number of images \(10 in"
    ):
        run_finetune(finetune_recipe(tmp_path / "c", "data.labels=0.01"))
    assert not (tmp_path / "c").exists()


# ---- transfer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory) -> Path:
    """A data set in CIFAR-10's files: ten images in each training batch, twenty to test."""
    root, rng = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, count in {**{f"data_batch_{i}": 10 for i in range(1, 6)}, "test_batch": 20}.items():
        labels = [i % 10 for i in range(count)]
        data = (rng.integers(0, 100, (count, 3072)) + 15 * np.array(labels)[:, None]).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets"])
def test_the_transfer_recipes_train_on_files_of_cifar_10(cifar10, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)  # it knows the checksums of the real files alone
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    arguments = ["finetune", CHECKPOINT, "--recipe", str(ROOT / f"recipes/transfer_{name}.yaml")]
    if name != "cifar10":  # whose recipe says itself what the files are
        arguments += ["--dataset", "CIFAR10", "data.dataset_options={}"]
    arguments += ["--train", str(cifar10), "--val", str(cifar10), "--out", str(tmp_path / "run"), "--workers", "0"]
    evaluate.main([*arguments, "train.global_batch_size=20", "train.max_steps=5", "parallel.compile=false"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"top1", "top5"}
    (row,) = (row for row in rows(tmp_path / "run", "loss") if row["step"] == 5)
    assert row["epoch"] == 2.5
    assert math.isfinite(row["loss"])
    assert row["lr"] == pytest.approx(3e-4 * 20 / 512 * 2 / 3)


def test_recipes_say_what_the_paper_says():
    table = {  # weight decay, random erasing, drop path, mixup, cutmix
        "cifar10": (0.1, 0, 0.1, 0.8, 1),
        "cifar100": (0.1, 0, 0.1, 0.5, 1),
        "flowers102": (0.3, 0.25, 0.1, 0, 0),
        "pets": (0.1, 0, 0, 0.8, 0),
    }
    for name, values in table.items():
        recipe = load(ROOT / f"recipes/transfer_{name}.yaml", kind=Finetune)
        augment, train = recipe.augment, recipe.train
        found = recipe.optimizer.weight_decay, augment.erase_probability, recipe.model.drop_path
        assert (*found, augment.mixup, augment.cutmix) == values
        assert (recipe.optimizer.base_lr, train.epochs, train.warmup_epochs, augment.crop_min) == (3e-4, 100, 3, 0.05)
        assert (augment.randaugment, augment.repeats, recipe.evaluate.crop_fraction) == (None, 1, 224 / 256)
    epochs = {name: load(ROOT / f"recipes/finetune_vit_{name}.yaml", kind=Finetune).train.epochs for name in "bl"}
    assert epochs == {"b": 150, "l": 100}
    assert load(ROOT / "recipes/finetune_vit_l.yaml", kind=Finetune).model.drop_path == 0.5


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.drop_path=1", r"model.drop_path \(1\) must be a finite number >= 0 and < 1"),
        ("augment.randaugment=strong", r"augment.randaugment \(strong\) must be printable text in timm's words"),
        ("augment.repeats=0", r"augment.repeats \(0\) must be an integer from 1 to 100"),
        ("augment.interpolation=nearest", "must be one of bilinear, bicubic"),
        ("data.labels=0", r"data.labels \(0\) must be a finite number > 0 and <= 1"),
        ("train.warmup_epochs=101", r"train.warmup_epochs \(101.0\) must be at most train.epochs \(100\)"),
        ("parallel.replicate=2", r"parallel.replicate \(2\) must be 1 under parallel.shard full"),
        ("model.name=vit_small", "model.name is no key of the recipe"),
        ("optimizer.min_lr=1", r"optimizer.min_lr \(1.0\) must be at most the peak lr, .* \(0.00019531"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        finetune_recipe(tmp_path, override)


def test_a_resume_refuses_what_differs(finished):
    options = [*SEVENTY_FIVE, "train.max_steps=6"]
    with pytest.raises(UserError, match=r"augment.mixup \(0.8 -> 0.2\)"):
        run_finetune(finetune_recipe(finished[0], *options, "augment.mixup=0.2"))
    with pytest.raises(UserError, match="holds a run on another network"):
        run_finetune(finetune_recipe(finished[0], *options), baseline="initial")


def test_what_timm_cannot_do_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"augment.randaugment \(rand-tweights-n20\) must be what timm can do \(Cannot"):
        run_finetune(finetune_recipe(tmp_path, "augment.randaugment=rand-tweights-n20"))
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_tasks_are_told_apart(finished, tmp_path):
    """Where they are looked for as a run to go on with, and as a CHECKPOINT."""
    data = ["data.workers=0", f"data.root={VAL}", f"data.val_root={FEW}", "data.source=shards", "train.max_steps=1"]
    recipe = load(
        ROOT / "recipes/linear_vit.yaml", [f"run.dir={tmp_path}", "train.global_batch_size=500", *data], Linear
    )
    with process_group() as world:
        linear(recipe, CHECKPOINT, "base", world)
        wrong_place = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, dir=str(finished[0])))
        with pytest.raises(UserError, match="holds a run of task finetune, not linear; pass another"):
            linear(wrong_place, CHECKPOINT, "base", world)
    with pytest.raises(UserError, match="holds a run of task linear, not finetune; pass another"):
        run_finetune(finetune_recipe(tmp_path))
    with pytest.raises(UserError, match="a run of task linear has a classifier alone; pass the CHECKPOINT that it was"):
        open_weights(str(tmp_path))


def test_a_diverged_run_says_how_to_start_anew(tmp_path):
    with pytest.raises(RunFailed, match=r"weights have diverged; start anew with a lower optimizer.base_lr"):
        run_finetune(
            finetune_recipe(tmp_path, "optimizer.base_lr=1e30", "train.warmup_epochs=0", "parallel.precision=float32")
        )


def test_a_network_without_branches_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "open_trunk", lambda *_, **__: undrawn(resnet([1, 1, 1, 1], 64), 32))
    with pytest.raises(UserError, match=r"model.drop_path \(0.1\) must be 0 for this trunk"):
        run_finetune(finetune_recipe(tmp_path, "model.drop_path=0.1"))
    assert list(tmp_path.iterdir()) == []
