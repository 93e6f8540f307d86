"""What a run began with is listed; what is not as it was is named, and left where it was."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import began
from engine.data.began import as_begun, changes_in_words, compare, list_of, read_began, write_began
from engine.data.joined import JoinedSource
from engine.data.opening import open_source
from engine.data.source import Root
from engine.data.subset import take_labels
from engine.errors import UserError
from tests.data.images import fill, pack, png, shades

FILES = {f"{name}/{k}.png": 10 * k + (name == "b") for name in "ab" for k in range(4)}


def folder(root, *more):
    return open_source(Root("folder", root, more=more), "train")


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "set", FILES)


@pytest.fixture
def path(root, tmp_path):
    write_began(folder(root), list_of(tmp_path, "train"))
    return list_of(tmp_path, "train")


def enlarge(file):
    file.write_bytes(file.read_bytes() + b"longer")


def test_a_list_holds_what_a_run_began_with(root, path):
    source, found = folder(root), read_began(path)
    assert (found.fingerprint, found.classes, found.names) == (source.fingerprint, ("a", "b"), sorted(FILES))
    assert found.labels_N.tolist() == source.labels.tolist()
    assert found.sizes_N.tolist() == [(root / name).stat().st_size for name in sorted(FILES)]
    assert as_begun(source, path, 0.0) is source


def test_names_sizes_and_classes_of_any_bytes_come_back(tmp_path):
    names = [b"\xff\t1.png", b"new\nline.png", b"slash\\.png", "ü ü.png".encode()]
    root = fill(tmp_path / "set", {f"{os.fsdecode(name)[:2]}x/{os.fsdecode(name)}": 1 for name in names})
    source = folder(root)
    write_began(source, tmp_path / "list")
    found = read_began(tmp_path / "list")
    assert found.names == [source.name(i) for i in range(4)]
    assert found.classes == source.classes
    assert compare(found, source).place_N.tolist() == [0, 1, 2, 3]


def test_what_is_not_as_it_was_is_named(root, path):
    (root / "a/1.png").unlink()
    enlarge(root / "b/0.png")
    enlarge(root / "b/3.png")
    fill(root, {"c/new.png": 1})
    found = read_began(path)
    changes = compare(found, folder(root))
    assert changes.in_words(found) == "1 gone (a/1.png), 2 of another size (b/0.png, b/3.png), 1 new (c/new.png)"
    assert (changes.gone, changes.differ, changes.added) == ([1], [4, 7], ["c/new.png"])
    for name in ("a/0.png", "a/2.png", "a/3.png", "b/1.png"):
        (root / name).unlink()
    changes = compare(found, folder(root))
    assert changes.in_words(found).startswith("5 gone (a/0.png, a/1.png, a/2.png and 2 more), 2 of")


def test_what_is_gone_keeps_its_number_and_what_is_new_has_none(root, path):
    before = folder(root)
    (root / "a/1.png").unlink()
    fill(root, {"a/0.png": 99, "a/00.png": 1})
    source = pickle.loads(pickle.dumps(as_begun(folder(root), path, 0.2)))
    assert (len(source), source.classes) == (8, ("a", "b"))
    assert source.fingerprint == before.fingerprint
    assert source.labels.tolist() == before.labels.tolist()
    assert [source.name(i) for i in range(8)] == [before.name(i) for i in range(8)]
    with pytest.raises(FileNotFoundError, match="gone since the run began"):
        source.read(1)
    still = [0, *range(2, 8)]
    assert [source.read(i).getpixel((0, 0))[0] for i in still] == [99, 20, 30, 1, 11, 21, 31]
    assert take_labels(source, 0.5, 0).fingerprint == take_labels(before, 0.5, 0).fingerprint
    assert take_labels(source, 0.5, 0).changes == source.changes
    assert source.changes == "1 gone (a/1.png), 1 of another size (a/0.png), 1 new (a/00.png)"
    with pytest.raises(
        UserError, match=r"max_bad_fraction \(0.1\) must bear what is gone .*: 1 gone \(a/1.png\).*=0.125 or"
    ):
        as_begun(folder(root), path, 0.1)


def test_a_class_that_is_gone_stays_and_so_do_labels_where_there_are_none_now(root, path):
    for k in range(4):
        (root / f"a/{k}.png").unlink()
    fill(root, {"stray.png": 1})
    source = as_begun(folder(root), path, 0.5)
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [0] * 4 + [1] * 4)


def test_other_labels_are_not_accepted(tmp_path):
    fill(tmp_path, {"1.png": 1, "2.png": 2})
    listing = tmp_path / "set.txt"
    listing.write_text("1.png\tcat\n2.png\tdog\n")
    root = Root("list", listing)
    write_began(open_source(root, "train"), tmp_path / "began")
    listing.write_text("1.png\tdog\n2.png\tdog\n")
    assert changes_in_words(open_source(root, "train"), tmp_path / "began") == "1 of another label (1.png)"
    with pytest.raises(UserError, match=r"must not change labels: 1 images have others .*, such as 1.png"):
        as_begun(open_source(root, "train"), tmp_path / "began", 0.0)


def test_tars_and_roots_keep_images_of_one_name_apart(tmp_path):
    for name in ("1", "2"):
        tar = {f"a/{k}.png": png(k) for k in range(3)}
        (tmp_path / f"{name}.tar").write_bytes(pack(tar))
    shards = Root("shards", tmp_path)
    write_began(open_source(shards, "train"), tmp_path / "tars")
    (tmp_path / "1.tar").write_bytes(pack({"a/1.png": png(1)}))
    found = read_began(tmp_path / "tars")
    assert compare(found, open_source(shards, "train")).in_words(found) == "2 gone (1.tar:a/0.png, 1.tar:a/2.png)"
    assert shades(open_source(shards, "train")) == [1, 0, 1, 2]

    roots = [fill(tmp_path / name, FILES) for name in "xy"]
    write_began(folder(*roots), tmp_path / "roots")
    (roots[1] / "a/1.png").unlink()
    moved = folder(roots[0].rename(tmp_path / "z"), roots[1])
    found = read_began(tmp_path / "roots")
    assert compare(found, moved).in_words(found) == "1 gone (root 2: a/1.png)"


def test_a_list_is_written_once_and_torn_ones_are_told(root, path, tmp_path, capsys, monkeypatch):
    stamp = path.stat().st_mtime_ns
    write_began(folder(root), path)
    assert path.stat().st_mtime_ns == stamp
    whole = path.read_bytes()
    for content in (whole[:-30], b"", b"no zip"):
        path.write_bytes(content)
        assert read_began(path) is None
        assert f"warning: {path} is damaged (" in capsys.readouterr().err
        assert as_begun(folder(root), path, 0.0).changes is None
    path.write_bytes(b"no zip")
    write_began(folder(root), path)
    assert read_began(path) is not None
    write_began(folder(root), tmp_path / "no/list")
    assert "could not be written (No such file or directory): if an image changes" in capsys.readouterr().err


def test_of_very_many_images_the_tar_or_folder_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setattr(began, "MOST", 3)
    fill(tmp_path / "flat", {f"{k}.png": k for k in range(4)})
    for name in "123":
        (tmp_path / f"{name}.tar").write_bytes(pack({f"{k}.png": png(k) for k in range(int(name))}))
    roots = Root("folder", root), Root("folder", tmp_path / "flat"), Root("shards", tmp_path)
    sources = [open_source(root, "train") for root in roots]
    for source in (*sources, JoinedSource(sources)):
        write_began(source, tmp_path / f"{source.fingerprint}.gz")
    lost = [root / "b/1.png", tmp_path / "flat/0.png"]
    for path in lost:
        path.unlink()
    (tmp_path / "2.tar").write_bytes(pack({f"{k}.png": png(100) for k in range(2)}))
    now = [open_source(root, "train") for root in roots]
    words = [f"other images in {name}" for name in ("b", "all", "2.tar")]
    for before, after, said in zip(sources, now, words, strict=True):
        path = tmp_path / f"{before.fingerprint}.gz"
        assert changes_in_words(after, path) == said
        assert as_begun(after, path, 1.0) is after
    path = tmp_path / f"{JoinedSource(sources).fingerprint}.gz"
    assert changes_in_words(JoinedSource(now), path) == "other images in root 1: b, root 2: all, root 3: 2.tar"


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_every_image_has_its_place_however_often_a_name_comes(before, after):
    """Against a search by hand: the k-th image of a name is the k-th of that name."""

    class Listed:
        def files(self):
            return [(str(name), 1) for name in after]

    known = began.Began("", np.ones(len(before), np.int64), [str(name) for name in before], None, None)
    changes = compare(known, Listed())
    for i, name in enumerate(before):
        places = [k for k, other in enumerate(after) if other == name]
        nth = before[:i].count(name)
        assert changes.place_N[i] == (places[nth] if nth < len(places) else -1)
    new = [name for k, name in enumerate(after) if k not in changes.place_N.tolist()]
    assert changes.added == list(map(str, new))
