"""`mocov3 check`: real files of every kind in every kind of root."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.check import main
from engine.data.decode import AS_IT_IS
from engine.data.leaving_out import look
from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import UserError
from tests.data.images import encoded, fill, pack, picture, png


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(40, 30, seed=1), "JPEG", exif=exif.tobytes())


def broken_png() -> bytes:
    """Some bytes of its chunk of pixels are others."""
    data = bytearray(encoded(picture(30, 20, seed=2), "PNG"))
    at = data.index(b"IDAT") + 20
    data[at : at + 200] = bytes(200)
    return bytes(data)


JPEG = encoded(picture(64, 48), "JPEG")
GOOD = {"cat/1.jpg": JPEG, "cat/2.jpg": turned_jpeg(), "cat/3.png": png(7), "dog/4.jpg": JPEG, "dog/5.png": png(7)}
GOOD |= {"dog/6.png": encoded(Image.fromarray(np.full((9, 8), 4095, np.uint16)), "PNG"), "dog/7.png": png(8)}
BAD = {"cat/cut.jpg": JPEG[:1000], "cat/empty.jpg": b"", "dog/text.jpg": b"words", "dog/chunk.png": broken_png()}
LARGE = {"dog/large.png": encoded(Image.new("1", (20000, 10000)), "PNG")}
FILES = GOOD | BAD | LARGE


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def lines(root: Path | str, *options: str, capsys) -> list[str]:
    main([str(root), *options])
    return capsys.readouterr().out.splitlines()


def found(root: Path | str, *options: str, capsys) -> dict:
    return json.loads(lines(root, *options, capsys=capsys)[-1])


def listed(folder: Path) -> list:
    return sorted((path, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*"))


def test_every_kind_of_root_shows_the_same(tmp_path, capsys):
    folder = write(tmp_path / "folder", FILES)
    (tmp_path / "images.tar").write_bytes(pack(FILES))
    (tmp_path / "list.txt").write_text("".join(f"folder/{name}\t{name[:3]}\n" for name in FILES))
    rows = {"image": pa.array([{"bytes": data, "path": None} for data in FILES.values()])}
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table(rows | {"label": [name[:3] for name in FILES]}), tmp_path / "tables/train.parquet")
    halves = [write(tmp_path / half, {k: v for k, v in FILES.items() if k[:3] == half}) for half in ("cat", "dog")]
    roots = [folder, tmp_path / "images.tar", tmp_path / "list.txt", tmp_path / "tables", f"[{halves[0]}, {halves[1]}]"]
    before, seen = listed(tmp_path), []
    for root in roots:
        for workers in ("0", "2"):
            seen.append(found(root, "--workers", workers, capsys=capsys))
    assert listed(tmp_path) == before  # nothing is written
    keys = ("images", "unreadable", "too_large", "lying", "kinds", "shorter_side", "longer_side", "below")
    shown = [{key: each["splits"]["train"][key] for key in keys} for each in seen]
    assert all(each == shown[0] for each in shown)
    assert shown[0]["unreadable"] == len(look(open_source(Root("folder", folder), "train"), AS_IT_IS, 1).unreadable)
    assert {(each["copies"], each["groups_with_other_labels"]) for each in seen[:8]} == {(2, 2)}
    of = seen[0]["splits"]["train"]
    assert (of["images"], of["unreadable"], of["too_large"], of["lying"]) == (12, 5, 1, 1)
    assert (of["classes"], of["images_per_class"], of["suffixes"]) == (2, [5, 7], {".jpg": 6, ".png": 6})
    assert of["kinds"] == {"JPEG RGB": 4, "PNG RGB": 4, "PNG I;16": 1, "PNG 1": 1}


def test_what_is_wrong_is_named(tmp_path, capsys):
    root = write(tmp_path / "photos", FILES | {"dog/later/8.heic": b"x", "dog/.hidden.jpg": JPEG})
    out = lines(root, "--list", str(tmp_path / "all.csv"), capsys=capsys)
    text = "\n".join(out)
    assert "left out in" in text
    assert "1 .heic" in text
    assert "1 hidden" in text
    assert "data.classes (auto): the 2 folders of" in text
    assert "lying      1 say how to turn them, and data.exif_orientation=true does (cat/2.jpg)" in text
    assert "data.range=[0, 4095] makes them bright" in text
    assert "data.max_pixels=200000000" in text
    assert "data.max_bad_fraction=0.417 or more" in text
    assert "  cat/1.jpg = dog/4.jpg" in out
    rows = [*csv.DictReader((tmp_path / "all.csv").open())]
    assert {row["name"] for row in rows if row["finding"] == "unreadable"} == BAD.keys() | LARGE.keys()
    assert [row["name"] for row in rows if row["finding"] == "lying"] == ["cat/2.jpg"]
    copies = {(row["name"], row["detail"]) for row in rows if row["finding"] == "copy"}
    assert copies == {("dog/4.jpg", "train: cat/1.jpg"), ("dog/5.png", "train: cat/3.png")}
    with pytest.raises(UserError, match=r"--list \(.*all.csv\) must be a new file that ends in .csv"):
        main([str(root), "--list", str(tmp_path / "all.csv")])


def test_validation_images_that_are_trained_on_are_said(tmp_path, capsys):
    fill(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "train/b/3.png": 3, "val/b/4.png": 2, "val/a/5.png": 5})
    fill(tmp_path, {"other/c/6.png": 3})
    seen = found(tmp_path, capsys=capsys)
    assert (seen["images"], seen["copies"], seen["groups_across_splits"]) == (5, 1, 1)
    assert [*seen["splits"]] == ["train", "val"]
    out = lines(tmp_path, "--val", str(tmp_path / "other"), capsys=capsys)
    assert "  train: b/3.png = val: c/6.png" in out
    fill(tmp_path, {"odd/a/7.png": 7, "odd/c/8.png": 8})
    out = lines(tmp_path / "train", "--val", str(tmp_path / "odd"), capsys=capsys)
    assert any(line.startswith("a run is refused: validation classes (c) must be among") for line in out)


def test_what_no_file_holds_is_read_too(tmp_path, capsys):
    folder = tmp_path / "mnist/FashionMNIST/raw"
    folder.mkdir(parents=True)
    for kind, count in (("train", 3), ("t10k", 2)):
        head = bytes([0, 0, 8, 3]) + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(head + bytes(28 * 28 * count))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(count)
        )
    seen = found(tmp_path / "mnist", "--dataset", "FashionMNIST", capsys=capsys)
    assert (seen["images"], seen["copies"], seen["groups_across_splits"]) == (5, 4, 1)
    assert seen["splits"]["train"]["kinds"] == {"RGB": 3}
