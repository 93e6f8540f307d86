"""Samples of what images hold."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from engine.data.contents import SAMPLED, UNREADABLE, difference, sample, spread
from engine.data.opening import open_source
from engine.data.source import Root
from engine.data.subset import take_labels
from tests.data.images import pack


@pytest.mark.parametrize("count", [1, 2, SAMPLED, SAMPLED + 1, 1000])
def test_a_sample_is_spread(count):
    chosen = spread(count, SAMPLED)
    assert (len(chosen), chosen[0], chosen[-1]) == (min(count, SAMPLED), 0, count - 1)
    assert all(a < b <= a + -(-count // SAMPLED) + 1 for a, b in itertools.pairwise(chosen))


def open_folder(folder: Path):
    return open_source(Root("folder", folder), "train")


def test_the_first_image_that_holds_something_else_is_named(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    source = open_folder(tmp_path)
    before = sample(source)
    assert list(before) == ["0", "1", "2", "3"]
    assert difference(source, before, sample(source)) is None
    (tmp_path / "b/3.png").write_bytes(b"54321")
    (tmp_path / "b/4.png").write_bytes(b"54321")
    assert source.fingerprint == open_folder(tmp_path).fingerprint
    assert difference(source, before, sample(source)) == "b/3.png holds something else"
    share = take_labels(source, 0.5, seed=0)
    assert sample(share) == {str(i): sample(source)[str(at)] for i, at in enumerate(share._chosen_M)}


def test_an_image_that_cannot_be_read_counts_as_such(tmp_path):
    (tmp_path / "1.png").symlink_to("nowhere.png")
    (tmp_path / "2.png").write_bytes(b"no picture, but it can be read")
    source = open_folder(tmp_path)
    before = sample(source)
    assert [value == UNREADABLE for value in before.values()] == [True, False]
    (tmp_path / "nowhere.png").write_bytes(b"it was away for a moment")
    assert difference(source, before, sample(source)) is None
    (tmp_path / "2.png").unlink()
    assert difference(source, before, sample(source)) == "2.png cannot be read"


def test_nothing_is_asked_of_a_sample_that_was_drawn_otherwise(tmp_path):
    (tmp_path / "1.png").write_bytes(b"1")
    source = open_folder(tmp_path)
    assert difference(source, {"7": "0123", "x": "0"}, sample(source)) is None
    assert difference(source, {"0": "0123"}, sample(source)) == "1.png holds something else"


def test_tars_hold_bytes_and_datasets_pixels(tmp_path):
    (tmp_path / "a.tar").write_bytes(pack({"1.png": b"tar", "2.png": b""}))
    source = open_source(Root("shards", tmp_path), "train")
    assert [source.content(i) for i in range(2)] == [b"tar", b""]
    options = {"size": 2, "image_size": [3, 4, 5]}
    fake = open_source(Root("torchvision", tmp_path, dataset="FakeData", dataset_options=options), "train")
    assert isinstance(fake.read(0), Image.Image)
    assert fake.content(0) == b"(5, 4) " + fake.read(0).tobytes()
    assert sample(fake) == sample(fake)
    assert len(set(sample(fake).values())) == 2
