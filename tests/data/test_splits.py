from dataclasses import replace
from pathlib import Path

import pytest

from engine.data.began import list_of, write_began
from engine.data.source import Root
from engine.data.splits import open_labelled, open_labelled_splits, open_splits, open_unlabelled
from engine.errors import UserError
from engine.recipe.sections import LabelledData, PretrainData
from tests.data.images import fill, pack, png, shades


@pytest.fixture
def data(tmp_path) -> LabelledData:
    fill(tmp_path / "split", {"train/a/1.png": 1, "train/b/2.png": 2, "val/b/3.png": 3})
    fill(tmp_path / "whole", {"a/4.png": 4, "b/5.png": 5})
    fill(tmp_path / "half", {"train/a/6.png": 6, "train/b/7.png": 7})
    root = str(tmp_path / "split")
    return LabelledData(source="folder", root=root, workers=0, max_bad_fraction=0.0, labels=1.0)


def seen(splits) -> tuple:
    return shades(splits.train), None if splits.val is None else shades(splits.val)


def opened(data, world, batch=1, classes="folders"):
    taken = PretrainData(source=data.source, root=data.root, val_root=data.val_root, workers=0, classes=classes)
    return open_splits(taken, Path(), world, batch=batch)


def test_validation_images_are_the_roots_own_or_of_a_root_named_for_them(data, world, tmp_path):
    whole, half = str(tmp_path / "whole"), str(tmp_path / "half")
    cases = {(data.root, None): ([1, 2], [3]), (whole, None): ([4, 5], None), (half, None): ([6, 7], None)}
    cases |= {(data.root, whole): ([1, 2], [4, 5]), (half, data.root): ([6, 7], [3])}
    for (root, val_root), expected in cases.items():
        splits = opened(replace(data, root=root, val_root=val_root), world)
        assert seen(splits) == expected
        assert splits.val is None or splits.val.classes == ("a", "b")
    with pytest.raises(UserError, match=r"data.val_root \(.*half\) must hold val beside train"):
        opened(replace(data, val_root=half), world)
    (tmp_path / "half/train.tar").write_bytes(pack({"a/1.png": png(1)}))
    with pytest.raises(UserError, match=r"data.val_root \(.*half\) must hold val beside train"):
        opened(replace(data, source="shards", root=f"{half}/train.tar", val_root=half), world)


def test_images_say_where_they_were_found(data, world, tmp_path, monkeypatch):
    fill(tmp_path / "here/split", {"train/a/1.png": 1})
    taken = PretrainData(source="folder", root="split", workers=0)
    for folder, there in (("here", "here/split"), ("half", "split")):  # beside the recipe where it is not here
        monkeypatch.chdir(tmp_path / folder)
        train, _ = open_splits(taken, tmp_path / "recipe.yaml", world, batch=1)
        assert train.found_in == str(tmp_path / there)
    both = open_splits(replace(taken, root=("split", "whole")), tmp_path / "recipe.yaml", world, batch=1).train
    assert both.found_in == f"{tmp_path}/split, {tmp_path}/whole"
    some = open_labelled_splits(replace(data, labels=0.5), world, seed=0).train
    write_began(some.whole, list_of(tmp_path, "train"))
    fill(tmp_path / "split", {"train/a/9.png": 9})
    as_before = open_labelled_splits(data, world, seed=0, begun=tmp_path).train
    assert as_before.changes is not None
    assert some.found_in == as_before.found_in == data.root


def test_a_batch_that_the_training_images_do_not_fill_is_refused(data, world):
    assert seen(opened(data, world, batch=2)) == seen(open_labelled_splits(data, world, seed=0, batch=2))
    text = rf"train.global_batch_size \(3\) must be at most the number of images \(2 in {data.root}\)"
    with pytest.raises(UserError, match=text):
        opened(data, world, batch=3)
    with pytest.raises(UserError, match=text):
        open_labelled_splits(data, world, seed=0, batch=3)


def test_labels_are_needed_on_both_sides_and_of_two_classes(data, world, tmp_path, capsys):
    split, whole = (Root("folder", tmp_path / name, "--train") for name in ("split", "whole"))
    flat = Root("folder", fill(tmp_path / "flat", {"1.png": 1}), "--val")
    one = Root("folder", fill(tmp_path / "one", {"a/1.png": 1}), "--train")
    assert seen(open_labelled(split, whole, world)) == ([1, 2], [4, 5])
    assert not capsys.readouterr().err
    assert seen(open_labelled(whole, whole, world)) == ([4, 5], [4, 5])
    warned = "the images of training and validation are the same: the result says nothing of new ones"
    assert warned in capsys.readouterr().err
    for train, val in ((split, flat), (flat, split)):
        with pytest.raises(UserError, match=r"--val \(.*flat\) must hold labelled images, a folder for each class"):
            open_labelled(train, val, world)
    with pytest.raises(UserError, match=r"--train \(.*one\) must hold two classes or more; it has one, a"):
        open_labelled(one, whole, world)
    assert shades(open_unlabelled(flat, world)) == [1]
    assert shades(open_unlabelled(split, world)) == [1, 2]


def test_validation_images_that_are_trained_on_are_said(data, world, tmp_path, capsys):
    root = fill(tmp_path / "all", {"a/1.png": 1, "a/2.png": 2, "b/3.png": 3})
    (tmp_path / "c").mkdir()
    (tmp_path / "c/link.png").symlink_to(root / "a/2.png")
    fill(tmp_path, {"c/own.png": 4})
    (root / "0.tar").write_bytes(pack({"1.png": png(1)}))
    (root / "1.tar").write_bytes(pack({"2.png": png(2)}))
    same, new = "the images of training and validation are the same", ": the result says nothing of new ones"
    cases = [
        ("folder", root, root, same),
        ("folder", root, root / "a", "2 of 2 validation images are training images too"),
        ("folder", root, tmp_path / "c", "1 of 2 validation images are training images too"),
        ("folder", (root, tmp_path / "whole"), tmp_path / "c", "1 of 2 validation images are training images too"),
        ("shards", root, root / "1.tar", "validation images lie in tars that are trained on (1.tar)"),
    ]
    for source, train, val, words in cases:
        paths = str(train) if isinstance(train, Path) else tuple(map(str, train))
        opened(replace(data, source=source, root=paths, val_root=str(val)), world)
        assert words + new in capsys.readouterr().err
    opened(data, world)
    opened(replace(data, val_root=str(tmp_path / "whole")), world)
    assert "new ones" not in capsys.readouterr().err


def test_a_folder_that_is_no_class_leaves_knn_off(data, world, tmp_path, capsys):
    """Unlabelled images in one folder beside labelled ones: pre-training goes on, and says so in one line."""
    fill(tmp_path / "dummy", {"images/8.png": 8, "images/9.png": 9})
    dummy, whole = str(tmp_path / "dummy"), str(tmp_path / "whole")
    for root, val_root in ((dummy, whole), (whole, dummy)):
        splits = opened(replace(data, root=root, val_root=val_root), world)
        assert (splits.val.labels, len(splits.val)) == (None, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert "kNN is off: validation classes (" in line
    other = str(fill(tmp_path / "other", {"c/1.png": 1, "d/2.png": 2}))
    with pytest.raises(UserError, match="must be among the 2 classes of the training data"):
        opened(replace(data, root=whole, val_root=other), world)
    with pytest.raises(UserError, match="must hold two classes or more"):
        open_labelled_splits(replace(data, root=dummy, val_root=whole), world, seed=0)


def test_ranks_that_find_other_images_say_so(data, world, monkeypatch):
    monkeypatch.setattr("engine.data.splits.all_gather", lambda value, group: [value, ("other",)])
    with pytest.raises(UserError, match=r"data.root \(.*split\) must hold the same images on every node; copy them"):
        opened(data, world)
