"""Several roots of one kind as one source."""

from dataclasses import replace

import pytest

from engine.data.opening import open_source
from engine.data.source import Root
from engine.data.splits import open_splits
from engine.errors import UserError
from engine.recipe.sections import PretrainData
from tests.data.images import fill, pack, png, shades


@pytest.fixture
def roots(tmp_path):
    a = fill(tmp_path / "a", {"train/cat/1.png": 1, "train/dog/2.png": 2, "val/dog/3.png": 3})
    b = fill(tmp_path / "b", {"ant/4.png": 4, "dog/5.png": 5})
    return a, b


def joined(kind: str, *paths, split="train"):
    first, *more = paths
    return open_source(Root(kind, first, more=tuple(more)), split)


def test_roots_follow_each_other_and_classes_are_one_by_name(roots):
    source = joined("folder", *roots)
    assert shades(source) == [1, 2, 4, 5]
    assert [source.classes[label] for label in source.labels] == ["cat", "dog", "ant", "dog"]
    a, b = roots
    assert [source.name(i) for i in (0, 3)] == [f"{a}:cat/1.png", f"{b}:dog/5.png"]
    assert source.content(3) == (b / "dog/5.png").read_bytes()
    assert shades(joined("folder", *roots, split="val")) == [3]
    assert joined("folder", b, fill(b.with_name("c"), {"6.png": 6}), split="val") is None


def test_every_kind_can_have_several_roots(tmp_path, roots):
    (tmp_path / "1.tar").write_bytes(pack({"a/1.png": png(1)}))
    (tmp_path / "2.tar").write_bytes(pack({"b/2.png": png(2), "a/3.png": png(3)}))
    (tmp_path / "1.txt").write_text("a/val/dog/3.png\tx\n")
    (tmp_path / "2.txt").write_text("b/ant/4.png\ty\n")
    shards, lists = joined("shards", tmp_path / "1.tar", tmp_path / "2.tar"), joined("list", *tmp_path.glob("?.txt"))
    assert (shades(shards), shards.labels.tolist(), shards.classes) == ([1, 2, 3], [0, 1, 0], ("a", "b"))
    assert sorted(shades(lists)) == [3, 4]


def test_a_fingerprint_is_of_all_roots_wherever_they_are(roots, tmp_path):
    a, b = roots
    fingerprint = joined("folder", a, b).fingerprint
    alone = {joined("folder", root).fingerprint for root in roots}
    assert len({fingerprint, joined("folder", b, a).fingerprint, *alone}) == 4
    a, b = a.rename(tmp_path / "moved"), b.rename(tmp_path / "too")
    assert joined("folder", a, b).fingerprint == fingerprint


def test_what_does_not_fit_is_said_of_its_root(roots, tmp_path):
    a, b = roots
    (b / "notes.txt").touch()
    bare = fill(tmp_path / "bare", {"6.png": 6})
    source = joined("folder", a, b, bare)
    assert (source.labels, shades(source)[-1]) == (None, 6)
    left_out, unlabelled = source.notes
    assert left_out == f"data.root ({b}): left out in {b}: 1 .txt"
    assert unlabelled == f"data.root ({a}, {b}, {bare}): the images of {bare} have no labels, so none of them is read"
    with pytest.raises(UserError, match=r"must name each root once; leave out what comes again"):
        joined("folder", a, b, tmp_path / "b/../a")
    (tmp_path / "link").symlink_to(b)
    fill(tmp_path / "b/.hidden", {"7.png": 7})
    assert len(joined("folder", b, tmp_path / "b/.hidden")) == len(joined("folder", b)) + 1
    for outer, inner in ((a, a / "train"), (tmp_path, b), (a.parent, tmp_path / "link")):
        for paths in ((outer, inner), (inner, outer)):
            with pytest.raises(UserError, match=r"must hold each image once; .* has some that .* has: leave"):
                joined("folder", *paths)
    (tmp_path / "tars").mkdir()
    for k in range(2):
        (tmp_path / f"tars/{k}.tar").write_bytes(pack({f"{k}.png": png(k)}))
    assert shades(joined("shards", tmp_path / "tars/1.tar", tmp_path / "tars/0.tar")) == [1, 0]
    with pytest.raises(UserError, match=r"each image once; .*/1.tar has some that .*/tars has: leave out one root"):
        joined("shards", tmp_path / "tars", tmp_path / "tars/1.tar")
    with pytest.raises(UserError, match=rf"data.root \({tmp_path}/gone\) must exist"):
        joined("folder", a, tmp_path / "gone")


def test_splits_of_several_roots(roots, tmp_path, world):
    a, b = map(str, roots)
    data = PretrainData(source="folder", root=(a, b), workers=0)
    train, val = open_splits(data, tmp_path, world, batch=4)
    assert (shades(train), shades(val), val.labels.tolist()) == ([1, 2, 4, 5], [3], [1])
    # Of validation roots each gives its val images, or else all.
    both = replace(data, val_root=(a, b))
    assert shades(open_splits(both, tmp_path, world, batch=4).val) == [3, 4, 5]
    with pytest.raises(UserError, match=rf"must be at most the number of images \(4 in {a}, {b}\)"):
        open_splits(data, tmp_path, world, batch=5)
