"""evaluate.train_root and evaluate.val_root: kNN on labelled images beside unlabelled training data."""

import json

import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from engine.runs.preview import preview
from tests.distributed.trajectories import RECIPE, SMALL

SHADES = {"dark": 20, "bright": 220}
FOLDER = ["data.source=folder", "data.dataset=null", "data.dataset_options={}", "evaluate.knn_every_epochs=1"]


def draw(folder, names):
    """Images whose class is their first folder's shade."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shade = SHADES.get(name.split("/")[-2], 120)
        Image.fromarray(rng.integers(shade - 20, shade + 20, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return folder


def images(folder, each):
    return [f"{folder}/{shade}/{number}.png" for shade in SHADES for number in range(each)]


@pytest.fixture
def recipe(tmp_path):
    draw(tmp_path / "photos", [f"{2019 + n % 2}/rome/{n}.png" for n in range(16)])
    draw(tmp_path / "labelled", images("train", 12) + images("val", 3))
    labelled = tmp_path / "labelled"

    def made(train=labelled, val=labelled, *more):
        values = [
            *SMALL,
            *FOLDER,
            "model.dim=16",
            "model.heads=2",
            "data.workers=0",
            f"data.root={tmp_path / 'photos'}",
        ]
        values += [f"run.dir={tmp_path / 'run'}", f"evaluate.train_root={train}", f"evaluate.val_root={val}"]
        return load(RECIPE, [*values, "train.max_steps=2", *more])

    return made


def test_knn_is_measured_from_step_0_and_the_run_is_the_same(world, tmp_path, recipe, capfd):
    pretrain(recipe(), RECIPE, world)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    monitor = [row for row in rows if "knn_top1" in row]
    assert [row["step"] for row in monitor] == [0, 2]
    assert all(row["knn_top1"] == 1 and 1 < row["val_rankme"] <= 6 and "probe_top1" not in row for row in monitor)
    said = capfd.readouterr().out
    assert "monitor   kNN on labelled images beside: 24 as neighbours of 6, 2 classes\n" in said
    assert "own_photos" not in said
    assert "probe     the online probe is off: training images have none of evaluate.train_root's labels\n" in said
    assert f"train_root: {tmp_path / 'labelled'}\n" in (tmp_path / "run/recipe.yaml").read_text()

    bare = recipe("null", "null", f"run.dir={tmp_path / 'bare'}")
    pretrain(bare, RECIPE, world)
    lines = (tmp_path / "bare/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [row["loss"] for row in rows if "loss" in row]
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "  monitor " in line]
    assert "kNN is off: " in line
    assert "pass evaluate.train_root and evaluate.val_root for labelled images" in line


def test_labelled_images_that_do_not_suit_are_refused_before_the_run(world, tmp_path, recipe):
    few, flat = draw(tmp_path / "few", images("a", 4)), draw(tmp_path / "flat", ["x/1.png", "x/2.png"])
    val = tmp_path / "labelled/val"
    cases = [
        (tmp_path / "gone", val, r"evaluate.train_root \(.*gone\) must exist; pass evaluate.train_root="),
        (few / "a", val, r"evaluate.train_root \(.*\) must hold 20 images or more, kNN's neighbours \(8\)"),
        (flat, val, r"evaluate.train_root \(.*flat\) must hold two classes or more; it has one, x"),
        (tmp_path / "labelled/train", flat / "x", r"evaluate.val_root \(.*x\) must hold labelled images"),
    ]
    for train, val_root, words in cases:
        with pytest.raises(UserError, match=words):
            pretrain(recipe(train, val_root), RECIPE, world)
    inside = recipe(more := tmp_path / "labelled", more, f"run.dir={tmp_path / 'labelled/val'}")
    with pytest.raises(UserError, match="must be a folder of its own, and the training or validation images lie there"):
        pretrain(inside, RECIPE, world)
    assert not (tmp_path / "run").exists()
    assert "# monitor   kNN on labelled images beside: 24 as" in preview(recipe(), RECIPE, world)
