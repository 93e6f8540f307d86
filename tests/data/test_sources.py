import os
import re
from typing import get_args, get_type_hints

import numpy as np
import pytest

from engine.data.opening import OPENERS, align_labels, open_source
from engine.data.source import Root
from engine.errors import UserError
from engine.recipe.sections import Data
from tests.data.images import fill, pack, png, shades

FILES = {"b/2.png": 2, "a/x/deep.PNG": 3, "a/1.png": 1}


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    source = open_source(Root("folder", fill(tmp_path, FILES)), "train")
    assert [source.name(i) for i in range(3)] == ["a/1.png", "a/x/deep.PNG", "b/2.png"]
    assert shades(source) == [1, 3, 2]
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64
    assert open_source(Root("folder", tmp_path), "val") is None


def test_train_and_val_folders(tmp_path):
    fill(tmp_path, {"train/a/1.png": 1, "val/a/2.png": 2, "val/b/3.png": 3, "test/a/4.png": 4})
    assert shades(open_source(Root("folder", tmp_path), "train")) == [1]
    assert shades(open_source(Root("folder", tmp_path), "val")) == [2, 3]
    assert shades(open_source(Root("folder", tmp_path / "val"), "all")) == [2, 3]
    assert len(open_source(Root("folder", tmp_path), "all")) == 4


def test_train_without_val(tmp_path):
    fill(tmp_path, {"train/a/1.png": 1})
    assert open_source(Root("folder", tmp_path), "val") is None
    assert open_source(Root("folder", tmp_path), "train").classes == ("a",)


def test_val_without_train_is_not_taken_for_training_data(tmp_path):
    fill(tmp_path, {"val/a/1.png": 1})
    with pytest.raises(UserError, match="must hold train beside val"):
        open_source(Root("folder", tmp_path), "train")
    assert len(open_source(Root("folder", tmp_path), "val")) == 1
    (tmp_path / "val.tar").write_bytes(pack({"a/1.png": png(1)}))
    with pytest.raises(UserError, match=r"must hold train beside val"):
        open_source(Root("shards", tmp_path), "train")


def test_images_without_folders_are_unlabelled(tmp_path):
    source = open_source(Root("folder", fill(tmp_path, {"1.png": 1, "a/2.png": 2})), "train")
    assert len(source) == 2
    assert source.labels is None
    assert source.classes is None


def test_hidden_and_other_files_are_left_out(tmp_path):
    fill(tmp_path, {"a/1.png": 1, "a/.2.png": 2, ".git/3.png": 3, "a/._1.png": 4})
    (tmp_path / "a/notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "a/pipe.png")
    assert shades(open_source(Root("folder", tmp_path), "train")) == [1]


def test_links_are_followed_but_not_for_ever(tmp_path):
    fill(tmp_path / "root", {"a/1.png": 1})
    fill(tmp_path / "elsewhere", {"2.png": 2})
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/loop").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "root/b")
    (tmp_path / "root/self").symlink_to(tmp_path / "root/self")
    source = open_source(Root("folder", tmp_path / "root"), "train")
    assert [source.name(i) for i in range(len(source))] == ["a/1.png", "b/2.png"]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tmp_path):
    fill(tmp_path, {"a/1.png": 1})
    (tmp_path / "a/0.png").symlink_to(tmp_path / "gone.png")
    source = open_source(Root("folder", tmp_path), "train")
    assert source.name(0) == "a/0.png"
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_names_that_are_not_text_can_be_read_and_printed_on_one_line(tmp_path):
    fill(tmp_path, {os.fsdecode(b"a\xff\n/\xc3\xbc.png"): 9, "b/ü.png": 8})
    source = open_source(Root("folder", tmp_path), "train")
    assert shades(source) == [9, 8]
    assert source.name(1) == "b/ü.png"
    assert source.name(0).isascii()
    assert source.name(0).isprintable()
    assert source.classes[0].isprintable()


def test_shards_are_read_in_place_one_tar_after_the_other(tmp_path):
    (tmp_path / "train-1.tar").write_bytes(pack({"b/2.png": png(2), "a/1.png": png(1)}))
    (tmp_path / "train-0.tar").write_bytes(pack({"a/3.png": png(3)}))
    (tmp_path / "val.tar").write_bytes(pack({"a/4.png": png(4)}))
    train, val = (open_source(Root("shards", tmp_path), split) for split in ("train", "val"))
    assert shades(train) == [3, 2, 1]
    assert train.classes == ("a", "b")
    assert train.labels.tolist() == [0, 1, 0]
    assert [train.name(i) for i in (0, 1)] == ["train-0.tar:a/3.png", "train-1.tar:b/2.png"]
    assert shades(val) == [4]
    assert shades(open_source(Root("shards", tmp_path), "all")) == [3, 2, 1, 4]


def test_one_tar_as_the_root(tmp_path):
    (tmp_path / "x.tar").write_bytes(pack({"1.png": png(1), "a/2.png": png(2)}))
    source = open_source(Root("shards", tmp_path / "x.tar"), "train")
    assert shades(source) == [1, 2]
    assert source.labels is None
    assert open_source(Root("shards", tmp_path / "x.tar"), "val") is None
    assert shades(open_source(Root("shards", tmp_path / "x.tar"), "all")) == [1, 2]
    assert shades(open_source(Root("shards", tmp_path), "train")) == [1, 2]


def test_a_tar_that_shrank_under_way_is_an_unreadable_image(tmp_path):
    (tmp_path / "x.tar").write_bytes(pack({"a/1.png": png(1)}))
    source = open_source(Root("shards", tmp_path / "x.tar"), "train")
    os.truncate(tmp_path / "x.tar", 520)
    with pytest.raises(OSError, match="the tar was changed"):
        source.read(0)


def test_fingerprints_tell_data_apart_and_nothing_else(tmp_path):
    def folder(at, files):
        return open_source(Root("folder", fill(tmp_path / at, files)), "train").fingerprint

    def shard(at, members):
        (tmp_path / at).write_bytes(pack(members))
        return open_source(Root("shards", tmp_path / at), "train").fingerprint

    here = folder("here", FILES)
    assert here == folder("there", FILES)
    assert here != folder("renamed", {**{k: v for k, v in FILES.items() if k != "b/2.png"}, "c/2.png": 2})
    assert here != folder("fewer", {"b/2.png": 2})
    assert shard("1.tar", {"a/1.png": png(1)}) == shard("2.tar", {"a/1.png": png(1)})
    assert shard("3.tar", {"a/1.png": png(1) + b"longer"}) != shard("1.tar", {"a/1.png": png(1)})


def test_labels_are_matched_by_name(tmp_path):
    train = open_source(Root("folder", fill(tmp_path / "t", {"a/1.png": 1, "b/1.png": 1, "c/1.png": 1})), "all")
    val = open_source(Root("folder", fill(tmp_path / "v", {"b/1.png": 5, "c/1.png": 6})), "all")
    aligned = align_labels(train, val)
    assert aligned.labels.tolist() == [1, 2]
    assert aligned.classes == ("a", "b", "c")
    assert shades(aligned) == [5, 6]
    assert val.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"classes \(a\) must be among the 2 classes of the training data"):
        align_labels(val, train)
    bare = open_source(Root("folder", fill(tmp_path / "u", {"1.png": 1})), "all")
    assert align_labels(train, bare).labels is None
    assert align_labels(bare, val).labels is None


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_missing_data_is_named_with_the_remedy(tmp_path, kind, split):
    with pytest.raises(UserError) as error:
        open_source(Root(kind, tmp_path / "gone", "data.val_root"), split)
    gone = tmp_path / "gone"
    assert str(error.value) == f"data.val_root ({gone}) must exist; pass data.val_root=/path/to/images"


@pytest.mark.parametrize(
    ("kind", "prepare", "text"),
    [
        ("folder", lambda root: None, "must hold images .*has none"),
        ("folder", lambda root: fill(root, {".hidden/1.png": 1}), "must hold images .*has none"),
        ("folder", lambda root: (root.rmdir(), root.write_bytes(b"")), "must be a folder .* pass data.source=list"),
        ("shards", lambda root: None, r"must hold tars of images .*it has no \*\.tar"),
        ("shards", lambda root: (root / "x.tar").write_bytes(pack({"a.txt": b""})), "its tars have none"),
        ("shards", lambda root: (root / "x.tar").mkdir(), "must be a file; it is a folder, a pipe or a device"),
        ("shards", lambda root: (root / "x.tar.gz").write_bytes(b"\x1f\x8b123"), r"not be compressed \(gzip\); unpack"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(tmp_path, kind, prepare, text):
    root = tmp_path / "data"
    root.mkdir()
    prepare(root)
    with pytest.raises(UserError, match=text) as error:
        open_source(Root(kind, root), "train")
    assert "\n" not in str(error.value)


def test_there_is_an_opener_for_each_source_that_a_recipe_may_name():
    assert get_args(get_type_hints(Data)["source"]) == tuple(OPENERS)


def test_a_file_in_the_place_of_a_folder_is_told_what_it_is(tmp_path):
    cases = {
        "a.zip": "unpack the archive, and pass the folder that comes of it",
        "a.JPG": f"this is one of them: pass the folder that it lies in, {tmp_path}",
        "a.csv": "for a text file of paths pass data.source=list",
        "a.tar": "pass data.source=shards",
    }
    for name, do in cases.items():
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"must be a folder of images.*; {re.escape(do)}$"):
            open_source(Root("folder", tmp_path / name), "train")
