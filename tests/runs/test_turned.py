"""Photographs that are turned by what they say are, for every door, those of a set whose files lie upright."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine import embed, predict
from engine.data.orientation import TAG
from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.runs.pretrain import pretrain
from engine.weights.export import export
from engine.weights.opening import open_weights
from tests.data.images import encoded, picture
from tests.pictures.drawn import show
from tests.runs.small import ROOT, finetune_recipe, linear_recipe, rows, run_finetune, run_linear
from tests.weights.exports import fresh_checkpoint

QUICKSTART = ROOT / "recipes/quickstart.yaml"
# What a camera that was turned so writes, of the upright image.
LAID = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two sets of two classes: files that lie upright, and others that say how they lie."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(16):
        image, number = picture(4, 3, i).resize((44, 32), Image.Resampling.BICUBIC), list(LAID)[i % 5]
        exif = Image.Exif()
        exif[TAG] = number
        files = {"upright": encoded(image, "PNG")}
        files["lying"] = encoded(image.transpose(LAID[number]), "PNG", exif=exif.tobytes())
        for name, data in files.items():
            file = root / name / ("val" if i >= 12 else "train") / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return {name: root / name for name in ("upright", "lying")}


def own(folder: Path, turned: bool) -> list[str]:
    values = [f"data.root={folder}", "data.source=folder", "data.workers=0", "log.every_steps=1"]
    return [*values, f"data.exif_orientation={str(turned).lower()}"]


def of_each(folders: dict[str, Path], results) -> tuple:
    """What comes of the upright files, of the others turned, and of these as they lie."""
    cases = ("upright", False), ("lying", True), ("lying", False)
    return tuple(results(folders[name], turned) for name, turned in cases)


def test_pretraining_and_its_picture(folders, tmp_path):
    def results(folder, turned):
        out = tmp_path / f"{folder.name}-{turned}"
        values = [f"run.dir={out}", *own(folder, turned), "data.val_root=null", "evaluate.knn_every_epochs=1"]
        values += ["train.global_batch_size=4", "train.max_steps=2", "parallel.compile=false"]
        with process_group() as world:
            pretrain(load(QUICKSTART, values), QUICKSTART, world)
        show("views", QUICKSTART, out / "views.png", *values)
        kept = ("loss", "knn_top1", "val_rankme")
        picture = Image.open(out / "views.png").tobytes()
        return [{k: row[k] for k in kept if k in row} for row in rows(out, "step")], picture

    upright, turned, lying = of_each(folders, results)
    assert upright == turned
    assert upright[0] != lying[0]
    assert upright[1] != lying[1]


@pytest.mark.parametrize(("run", "recipe"), [(run_linear, linear_recipe), (run_finetune, finetune_recipe)])
def test_runs_with_labels_and_their_predictions(run, recipe, folders, tmp_path, capsys):
    def results(folder, turned):
        out = tmp_path / f"{folder.name}-{turned}"
        few = ["train.global_batch_size=6", "train.epochs=1", "train.max_steps=null", "data.val_root=null"]
        if recipe is finetune_recipe:
            few += ["train.warmup_epochs=0", "parallel.compile=false"]
        run(recipe(out, *own(folder, turned), *few))
        predict.main([str(out), str(out / "rows.csv"), "--data", str(folder / "val"), "--workers", "0"])
        return [row["loss"] for row in rows(out, "loss")], (out / "rows.csv").read_text()

    upright, turned, lying = of_each(folders, results)
    assert len(upright[0]) == 2
    assert upright == turned
    assert upright[0] != lying[0]
    assert upright[1] != lying[1]


def test_a_checkpoint_says_how_its_images_are_read(folders, tmp_path, capsys, monkeypatch, here):
    """To doors that are given none of its recipe, to `engine.load` and to who reads an export or its card."""

    def results(folder, turned):
        run = fresh_checkpoint(tmp_path / f"{folder.name}-{turned}", *own(folder, turned))
        embed.main([str(run), str(run / "rows.npy"), "--data", str(folder), "--workers", "0"])
        file = folder / "val/a/12.png"
        show("attention", run, file, run / "attention.png")
        export(partial(open_weights, str(run)), run / "timm", "timm")
        views = [engine.load(each).transform(Image.open(file)) for each in (run, run / "timm/model.safetensors")]
        return np.load(run / "rows.npy"), np.asarray(Image.open(run / "attention.png")), *map(np.asarray, views)

    upright, turned, lying = of_each(folders, results)
    for one, same, other in zip(upright, turned, lying, strict=True):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
    card = (tmp_path / "lying-True/timm/README.md").read_text()
    assert "| photographs | turned as cameras were held |" in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[TAG] = 6
    picture(44, 32).save("photo.jpg", exif=exif.tobytes())
    found: dict = {}
    exec(code, found)
    encoder = engine.load(tmp_path / "lying-True")
    ours = encoder(encoder.transform(Image.open("photo.jpg"))[None])
    assert torch.cosine_similarity(found["features"], ours).item() >= 0.9999
