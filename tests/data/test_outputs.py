"""What is written into a folder of images is told from them, or refused."""

import pytest

from engine.data.opening import open_source
from engine.data.outputs import check_picture, check_run_directory
from engine.data.source import Root
from engine.errors import UserError
from tests.data.images import fill, pack, png, shades


def opened(root):
    return open_source(Root("folder", root), "train")


def make_run(path, *files: str):
    fill(path, {"confusion.png": 9, "own/map.png": 9})
    for name in ("recipe.yaml", *files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()


@pytest.mark.parametrize("place", ["run", "cat/run", "runs/of/mine", "train"])
@pytest.mark.parametrize("mark", ["metrics.jsonl", "checkpoints/latest"])
def test_a_folder_that_holds_a_run_is_left_out_and_said(tmp_path, place, mark):
    before = opened(fill(tmp_path, {"cat/1.png": 1, "dog/2.png": 2}))
    make_run(tmp_path / place, mark)
    after = opened(tmp_path)
    assert (after.fingerprint, after.classes) == (before.fingerprint, ("cat", "dog"))
    assert after.notes == (f"data.root ({tmp_path}): left out in {tmp_path}: 1 folders that hold a run",)
    assert after.otherwise == f"{place} (a folder that holds a run holds no images of the set)"


def test_a_run_beside_train_is_no_class(tmp_path):
    fill(tmp_path, {"train/cat/1.png": 1, "train/dog/2.png": 2})
    make_run(tmp_path / "run", "metrics.jsonl")
    assert opened(tmp_path).classes == ("cat", "dog")


def test_a_recipe_among_images_is_no_run_and_neither_is_a_set_that_is_named(tmp_path):
    fill(tmp_path, {"a/1.png": 1})
    (tmp_path / "a/recipe.yaml").touch()
    assert shades(opened(tmp_path)) == [1]
    (tmp_path / "a/metrics.jsonl").touch()
    assert shades(opened(tmp_path / "a")) == [1]


def test_a_new_run_among_images_needs_a_folder_of_its_own(tmp_path):
    source = opened(fill(tmp_path / "set", {"a/x/1.png": 1, "b/2.png": 2}))
    (tmp_path / "set/empty").mkdir()
    (tmp_path / "link").symlink_to("set")
    for fits in ("elsewhere", "set/run", "set/a/run", "set/empty", "."):
        check_run_directory(tmp_path / fits, (source, None))
    for wrong in ("set", "set/a", "set/a/x", "link/b", "set/../set"):
        with pytest.raises(UserError, match=r"^run.dir \(.*\) must be a folder of its own, .*; pass another, such as"):
            check_run_directory(tmp_path / wrong, (None, source))


def test_a_picture_does_not_become_an_image_of_what_it_shows(tmp_path):
    source = opened(fill(tmp_path / "set", {"a/1.png": 1, "b/2.png": 2}))
    make_run(tmp_path / "set/run", "metrics.jsonl")
    for fits in ("x.png", "set/x.pdf", "set/run/x.png", "set/run/own/x.png", "set/.x/x.png", "set/.x.png"):
        check_picture(tmp_path / fits, source)
    for wrong in ("set/x.png", "set/a/1.png", "set/new/x.PNG"):
        with pytest.raises(UserError, match=rf"^OUT \(.*\) must not become an image of {tmp_path}/set; pass a place"):
            check_picture(tmp_path / wrong, source)
    tar = tmp_path / "x.tar"
    tar.write_bytes(pack({"a/1.png": png(1)}))
    check_picture(tmp_path / "x.png", open_source(Root("shards", tmp_path), "train"))
