"""A run leaves out what cannot be read when it begins, and for good."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from engine.checkpoint.manifest import own_checksum, read_manifest
from engine.data import leaving_out
from engine.data.leaving_out import Look
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from engine.runs.preview import preview
from tests.distributed.trajectories import RECIPE, SMALL

FOLDER = ["data.source=folder", "data.dataset=null", "data.dataset_options={}", "data.workers=0", "log.every_steps=1"]
TINY = ["model.dim=16", "model.heads=2"]
BROKEN = ("03.bmp", "11.bmp")


@pytest.fixture
def images(tmp_path):
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(18):
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02}.bmp")
    return folder


@pytest.fixture
def broken(images):
    """What two of them were."""
    were = {name: (images / name).read_bytes() for name in BROKEN}
    spoil(images, *BROKEN)
    return were


def spoil(images, *names: str) -> None:
    for name in names:
        (images / name).write_bytes(b"broken".ljust((images / name).stat().st_size, b"."))


def recipe_of(run, images, steps: int, *overrides: str):
    values = [*SMALL, *FOLDER, *TINY, f"run.dir={run}", f"data.root={images}", f"train.max_steps={steps}", *overrides]
    return load(RECIPE, [*values, "data.max_bad_fraction=0.2"])


def train(world, run, images, steps: int, *overrides: str) -> list[tuple]:
    pretrain(recipe_of(run, images, steps, *overrides), RECIPE, world)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["bad_images"]) for row in found if "loss" in row]


@pytest.fixture
def nobody_looks(monkeypatch):
    def forbid() -> None:
        def look(*_):
            raise AssertionError("a run that has begun looks at nothing")

        monkeypatch.setattr(leaving_out, "look", look)

    return forbid


def state_of(run, step: int) -> dict:
    return read_manifest(run / f"checkpoints/step_{step:07}").state


def test_a_run_is_as_if_they_were_not_there_and_stays_so(world, tmp_path, images, broken, capfd, nobody_looks):
    """Whatever is mended or breaks since: to the bit."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    bare.mkdir()
    for path in images.iterdir():
        if path.name not in BROKEN:
            (bare / path.name).write_bytes(path.read_bytes())
    without = train(world, tmp_path / "without", bare, 4)
    assert not state_of(tmp_path / "without", 4)["left_out"]
    first = train(world, run, images, 2)
    said = capfd.readouterr().err
    assert [said.count(f"warning: {name} (ValueError: not an image of") for name in BROKEN] == [1, 1]
    left_out = state_of(run, 2)["left_out"]
    assert [*left_out] == ["train"]
    assert [*left_out["train"]] == ["3", "11"]
    assert left_out["train"]["3"].startswith("03.bmp (ValueError: ")

    nobody_looks()
    for name, content in broken.items():
        (images / name).write_bytes(content)
    mended = train(world, run, images, 4)
    assert mended == without
    assert mended[:2] == first
    assert state_of(run, 4)["left_out"] == left_out
    assert "cannot be read" not in capfd.readouterr().err
    spoil(images, "05.bmp")
    (images / "11.bmp").unlink()
    accepted = ["data.accept_changes=true"]
    with pytest.raises(UserError, match=r"began with; 1 gone \(11.bmp\); give it those, go on with data.accept_"):
        train(world, run, images, 6)
    later = train(world, run, images, 6, *accepted)
    assert later[:4] == mended
    assert later[-1][2] > 0  # what has broken since is replaced, and counted
    assert state_of(run, 6)["left_out"] == left_out


def test_former_runs_go_on_with_all_images(world, tmp_path, images, broken, monkeypatch, nobody_looks):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    with monkeypatch.context() as former:
        former.setattr(leaving_out, "look", lambda *_: Look({}, 18, 18))
        rows = train(world, unbroken, images, 4)
        train(world, run, images, 2)
    assert rows[-1][2] > 0
    manifest = run / "checkpoints/step_0000002/MANIFEST.json"
    content = json.loads(manifest.read_text())
    assert content["state"].pop("left_out") == {}
    manifest.write_text(json.dumps(content | {"manifest_sha256": own_checksum(content)}))
    nobody_looks()
    assert train(world, run, images, 4) == rows


def test_too_many_are_one_line_before_the_first_step(world, tmp_path, images, broken):
    refused = partial(recipe_of, tmp_path / "run", images, 1)
    for start in (pretrain, preview):
        spoil(images, "00.bmp", "01.bmp")
        with pytest.raises(UserError, match=r"data.max_bad_fraction \(0.2\) must bear .*: 4 of 18 images looked at"):
            start(refused(), RECIPE, world)
    assert not (tmp_path / "run").exists()
