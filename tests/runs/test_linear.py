"""The paper's linear protocol, as a run."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from engine.data.decode import Crops
from engine.data.loader import train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.philox import AUGMENT, uniform
from engine.data.source import Root
from engine.data.workers import Workers
from engine.distributed.world import process_group
from engine.errors import RunFailed, UserError
from engine.evaluation.linear import LinearClassifier
from engine.evaluation.subject import open_subject
from engine.recipe.load import load
from engine.recipe.sections import Linear
from engine.runs import linear as linear_module
from engine.runs.linear import LinearClassification, linear
from tests.runs.reading import unread_keys
from tests.runs.small import CHECKPOINT, ROOT, VAL, linear_recipe, rows, run_linear


def test_recipes_say_what_the_paper_says():
    for name, lr in (("linear_vit", 3.0), ("linear_resnet50", 0.1)):
        recipe = load(ROOT / f"recipes/{name}.yaml", kind=Linear)
        assert (recipe.optimizer.base_lr, recipe.train.global_batch_size, recipe.train.epochs) == (lr, 1024, 90)
        assert (recipe.augment.crop_min, recipe.augment.flip_probability) == (0.08, 0.5)
        assert recipe.evaluate.crop_fraction == 224 / 256
        assert recipe.train.max_steps is None


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("linear")
    return directory, run_linear(linear_recipe(directory))


def test_protocol_against_plain_torch(finished):
    """Loader's crops; the rest is written anew: flip, mean and std, Linear, SGD, one cosine step per epoch."""
    recipe, source = linear_recipe(finished[0]), open_source(Root("shards", VAL), "all")
    subject = open_subject(CHECKPOINT, "cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (subject.mean, subject.std))
    classifier = nn.Linear(subject.width("cpu"), 10)
    start = LinearClassifier(subject.width("cpu"), 10, peak_lr=1, epochs=1, steps_per_epoch=1, seed=0)
    with torch.no_grad():
        classifier.weight.copy_(start.weight_CD)
        classifier.bias.zero_()
    sgd = torch.optim.SGD(classifier.parameters(), lr=0.5 * 300 / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=2)
    order = Order(0, len(source), 300, keep_partial=True)
    crops = Crops(subject.image_size, recipe.augment.crop_min, views=1)
    losses, sizes = [], []
    for batch in train_batches(source, order, crops, range(8), rank=0, world_size=1, workers=Workers(())):
        flip_B = uniform(0, batch.epoch, batch.sample_B, 0, AUGMENT, 14)[:, 13] < 0.5
        images = torch.where(flip_B[:, None, None, None], batch.crops[0].flip(-1), batch.crops[0])
        with torch.no_grad():
            features = subject.network((images / 255 - mean) / std)
        loss = nn.functional.cross_entropy(classifier(features), torch.from_numpy(source.labels)[batch.sample_B])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
        sizes.append(len(images))
        if len(losses) % 4 == 0:
            schedule.step()
    assert sizes == [300, 300, 300, 100] * 2
    assert [row["loss"] for row in rows(finished[0], "loss")] == pytest.approx(losses, rel=1e-5)


def test_the_result_is_the_best_epochs(finished):
    directory, result = finished
    found = rows(directory, "linear_top1")
    assert [row["epoch"] for row in found] == [1, 2]
    best = max(found, key=lambda row: row["linear_top1"])
    assert result == {"top1": best["linear_top1"], "top5": best["linear_top5"], "learning_rate": 0.5 * 300 / 256}
    assert 0.1 < result["top1"] < result["top5"] < 1
    table = (directory / "classes.csv").read_text().splitlines()
    assert table[0] == "class,images,top1"
    assert len(table) == 11
    images, shares = zip(*(map(float, row.split(",")[1:]) for row in table[1:]), strict=True)
    right = sum(count * share for count, share in zip(images, shares, strict=True))
    assert right / sum(images) == pytest.approx(result["top1"], abs=1e-6)
    assert (directory / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert run_linear(linear_recipe(directory)) == result  # a finished run says it again


def test_an_early_end_inside_an_epoch_is_no_epoch():
    rows = [{"epoch": 0.5, "linear_top1": 0.9}, {"epoch": 1.0, "linear_top1": 0.3}, {"epoch": 2.0, "linear_top1": 0.3}]
    reported = LinearClassification.reported
    assert reported(None, rows) is rows[1]
    assert reported(None, rows[:1]) is rows[0]


def test_every_key_of_the_recipe_is_read(tmp_path):
    assert not unread_keys(linear_recipe(tmp_path, "train.max_steps=1"), run_linear)


def test_an_unreadable_image_is_shown_with_the_label_of_the_one_in_its_place(tmp_path):
    for i, name in enumerate(("a/0.png", "b/1.png")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name) if i else (tmp_path / name).write_bytes(b"")
    source = open_source(Root("folder", tmp_path), "train")
    order, crops = Order(0, 2, 2), Crops(8, 1, views=1)
    (batch,) = train_batches(source, order, crops, range(1), rank=0, world_size=1, workers=Workers(()))
    assert sorted(batch.sample_B.tolist()) == [0, 1]
    assert batch.shown_B.tolist() == [1, 1]
    assert batch.crops.shape == (1, 2, 3, 8, 8)


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path):
    run_linear(linear_recipe(tmp_path, "train.max_steps=5"))
    result = run_linear(linear_recipe(tmp_path))
    assert result == finished[1]
    losses = [[row["loss"] for row in rows(directory, "loss")] for directory in (tmp_path, finished[0])]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_resume_refuses_what_differs(finished):
    directory = finished[0]
    with pytest.raises(UserError, match=r"train.epochs \(2 -> 3\)"):
        run_linear(linear_recipe(directory, "train.epochs=3"))
    train = VAL.with_name("train.tar")
    with pytest.raises(UserError, match=r"data.val_root \(.*train.tar\) must hold the images that the run in"):
        run_linear(linear_recipe(directory, f"data.val_root={train}"))
    with process_group() as world, pytest.raises(UserError, match="holds a run on another network"):
        linear(linear_recipe(directory), CHECKPOINT, "momentum", world)


def test_a_trunk_that_changes_is_an_error(tmp_path, monkeypatch):
    """One bit of one buffer or weight during training, and no result is reported."""
    opened = linear_module.open_subject_together

    class Drifting(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, images):
            self.calls += 1
            return self.network(images)

    def open_drifting(*arguments, **options):
        subject = opened(*arguments, **options)
        object.__setattr__(subject, "network", Drifting(subject.network))
        return subject

    monkeypatch.setattr(linear_module, "open_subject_together", open_drifting)
    with pytest.raises(RunFailed, match="the frozen trunk's weights or buffers changed"):
        run_linear(linear_recipe(tmp_path, "train.max_steps=1"))


def test_a_step_with_a_bad_gradient_fails_the_run_though_it_was_not_logged(tmp_path, monkeypatch):
    encode = LinearClassification.encode

    def poisoned(task, images):
        return encode(task, images) * (float("nan") if task.step == 1 else 1)

    monkeypatch.setattr(LinearClassification, "encode", poisoned)
    with pytest.raises(RunFailed, match="the loss of a step up to 2 is not finite; the newest checkpoint is kept"):
        run_linear(linear_recipe(tmp_path, "log.every_steps=100", "checkpoint.every_steps=3"))
    assert not list(tmp_path.glob("checkpoints/step_*"))
