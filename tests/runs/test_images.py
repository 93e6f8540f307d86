"""A run goes on with the images that it began with, whatever their names and sizes."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from engine.checkpoint.manifest import own_checksum, read_manifest
from engine.data import leaving_out
from engine.data.order import Order
from engine.data.rules import RULES
from engine.distributed.world import process_group
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL
from tests.runs.small import FEW, linear_recipe, rows, run_linear

FOLDER = ["data.source=folder", "data.dataset=null", "data.dataset_options={}", "data.workers=0"]


def fill(images, seed: int) -> None:
    images.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(16):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(images / f"{number:02}.bmp")


def small_run(run, root, steps: int, *overrides: str) -> None:
    values = [*SMALL, *FOLDER, "model.dim=16", "model.heads=2", f"run.dir={run}", f"data.root={root}", *overrides]
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
    words = rf"data.root \({place}\) must hold the images that the run in .* began with; 00.bmp holds something else"
    with pytest.raises(
        UserError, match=words + "; give it those, go on with data.accept_changes=true, or pass another run.dir"
    ):
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
    (images / "15.bmp").unlink()
    with pytest.raises(UserError, match=r"began with; 1 gone \(15.bmp\); give it those"):
        train(3)


def test_several_roots_may_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        fill(tmp_path / name, number)
    small_run("run", "[a, b]", 1)
    assert load("run").data.root == (f"{tmp_path}/a", f"{tmp_path}/b")
    (tmp_path / "a").rename("other")
    small_run("run", "[other, b]", 2)
    with pytest.raises(UserError, match=r"data.root \(b, other\) must hold the images .*; b:00.bmp holds something"):
        small_run("run", "[b, other]", 3)


def losses(run) -> list[tuple]:
    return [(row["step"], row["loss"], row["bad_images"]) for row in rows(run, "loss")]


def test_a_run_goes_on_where_an_image_is_lost_or_repaired(tmp_path, capfd, monkeypatch):
    """As one that could not read it from the start; where all is as it was again, nothing has to be accepted."""
    images, run, other = tmp_path / "images", tmp_path / "run", tmp_path / "other"
    fill(images, 0)
    name = f"{Order(0, 16, 8).share(1, 0, 1)[1][0]:02}.bmp"  # of the second step
    small_run(run, images, 1, "log.every_steps=1")
    kept = (images / name).read_bytes()
    (images / name).unlink()
    again, bears = (run, images, 3, "log.every_steps=1"), "data.max_bad_fraction=0.1"
    with pytest.raises(UserError, match=rf"began with; 1 gone \({name}\); give it those, go on with data.accept_ch"):
        small_run(*again, bears)
    with pytest.raises(UserError, match=rf"max_bad_fraction \(0.0\) must bear what is gone .*: 1 gone \({name}\)"):
        small_run(*again, "data.accept_changes=true", "data.max_bad_fraction=0")
    small_run(*again, "data.accept_changes=true", bears)
    assert (
        f"not all images are as the run began with them, which is accepted: 1 gone ({name})" in capfd.readouterr().err
    )
    manifest = read_manifest(run / "checkpoints/step_0000003")
    assert manifest.state["accepted"] == {"train": f"1 gone ({name})"}

    (images / name).write_bytes(b"broken".ljust(len(kept), b"."))
    monkeypatch.setattr(leaving_out, "_HEADERS", 0)  # of its set it looks at one image, as of a large one at some
    monkeypatch.setattr(leaving_out, "_WHOLE", 1)
    small_run(other, images, 1, "log.every_steps=1", bears)
    small_run(other, images, 3, "log.every_steps=1", bears)
    assert losses(run) == losses(other)
    assert [bad for _, _, bad in losses(run)][:2] == [0, 1]

    (images / name).write_bytes(kept)
    small_run(run, images, 4, "log.every_steps=1", bears)
    assert read_manifest(run / "checkpoints/step_0000004").state["accepted"] == {"train": f"1 gone ({name})"}


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
    shutil.copy(FEW, val)
    run_linear(linear_recipe(tmp_path / "run", "train.max_steps=1", f"data.val_root={val}"))
    run_linear(recipe)  # the same images elsewhere
    content = bytearray(val.read_bytes())
    content[512 + 100] ^= 1  # of the first image
    val.write_bytes(content)
    with pytest.raises(UserError, match=r"data.val_root \(.*val.tar\) must hold .*; val.tar:.* something else"):
        run_linear(linear_recipe(tmp_path / "run", "train.max_steps=1", f"data.val_root={val}"))
