"""Images of any source as tars."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine import pack as door
from engine.data import packing
from engine.data.decode import Reading, to_rgb
from engine.data.opening import open_source
from engine.data.packing import Form, Packing
from engine.data.source import Root, Source
from engine.errors import RunFailed, SystemRefused, UserError
from tests.data.images import fill, pack, png, shades

FILES = {"cat/1.png": 1, "cat/a b/2.png": 2, "ape/3.x.png": 3, "ape/3.png": 4, "dog/ü.png": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def packed(source: Source, out: Path, size: int = 3000, short_side: int | None = None, **more: Source) -> Packing:
    said = []
    splits = {"train": source, **more} if more else {"images": source}
    made = Packing(splits, out, Form(size, short_side), 2, lambda items, total, what: items, said.append)
    made.pack()
    made.said = said
    return made


def opened(root: Path, kind: str = "folder", **options) -> Source:
    return open_source(Root(kind, root, **options), "train")


def class_of_each(source: Source) -> list[str] | None:
    return None if source.labels is None else [source.classes[label] for label in source.labels]


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


# ---- any source ------------------------------------------------------------------------------------------------------


def by_class(at: Path) -> Source:
    return opened(fill(at, FILES))


def without_classes(at: Path) -> Source:
    return opened(fill(at, {f"{k}.png": k for k in range(9)}))


def mixed(at: Path) -> Source:
    return opened(fill(at, {"1.png": 1, "a/2.png": 2, "b/3.png": 3}))


def listed(at: Path) -> Source:
    fill(at, {"x/1.png": 1, "x/2.png": 2, "y/1.png": 3})
    (at / "all.txt").write_text("y/1.png\t10\nx/2.png\tpanthera/leo\nx/1.png\t9\n")
    return opened(at / "all.txt", "list")


def listed_without_labels(at: Path) -> Source:
    fill(at, {"x/1.png": 1, "y/2.png": 2})
    (at / "all.txt").write_text("y/2.png\nx/1.png\n")
    return opened(at / "all.txt", "list")


def samples(at: Path) -> Source:
    at.mkdir()
    (at / "0.tar").write_bytes(pack({"1.png": png(1), "1.cls": b"7", "2.png": png(2), "2.cls": b"12"}))
    (at / "1.tar").write_bytes(pack({"1.png": png(3), "1.json": b'{"label": 7}'}))
    return opened(at, "shards")


def tar_for_each_class(at: Path) -> Source:
    at.mkdir()
    for k, name in enumerate("dca"):
        (at / f"{name}.tar").write_bytes(pack({"1.png": png(k), "2.png": png(9)}))
    return opened(at, "shards")


def folders_in_tars(at: Path) -> Source:
    at.mkdir()
    (at / "0.tar").write_bytes(pack({"b/1.png": png(1), "a/2.png": png(2)}))
    (at / "1.tar").write_bytes(pack({"b/1.png": png(3)}))
    return opened(at, "shards")


def several(at: Path) -> Source:
    roots = [fill(at / name, {f"{name}/1.png": 1, "both/1.png": 2}) for name in ("one", "two")]
    return opened(roots[0], more=(roots[1],))


def tables(at: Path) -> Source:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    at.mkdir()
    images = [{"bytes": png(shade), "path": None} for shade in range(1, 5)]
    pq.write_table(pa.table({"image": images, "label": ["b", "10", "9", "b"]}), at / "0.parquet")
    return opened(at, "hf")


def made_up(at: Path) -> Source:
    return opened(at, "torchvision", dataset="FakeData", dataset_options={"size": 12, "image_size": [3, 5, 6]})


EVERY_KIND = [by_class, without_classes, mixed, listed, listed_without_labels, samples, tar_for_each_class]
EVERY_KIND += [folders_in_tars, several, tables, made_up]


@pytest.mark.parametrize("size", [1, 5000, 10**6])
@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.__name__)
def test_images_order_and_labels_stay(tmp_path, kind, size):
    source = kind(tmp_path / "from")
    made = packed(source, tmp_path / "to", size)
    found = opened(tmp_path / "to", "shards")
    assert len(found) == len(source) == sum(tar.images for tar in made.tars)
    for i in range(len(source)):
        assert to_rgb(found.read(i)).tobytes() == to_rgb(source.read(i)).tobytes()
        assert source.file(i) in (None, found.content(i))
    assert class_of_each(found) == class_of_each(source)
    files = tars(tmp_path / "to")
    assert list(files) == [tar.name for tar in made.tars]
    assert [len(data) for data in files.values()] == [tar.bytes for tar in made.tars]
    assert len(files) == {1: len(source), 10**6: 1}.get(size, len(files))
    assert all(len(data) <= size or tar.images == 1 for data, tar in zip(files.values(), made.tars, strict=True))
    assert not made.said
    with tarfile.open(tmp_path / "to" / made.tars[0].name) as tar:  # by another reader
        assert len([name for name in tar.getnames() if not name.endswith(".cls")]) == made.tars[0].images


def test_a_folder_in_tars_is_the_same_set_to_a_run(tmp_path):
    files = {name: shade for name, shade in FILES.items() if name != "ape/3.x.png"}
    source = opened(fill(tmp_path / "from", files))
    packed(source, tmp_path / "to")
    found = opened(tmp_path / "to", "shards")
    assert found.fingerprint == source.fingerprint
    assert found.classes == source.classes
    assert [found.path(i) for i in range(len(found))] == [source.path(i) for i in range(len(source))]


def test_train_and_val_stay_apart(tmp_path):
    fill(tmp_path / "from", {"train/a/1.png": 1, "train/b/2.png": 2, "val/b/3.png": 3})
    roots = Root("folder", tmp_path / "from")
    train, val = (open_source(roots, split) for split in ("train", "val"))
    packed(train, tmp_path / "to", 10**6, val=val)
    assert list(tars(tmp_path / "to")) == ["train-000000.tar", "val-000000.tar"]
    assert shades(opened(tmp_path / "to", "shards")) == [1, 2]
    assert shades(open_source(Root("shards", tmp_path / "to"), "val")) == [3]


def test_classes_that_files_cannot_tell_apart_are_renamed(tmp_path):
    class Named(Source):
        classes = ("crane", "crane", "007", "7", " x", "", "-1", "bus")
        labels = np.arange(8)
        fingerprint = "named"

        def __len__(self) -> int:
            return 8

        def read(self, i: int) -> Image.Image:
            return Image.new("RGB", (2, 2), (i, 0, 0))

        def name(self, i: int) -> str:
            return f"image {i}"

    made = packed(Named(), tmp_path / "to")
    found = opened(tmp_path / "to", "shards")
    names = ["crane", "crane (1)", "7", "7 (3)", "x", "class 5", "class 6", "bus"]
    assert class_of_each(found) == names
    assert made.samples["images"].renamed == [
        *("crane is crane (1)", "007 is 7", "7 is 7 (3)", " x is x", " is class 5", "-1 is class 6")
    ]


# ---- the door --------------------------------------------------------------------------------------------------------


def test_the_door_says_what_was_gained(tmp_path, capsys):
    fill(tmp_path / "from", {"train/a/1.png": 1, "train/b/2.png": 2, "val/b/3.png": 3, "test/4.png": 4})
    arguments = [str(tmp_path / "from"), str(tmp_path / "to"), "--shard-size", "1K", "--workers", "0"]
    for _ in range(2):
        door.main(arguments)
        out, err = capsys.readouterr()
        assert json.loads(out) == {
            "images": 3,
            "shards": 3,
            "bytes": sum(map(len, tars(tmp_path / "to").values())),
            "left_out": 0,
        }
        assert "left out beside train and val: test" in err
        assert re.search(r"train: 2 images in 2 tars of \d+\.\d kB, before 0\.\d kB; decoded in", err)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gone", "to"], r"SOURCE \(gone\) must exist; pass another path"),
        (["empty", "to"], r"SOURCE \(empty\) must hold images .*; empty has none"),
        (["from", "from"], r"OUT \(from\) must be a new or an empty folder; pass another"),
        (
            ["from", "to", "--shard-size", "5 t"],
            r"--shard-size \(5 t\) must be a size such as 512M; .* usual",
        ),
        (["from", "to", "--shard-size", "0"], r"--shard-size \(0\) must be a size such as 512M; .* are usual"),
        (["from", "to", "--short-side", "0"], r"--short-side \(0\) must be >= 1; 256 is usual"),
        (["from"], r"the following arguments are required: OUT; see .*"),
        (["from", "to", "--source", "shards"], r"SOURCE \(from\) must hold tars of images .* pass --source folder"),
        (
            ["from", "to", "--source", "torchvision"],
            r"--dataset \(missing\) must be a class of torchvision.datasets; .*",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "from", FILES)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        door.main(arguments)
    assert re.fullmatch(line, str(error.value))
    assert sorted(tmp_path.rglob("*")) == before


# ---- broken off ------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(broken=st.lists(st.integers(1, 40), max_size=4), size=st.sampled_from([1, 3000, 7000]))
def test_what_is_broken_off_goes_on(tmp_path_factory, broken, size):
    """The tars are those that nothing befell, wherever it was."""
    work = tmp_path_factory.mktemp("d")
    source = opened(fill(work / "from", {f"{'ab'[k % 2]}/{k:02}.png": k for k in range(20)}))
    packed(source, work / "whole", size)
    for steps in broken:
        left = iter(range(steps))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("publish", "open_index", "sync"):
                patch.setattr(packing, name, _until(left, getattr(packing, name)))
            patch.setattr(packing.Samples, "sample", _until(left, packing.Samples.sample))
            try:
                packed(source, work / "to", size)
            except KeyboardInterrupt:
                (work / "to" / "images-000000.tar.tmp-0123abcd").touch()  # what a killed process leaves
    packed(source, work / "to", size)
    assert tars(work / "to") == tars(work / "whole")
    assert not list((work / "to").glob("*.tmp-*"))


def _until(left, function):
    """The function, which is interrupted when nothing is left."""

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    names = {f"{'ab'[k % 2]}/{k:04}.png": k % 200 for k in range(3000)}
    source = opened(fill(tmp_path / "from", names))
    command = [sys.executable, "-m", "engine.pack", "from", "to", "--shard-size", "20K", "--workers", "1"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "to/images-000005.tar").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = tars(tmp_path / "to")
    packed(source, tmp_path / "to", 20 * 1024)
    packed(source, tmp_path / "whole", 20 * 1024)
    whole = tars(tmp_path / "whole")
    assert begun.items() <= whole.items()
    assert len(begun) < len(whole)
    assert tars(tmp_path / "to") == whole


def test_a_tar_that_is_gone_is_made_again_and_a_damaged_one_is_named(tmp_path):
    source = opened(fill(tmp_path / "from", {f"a/{k}.png": k for k in range(9)}))
    packed(source, tmp_path / "to", 3000)
    whole = tars(tmp_path / "to")
    (tmp_path / "to/images-000001.tar").unlink()
    packed(source, tmp_path / "to", 3000)
    assert tars(tmp_path / "to") == whole
    damaged = tmp_path / "to/images-000002.tar"
    damaged.write_bytes(whole[damaged.name].replace(b"IDAT", b"IDAX"))
    with pytest.raises(RunFailed, match=r"images-000002.tar is not what was written; remove it, and the same command"):
        packed(source, tmp_path / "to", 3000)
    damaged.unlink()
    packed(source, tmp_path / "to", 3000)
    assert tars(tmp_path / "to") == whole


def test_another_folder_is_refused(tmp_path, monkeypatch):
    source = opened(fill(tmp_path / "from", {"a/1.png": 1, "b/2.png": 2}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="must be a new or an empty folder; pass another"):
        packed(source, tmp_path / "from")
    with pytest.raises(SystemRefused, match="must be a folder that can be written; File exists"):
        packed(source, tmp_path / "from/a/1.png")
    assert sorted(tmp_path.rglob("*")) == before
    packed(source, tmp_path / "to")
    with pytest.raises(UserError, match="must have been begun with the same images and options; pass another"):
        packed(source, tmp_path / "to", 4000)
    with pytest.raises(UserError, match="must have been begun with the same images and options; pass another"):
        packed(without_classes(tmp_path / "others"), tmp_path / "to")
    (tmp_path / "to/pack.jsonl").write_text("what?\n")
    with pytest.raises(UserError, match=r"pack.jsonl must be as packing left it; pass another OUT"):
        packed(source, tmp_path / "to")
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 1000, raising=False)
    room = r"must have about 2.2 kB free, and has 1.0 kB; pass another, or --short-side 256"
    for folder in ("full", "full/of/others"):
        with pytest.raises(UserError, match=room):
            packed(source, tmp_path / folder)
    assert not (tmp_path / "full").exists()


# ---- what cannot be read, and fewer pixels ---------------------------------------------------------------------------


def test_a_lost_image_may_be_the_one_that_lies_in_no_folder(tmp_path):
    root = fill(tmp_path / "d", {"a/1.png": 1, "b/2.png": 2})
    (root / "gone.png").symlink_to("nowhere")
    source = opened(root)
    packed(source, tmp_path / "out")
    found = open_source(Root("shards", tmp_path / "out"), "train")
    assert (source.labels, class_of_each(found)) == (None, ["a", "b"])


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, monkeypatch):
    fill(tmp_path / "from", {f"{'ab'[k % 2]}/{k}.png": k for k in range(8)})
    for name in ("a/2.png", "b/5.png"):
        (tmp_path / "from" / name).unlink()
        (tmp_path / "from" / name).symlink_to("nowhere")
    (tmp_path / "from/b/3.png").write_bytes(b"no picture")
    made = packed(opened(tmp_path / "from"), tmp_path / "to", 1)
    assert [line.partition(" (")[0] for line in made.said] == ["left out: a/2.png", "left out: b/5.png"]
    found = opened(tmp_path / "to", "shards")
    assert [found.name(i).partition(":")[2] for i in range(len(found))] == [
        *("a/0.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/7.png")
    ]
    assert found.content(4) == b"no picture"  # training reports it as it did
    assert sum(len(tar.lost) for tar in made.tars) == 2
    monkeypatch.setattr(packing, "_LOST_IN_A_ROW", 3)
    for path in (tmp_path / "from/b").iterdir():
        path.unlink()
        path.symlink_to("nowhere")
    with pytest.raises(
        RunFailed, match=r"3 images in a row could not be read: b/5.png \(FileNotFound.*the same command"
    ):
        packed(opened(tmp_path / "from"), tmp_path / "more")


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 200, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), box=(0, 0, 4, 4)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_are_made_smaller(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    deep = Image.fromarray(np.full((90, 80), 40000, np.uint16))
    files = {
        "0.jpg": encoded(photo(100, 80), "JPEG", exif=exif.tobytes()),
        "1.png": encoded(photo(64, 200), "PNG"),
        "2.png": encoded(photo(90, 70, "L"), "PNG"),
        "3.jpg": encoded(photo(50, 32), "JPEG"),
        "4.png": encoded(photo(90, 70, "P"), "PNG"),
        "5.png": encoded(deep, "PNG"),
        "6.png": b"no picture",
        "7.webp": encoded(photo(70, 90, "RGBA"), "WEBP", lossless=True),
        "8.jpg": encoded(photo(3000, 33), "JPEG"),
        "9.jpg": encoded(
            photo(80, 64), "MPO", save_all=True, append_images=[photo(9, 9)]
        ),  # phones add depth, or light
        "a.webp": encoded(photo(70, 90), "WEBP", lossless=True, xmp=b'<a tiff:Orientation="6"/>'),
    }
    (tmp_path / "from").mkdir()
    for name, data in files.items():
        (tmp_path / "from" / name).write_bytes(data)
    source = opened(tmp_path / "from")
    made = packed(source, tmp_path / "to", 10**6, short_side=32)
    found = opened(tmp_path / "to", "shards")
    names = [found.name(i).partition(":")[2] for i in range(11)]
    assert names == [*list(files)[:7], "7.png", "8.jpg", "9.jpg", "a.png"]
    as_they_were = {"3.jpg", "5.png", "6.png"}
    assert {name for i, name in enumerate(names) if found.content(i) == files.get(name)} == as_they_were
    sizes = {0: (40, 32), 1: (32, 100), 2: (41, 32), 4: (41, 32), 7: (32, 41), 8: (2909, 32), 9: (40, 32), 10: (32, 41)}
    for i, size in sizes.items():
        with Image.open(io.BytesIO(found.content(i))) as image:
            assert image.size == size
            assert image.mode == ("L" if i == 2 else "RGB")
            assert image.format == ("JPEG" if names[i].endswith(".jpg") else "PNG")
            assert image.getexif().get(0x0112) == (6 if i in (0, 10) else None)
            whole = to_rgb(source.read(i)).resize(size, Image.Resampling.BICUBIC)
            difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(whole, int))
            assert difference.mean() < (3 if image.format == "JPEG" else 1e-9)
    assert [line.partition(" (")[0] for line in made.said] == ["packed as it is: 5.png", "packed as it is: 6.png"]
    assert sum(tar.as_they_were for tar in made.tars) == 2


@pytest.mark.parametrize("says", ["EXIF", "XMP", "both"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_smaller_image_lies_as_its_file_says(tmp_path, kind, says):
    """And what else EXIF says is kept."""
    (tmp_path / "from").mkdir()
    exif, xmp = Image.Exif(), b'<a tiff:Orientation="6"/>'
    exif[0x010F] = "maker"
    if says == "EXIF":
        exif[0x0112] = 6
    noted = {} if says == "EXIF" else {"xmp": xmp}
    if kind == "PNG" and noted:
        noted = {"pnginfo": PngInfo()}
        noted["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    if kind == "TIFF" and noted:
        noted = {"tiffinfo": {700: xmp, 0x010F: "maker"}}
    elif says != "XMP":
        noted["exif"] = exif
    data = encoded(Image.linear_gradient("L").convert("RGB").resize((80, 64)), kind, **noted)
    (tmp_path / "from/1").with_suffix(f".{kind.lower()}").write_bytes(data)
    source = opened(tmp_path / "from")
    packed(source, tmp_path / "to", short_side=32)
    upright = Reading(exif_orientation=True)
    whole, small = to_rgb(source.read(0), upright), to_rgb(opened(tmp_path / "to", "shards").read(0), upright)
    assert (whole.size, small.size) == ((64, 80), (32, 40))
    difference = np.asarray(whole.resize(small.size), int) - np.asarray(small, int)
    assert np.abs(difference).mean() < 4
    if kind != "TIFF" and says != "XMP":
        file = opened(tmp_path / "to", "shards").content(0)
        assert Image.open(io.BytesIO(file)).getexif()[0x010F] == "maker"
