"""The first hour of somebody with photographs: the README's commands one after the other, on a folder as people have
them, with two files that are broken, three that are no images, and a small labelled set beside."""

import csv
import json
import re
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.distributed.commands import ON_LINUX, Ended, rows, run
from tests.distributed.launch import ROOT

pytestmark = [pytest.mark.slow, ON_LINUX]

CLASSES = ("0_t-shirt", "1_trouser", "5_sandal", "9_ankle-boot")
# A plain ViT, which timm can load.
SMALL = [
    *("model.name=vit", "model.image_size=32", "model.patch_size=8", "model.dim=32", "model.depth=1", "model.heads=2"),
    *("model.projector_hidden_dim=64", "train.global_batch_size=14", "train.max_steps=12"),
]
BROKEN = ["2024/trip/IMG_01.jpg", "2024/trip/IMG_05.jpg"]
TWICE = ["2023/home/IMG_00 copy.jpg", "2023/home/IMG_00.jpg"]


@pytest.fixture
def home(tmp_path) -> Path:
    photos, labelled = tmp_path / "photos", tmp_path / "labelled"
    for number, (name, found) in enumerate(pictures().items()):
        for i, picture in enumerate(found[:24]):
            place = f"{2023 + i % 2}/{'trip' if i % 3 else 'home'}"
            save(picture, photos / place / f"IMG_{24 * number + i:02}.jpg")
        for i, picture in enumerate(found[24:42]):
            save(picture, labelled / ("val" if i % 3 else "train") / name / f"{i}.jpg")
    copy, original = (photos / name for name in TWICE)
    copy.write_bytes(original.read_bytes())
    half, text = (photos / name for name in BROKEN)
    half.write_bytes(half.read_bytes()[:600])
    text.write_text("moved to the other disk")
    for name in ("2023/IMG_97.heic", "2024/IMG_98.heic", "notes.txt"):
        (photos / name).write_bytes(b"no image")
    return tmp_path


def pictures() -> dict[str, list[Image.Image]]:
    """The first of each class, in colour and as wide as photographs are."""
    found: dict[str, list[Image.Image]] = {name: [] for name in CLASSES}
    with tarfile.open(ROOT / "recipes/data/fashion_mnist/val.tar") as tar:
        for member in tar:
            if (name := member.name.partition("/")[0]) in found:
                picture = Image.open(BytesIO(tar.extractfile(member).read()))
                found[name].append(picture.convert("RGB").resize((96, 72)))
    return found


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def command(home: Path, door: str, *arguments: object) -> Ended:
    ended = run(sys.executable, "-m", f"engine.{door}", *arguments, cwd=home)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err
    return ended


def result(ended: Ended) -> dict:
    return json.loads(ended.out.splitlines()[-1])


def test_the_first_hour(home):
    looked = command(home, "check", "photos")
    assert {key: result(looked)[key] for key in ("images", "unreadable", "copies")} == {
        "images": 97,
        "unreadable": 2,
        "copies": 1,
    }
    bears = re.search(r"data\.max_bad_fraction=[\d.]+", looked.out)[0]

    beside = "evaluate.train_root=labelled/train", "evaluate.val_root=labelled/val", "evaluate.knn_every_epochs=1"
    trained = command(home, "run", "own_photos_small", "data.root=photos", "run.dir=runs/mine", bears, *beside, *SMALL)
    for line in (
        "data.root (photos): left out in photos: 2 .heic, 1 .txt; convert .heic to JPEG where they shall count",
        "2 cannot be read and are left out",
        f"data      95 training images (unlabelled) in {home}/photos, no validation images",
        "monitor   kNN on labelled images beside: 24 as neighbours of 48, 4 classes",
    ):
        assert line in trained.out + trained.err
    assert "\nresult    kNN top-1 " in trained.out
    monitored = {row["step"]: row["knn_top1"] for row in rows(home / "runs/mine") if "knn_top1" in row}
    assert list(monitored) == [0, 6, 12], "once before the first step and after each epoch"
    assert all(1 / len(CLASSES) < share <= 1 for share in monitored.values()), "better than by chance"
    assert all(name in trained.err for name in BROKEN)

    embedded = command(home, "embed", "runs/mine", "features.npy", "--data", "photos")
    assert result(embedded) == {"images": 95, "width": 32, "file": "features.npy"}
    assert all(f"{name} could not be read" in embedded.err for name in BROKEN)
    with (home / "features.csv").open() as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert np.load(home / "features.npy").shape == (95, 32)
    assert len(set(names)) == 95
    assert set(TWICE) <= set(names)
    assert not set(BROKEN) & set(names)

    found = result(command(home, "duplicates", "runs/mine", "same.csv", "--data", "photos", "--least", "0.999999"))
    with (home / "same.csv").open() as file:
        alike = [row["name"] for row in csv.DictReader(file)]
    assert (found["groups"], alike) == (1, TWICE)

    command(home, "export", "runs/mine", "timm", "--format", "timm")
    model = timm.create_model(f"local-dir:{home / 'timm'}", pretrained=True, num_classes=len(CLASSES)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photo = transform(Image.open(home / "photos" / TWICE[0]).convert("RGB"))[None]
    assert model(photo).shape == (1, len(CLASSES))
    ours = torch.from_numpy(np.load(home / "features.npy")[names.index(TWICE[0])])
    theirs = model.forward_head(model.forward_features(photo), pre_logits=True)[0]
    assert torch.cosine_similarity(theirs, ours, 0) > 0.9999
