"""Linear classification: the golden trace, the protocol against plain torch, and what a run refuses."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from torch import nn

from engine.data.decode import Crops
from engine.data.loader import train_batches
from engine.data.order import Order
from engine.data.philox import AUGMENT, uniform
from engine.data.source import Root
from engine.data.sources import open_source
from engine.distributed.world import process_group
from engine.errors import RunFailed, UserError
from engine.evaluation import fast_linear
from engine.evaluation.features import Features
from engine.evaluation.linear import LinearProbe, linear_step
from engine.evaluation.readout import readout
from engine.evaluation.subject import open_subject
from engine.recipe.load import load
from engine.recipe.sections import Linear
from engine.runs import linear as probes
from tests.test_house import recording

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
CHECKPOINT = str(GOLDEN / "I_vit_small_shape.pth.tar")
VAL = ROOT / "recipes/data/fashion_mnist/val.tar"
VIT = ROOT / "recipes/linear_vit.yaml"


def small_recipe(directory: Path, *overrides: str) -> Linear:
    """1,000 images of the quickstart in batches of 300: three and a partial one of 100 in each epoch."""
    values = [f"run.dir={directory}", f"data.root={VAL}", f"data.val_root={VAL}", "data.source=shards"]
    values += ["data.workers=0", "train.global_batch_size=300", "train.epochs=2", "log.every_steps=1"]
    return load(VIT, [*values, "optimizer.base_lr=0.5", "checkpoint.every_steps=3", *overrides], Linear)


def run(recipe: Linear) -> dict:
    with process_group() as world:
        return probes.probe(recipe, CHECKPOINT, "base", world)


def rows(directory: Path, key: str) -> list[dict]:
    return [row for row in map(json.loads, (directory / "metrics.jsonl").open()) if key in row]


# ---- the step --------------------------------------------------------------------------------------------------------


def test_golden_trace_through_the_real_step():
    with safe_open(GOLDEN / "H_linear_probe.safetensors", "pt") as file:
        golden, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    feature_ND, label_N = golden["features"], golden["labels"]
    steps = math.ceil(len(feature_ND) / config["batch"])
    probe = LinearProbe(
        feature_ND.shape[1],
        config["classes"],
        peak_lr=config["base_lr"] * config["batch"] / 256,
        epochs=config["epochs"],
        steps_per_epoch=steps,
        dtype=torch.float64,
    )
    probe.weight_CD.data.copy_(golden["init.weight"])
    losses = []
    for epoch, order_N in enumerate(golden["order"]):
        assert probe.learning_rate == pytest.approx(golden["lr"][epoch].item(), rel=1e-12)
        losses += [linear_step(probe, feature_ND[b], label_N[b], len(b)).item() for b in order_N.split(config["batch"])]
    assert losses == pytest.approx(golden["loss"].tolist(), rel=1e-9)
    for ours, name in ((probe.weight_CD, "final.weight"), (probe.bias_C, "final.bias")):
        torch.testing.assert_close(ours.detach(), golden[name], rtol=1e-8, atol=1e-8)


def test_the_classifier_starts_from_the_papers_distribution():
    probe = LinearProbe(500, 400, peak_lr=1, epochs=1, steps_per_epoch=1, seed=3)
    assert probe.weight_CD.std().item() == pytest.approx(0.01, rel=0.01)
    assert not probe.bias_C.any()
    other = LinearProbe(500, 400, peak_lr=1, epochs=1, steps_per_epoch=1, seed=4)
    assert not torch.equal(probe.weight_CD, other.weight_CD)


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
    return directory, run(small_recipe(directory))


def test_protocol_against_plain_torch(finished):
    """Loader's crops; the rest is written anew: flip, mean and std, Linear, SGD, one cosine step per epoch."""
    recipe, source = small_recipe(finished[0]), open_source(Root("shards", VAL), "all")
    subject = open_subject(CHECKPOINT, "cpu")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (subject.mean, subject.std))
    classifier = nn.Linear(subject.width("cpu"), 10)
    start = LinearProbe(subject.width("cpu"), 10, peak_lr=1, epochs=1, steps_per_epoch=1, seed=0)
    with torch.no_grad():
        classifier.weight.copy_(start.weight_CD)
        classifier.bias.zero_()
    sgd = torch.optim.SGD(classifier.parameters(), lr=0.5 * 300 / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=2)
    order = Order(0, len(source), 300, keep_partial=True)
    crops = Crops(subject.image_size, recipe.augment.crop_min, views=1)
    losses, sizes = [], []
    for batch in train_batches(source, order, crops, range(8), rank=0, world_size=1, workers=0):
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
    assert sum(float(row.split(",")[2]) for row in table[1:]) / 10 == pytest.approx(result["top1"], abs=1e-6)
    assert (directory / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert run(small_recipe(directory)) == result  # a finished run says it again


def test_an_early_end_inside_an_epoch_is_no_epoch():
    rows = [{"epoch": 0.5, "linear_top1": 0.9}, {"epoch": 1.0, "linear_top1": 0.3}, {"epoch": 2.0, "linear_top1": 0.3}]
    reported = probes.Probing.reported
    assert reported(None, rows) is rows[1]
    assert reported(None, rows[:1]) is rows[0]


def test_every_key_of_the_recipe_is_read(tmp_path):
    recipe = small_recipe(tmp_path, "train.max_steps=1")
    sections = {n: part for n, part in vars(recipe).items() if dataclasses.is_dataclass(part)}
    read = {name: set() for name in sections}
    watched = dataclasses.replace(recipe, **{n: recording(part, read[n]) for n, part in sections.items()})
    run(watched)
    for name, part in sections.items():
        unread = {leaf.name for leaf in dataclasses.fields(part)} - read[name]
        assert not unread, (name, unread)


def test_an_unreadable_image_is_shown_with_the_label_of_the_one_in_its_place(tmp_path):
    for i, name in enumerate(("a/0.png", "b/1.png")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name) if i else (tmp_path / name).write_bytes(b"")
    source = open_source(Root("folder", tmp_path), "train")
    order, crops = Order(0, 2, 2), Crops(8, 1, views=1)
    (batch,) = train_batches(source, order, crops, range(1), rank=0, world_size=1, workers=0)
    assert sorted(batch.sample_B.tolist()) == [0, 1]
    assert batch.shown_B.tolist() == [1, 1]
    assert batch.crops.shape == (1, 2, 3, 8, 8)


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path):
    run(small_recipe(tmp_path, "train.max_steps=5"))
    result = run(small_recipe(tmp_path))
    assert result == finished[1]
    losses = [[row["loss"] for row in rows(directory, "loss")] for directory in (tmp_path, finished[0])]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_resume_refuses_what_differs(finished):
    directory = finished[0]
    with pytest.raises(UserError, match=r"train.epochs \(2 -> 3\)"):
        run(small_recipe(directory, "train.epochs=3"))
    train = VAL.with_name("train.tar")
    with pytest.raises(UserError, match=r"--val must hold the images that run.dir"):
        run(small_recipe(directory, f"data.val_root={train}"))
    with process_group() as world, pytest.raises(UserError, match="holds a run on another network"):
        probes.probe(small_recipe(directory), CHECKPOINT, "momentum", world)


def test_a_trunk_that_changes_is_an_error(tmp_path, monkeypatch):
    """One bit of one buffer or weight during training, and no result is reported."""
    opened = probes.open_subject_together

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

    monkeypatch.setattr(probes, "open_subject_together", open_drifting)
    with pytest.raises(RunFailed, match="the frozen trunk's weights or buffers changed"):
        run(small_recipe(tmp_path, "train.max_steps=1"))


# ---- fast ------------------------------------------------------------------------------------------------------------


def clusters(train: int, val: int) -> tuple[Features, Features]:
    """So many rows of six classes, standardised."""
    centre_CD = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))

    def draw(rows: int, seed: int) -> Features:
        generator = torch.Generator().manual_seed(seed)
        label_N = torch.randint(6, (rows,), generator=generator)
        row_ND = centre_CD[label_N] + 1.2 * torch.randn(rows, 12, generator=generator)
        return Features(row_ND, torch.arange(rows), label_N)

    drawn = draw(train, 1), draw(val, 2)
    standard = fast_linear.standardise(drawn[0].feature_ND, drawn[1].feature_ND)
    return drawn[0]._replace(feature_ND=standard[0]), drawn[1]._replace(feature_ND=standard[1])


def test_the_gradient_of_all_candidates_is_autograds_of_each():
    feature_BE, label_B = torch.randn(9, 4), torch.randint(3, (9,))
    weight_LCE = torch.randn(5, 3, 4, requires_grad=True)
    losses = [nn.functional.cross_entropy(feature_BE @ weight_CE.T, label_B) for weight_CE in weight_LCE]
    (expected,) = torch.autograd.grad(sum(losses), weight_LCE)
    torch.testing.assert_close(fast_linear.gradient(weight_LCE.detach(), feature_BE, label_B), expected)


def test_candidates_trained_together_are_those_trained_alone():
    train, val = clusters(700, 300)
    group = fast_linear.groups_of_rank(1, 3)[0]
    options = {"classes": 6, "epochs": 20}
    scores = fast_linear.train_group(group, train, val, **options)
    assert len({score.top1 for score in scores}) > 1
    for score in scores[::3]:
        (alone,) = fast_linear.train_group([score.candidate], train, val, **options)
        assert alone.top1 == pytest.approx(score.top1, abs=1.5 / 300)
        assert alone.candidate == score.candidate


def test_fast_is_as_good_as_scikit_learn():
    train, val = clusters(700, 600)
    group = [fast_linear.Candidate(0.3, 1e-3)]
    (ours,) = fast_linear.train_group(group, train, val, classes=6)
    regression = LogisticRegression(C=1 / (1e-3 * 700), max_iter=2000).fit(train.feature_ND, train.label_N)
    theirs = regression.score(val.feature_ND, val.label_N)
    assert ours.top1 == pytest.approx(theirs, abs=0.01)
    assert theirs > 0.6


def test_ranks_share_all_candidates_in_groups_of_one_size():
    for world in (1, 2, 3, 7):
        groups = [group for rank in range(world) for group in fast_linear.groups_of_rank(rank, world)]
        assert {len(group) for group in groups} == {fast_linear.GROUP}
        assert sorted(c for group in groups for c in group) == sorted(fast_linear.candidates())


def test_constant_columns_become_zero_and_divergence_scores_nothing():
    train_ND = torch.cat([torch.randn(50, 2), torch.full((50, 1), 3.0)], 1)
    standard_ND, _ = fast_linear.standardise(train_ND, train_ND)
    assert not standard_ND[:, 2].any()
    assert standard_ND[:, :2].std(0, correction=0).tolist() == pytest.approx([1, 1])
    rows = Features(standard_ND, torch.arange(50), torch.arange(50) % 2)
    wild = [fast_linear.Candidate(1e30, 1.0)]
    (score,) = fast_linear.train_group(wild, rows, rows, classes=2, epochs=9)
    assert (score.top1, score.top5) == (0, 0)


# ---- features -------------------------------------------------------------------------------------------


def test_feature_choices_of_a_vit():
    subject = open_subject(CHECKPOINT, "cpu")
    trunk, images = subject.network, torch.rand(2, 3, subject.image_size, subject.image_size)
    tokens = trunk.forward_features(images)
    cls, mean, last = (readout(trunk, choice)(images) for choice in ("cls", "mean", "last2"))
    assert torch.equal(cls, trunk(images))
    assert readout(trunk, "own") is trunk
    torch.testing.assert_close(mean, tokens[:, 1:].mean(1))
    assert last.shape == (2, 2 * cls.shape[1])
    torch.testing.assert_close(last[:, cls.shape[1] :], cls)
    for choice, words in (("last99", "at most last"), ("middle", "must be own, cls, mean"), ("last0", "must be own")):
        with pytest.raises(UserError, match=words):
            readout(trunk, choice)
    with pytest.raises(UserError, match="must be own for a Flatten"):
        readout(nn.Flatten(), "cls")
