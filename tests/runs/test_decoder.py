"""What decodes JPEG files is kept by a run, which another version of it does not stop."""

import json
import shutil
from functools import partial
from importlib.metadata import version
from unittest.mock import patch

import pytest
from PIL import Image

from engine.checkpoint.manifest import NAME, own_checksum, read_manifest
from engine.data.decode import Crops
from engine.errors import UserError
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from tests.distributed.trajectories import RECIPE, SMALL

FOLDER = ["data.source=folder", "data.dataset=null", "data.dataset_options={}", "data.workers=0"]
OURS, PILLOWS = f"simplejpeg {version('simplejpeg')}", f"pillow {version('pillow')}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        Image.effect_noise((50, 60), 90).convert("RGB").save(folder / f"{number:02}.jpg", quality=90)
    return folder


def train(world, images, run, steps: int) -> list[float]:
    values = [*SMALL, *FOLDER, "model.dim=16", "model.heads=2", f"run.dir={run}", f"data.root={images}"]
    pretrain(load(RECIPE, [*values, f"train.max_steps={steps}"]), RECIPE, world)
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in row]


def rewrite(run, **decoder) -> None:
    """As if another version had written the checkpoint."""
    file = run / "checkpoints/step_0000002" / NAME
    content = json.loads(file.read_text())
    content["state"].pop("decoder")
    content["state"] |= decoder
    file.write_text(json.dumps(content | {"manifest_sha256": own_checksum(content)}))


def test_a_run_goes_on_with_its_decoder(world, images, tmp_path, capfd):
    go_on = partial(train, world, images)
    with patch("engine.runs.pretrain.Crops", partial(Crops, pillow=True)):
        by_pillow, former = go_on(tmp_path / "by_pillow", 4), go_on(tmp_path / "former", 2)
    go_on(tmp_path / "ours", 2)
    assert f"decoder   {OURS}\n" in capfd.readouterr().out
    rewrite(tmp_path / "former")
    rewrite(shutil.copytree(tmp_path / "ours", tmp_path / "other"), decoder="simplejpeg 0.1")
    rewrite(shutil.copytree(tmp_path / "ours", tmp_path / "unknown"), decoder="tomorrow 1.0")

    assert go_on(tmp_path / "former", 4) == by_pillow
    assert f"decoder   {PILLOWS}\n" in capfd.readouterr().out
    ours = go_on(tmp_path / "ours", 4)
    assert f"decoder   {OURS}\n" in capfd.readouterr().out
    assert former[:2] == by_pillow[:2] != ours[:2]
    assert go_on(tmp_path / "other", 4) == ours
    assert f"decoder   {OURS}; simplejpeg 0.1 until here, so that pixels may differ\n" in capfd.readouterr().out
    with pytest.raises(UserError, match="its decoder is tomorrow; go on with the version that wrote it"):
        go_on(tmp_path / "unknown", 4)
    found = [tmp_path / name / "checkpoints/step_0000004" for name in ("by_pillow", "former", "ours", "other")]
    assert [read_manifest(path).state["decoder"] for path in found] == [PILLOWS, PILLOWS, OURS, OURS]
