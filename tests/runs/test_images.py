"""A run goes on with the images that it began with, whatever their names and sizes."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from engine.checkpoint.manifest import own_checksum
from engine.data.rules import RULES
from engine.distributed.world import process_group
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import VAL, linear_recipe, run_linear

FOLDER = ["data.source=folder", "data.dataset=null", "data.dataset_options={}", "data.workers=0"]


def fill(images, seed: int) -> None:
    images.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(16):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(images / f"{number:02}.bmp")


def small_run(run, root, steps: int) -> None:
    values = [*SMALL, *FOLDER, "model.dim=16", "model.heads=2", f"run.dir={run}", f"data.root={root}"]
    with process_group() as world:
        pretrain(load(RECIPE, [*values, f"train.max_steps={steps}"]), RECIPE, world)


def test_others_under_the_same_names_and_sizes_are_refused(tmp_path):
    """By all but a checkpoint of a former version, which does not know what they held; its successor does."""
    images, run = tmp_path / "images", tmp_path / "run"
    train = partial(small_run, run, images)
    fill(images, 0)
    train(1)
    fill(images, 1)
    place = re.escape(str(images))
    words = (
        rf"data.root \({place}\) must hold the images that the run in .* began with, and 00.bmp holds something else"
    )
    with pytest.raises(UserError, match=words + "; give it those, or pass another run.dir"):
        train(2)

    manifest = run / "checkpoints/step_0000001/MANIFEST.json"
    content = json.loads(manifest.read_text())
    assert len(content["state"].pop("contents")["train"]) == 16
    assert content["state"].pop("image_rules") == RULES
    manifest.write_text(json.dumps(content | {"manifest_sha256": own_checksum(content)}))
    (images / "16.ppm").write_bytes(b"former rules took it for no image")
    with pytest.raises(UserError, match=rf"began with under rules 1 .* rules {RULES} differ: 16.ppm \(its suffix"):
        train(2)
    (images / "16.ppm").unlink()
    train(2)
    fill(images, 0)
    with pytest.raises(UserError, match=words):
        train(3)
    (images / "15.bmp").unlink()  # not the same names either: that says enough
    with pytest.raises(UserError, match="began with; give it those"):
        train(3)


def test_several_roots_may_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        fill(tmp_path / name, number)
    small_run("run", "[a, b]", 1)
    assert load("run").data.root == (f"{tmp_path}/a", f"{tmp_path}/b")
    (tmp_path / "a").rename("other")
    small_run("run", "[other, b]", 2)
    with pytest.raises(
        UserError, match=r"data.root \(b, other\) must hold the images .*, and b:00.bmp holds something"
    ):
        small_run("run", "[b, other]", 3)


def test_a_run_may_lie_among_its_images_in_a_folder_of_its_own(tmp_path):
    images, run = tmp_path / "images", tmp_path / "images/run"
    fill(images, 0)
    fill(images / "more", 1)
    for wrong in (images, images / "more"):
        with pytest.raises(UserError, match=r"run.dir \(.*\) must be a folder of its own"):
            small_run(wrong, images, 1)
    assert not list(images.rglob("recipe.yaml"))
    small_run(run, images, 1)
    fill(run / "pictures", 2)
    small_run(run, images, 2)
    assert (run / "checkpoints/step_0000002").is_dir()


def test_validation_images_are_bound_where_the_result_depends_on_them(tmp_path):
    val, recipe = tmp_path / "val.tar", linear_recipe(tmp_path / "run", "train.max_steps=1")
    shutil.copy(VAL, val)
    run_linear(linear_recipe(tmp_path / "run", "train.max_steps=1", f"data.val_root={val}"))
    run_linear(recipe)  # the same images elsewhere
    content = bytearray(val.read_bytes())
    content[512 + 100] ^= 1  # of the first image
    val.write_bytes(content)
    with pytest.raises(UserError, match=r"data.val_root \(.*val.tar\) must hold .*, and val.tar:.* something else"):
        run_linear(linear_recipe(tmp_path / "run", "train.max_steps=1", f"data.val_root={val}"))
