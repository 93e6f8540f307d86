"""Tars as people have them: joined, with links, of samples with labels and masks."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.labels import by_number
from engine.data.opening import open_source
from engine.data.source import Root
from engine.errors import UserError
from tests.data.images import pack, png, shades


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(tar: Path, data: bytes):
    tar.write_bytes(data)
    return open_source(Root("shards", tar), "train")


def linked(*members: tuple[str, bytes | str, bytes]) -> bytes:
    """A tar of (name, what it holds or links to, kind)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return file.getvalue()


FILE, HARD, SOFT = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE


# ---- joined tars -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    zeros=st.lists(st.sampled_from([0, 1, 2, 20, 2100]), min_size=4, max_size=4),
)
def test_tars_joined_by_cat_are_read_to_their_end(tmp_path_factory, counts, zeros):
    numbers = iter(range(100))
    parts = [{f"{number}.png": png(number) for number in itertools.islice(numbers, count)} for count in counts]
    data = b"".join(pack(part) + bytes(512 * more) for part, more in zip(parts, zeros, strict=False))
    source = opened(tmp_path_factory.mktemp("d") / "x.tar", data)
    assert shades(source) == list(range(sum(counts)))
    assert (source.otherwise is None) == (len(counts) == 1)


def test_what_follows_a_tar_and_is_none_is_refused(tmp_path):
    for junk in (b"junk" * 200, bytes(512) + b"junk" * 200, pack({"2.png": png(2)})[:700]):
        with pytest.raises(UserError, match=r"must be a whole, plain tar; (breaks off )?at byte \d+"):
            opened(tmp_path / "x.tar", pack({"1.png": png(1)}) + junk)


# ---- links -----------------------------------------------------------------------------------------------------------


def test_links_are_the_images_that_they_lead_to(tmp_path):
    source = opened(
        tmp_path / "x.tar",
        linked(
            ("b/soon.png", "../a/1.png", SOFT),
            ("data/blob", png(2), FILE),
            ("a/1.png", png(1), FILE),
            ("b/hard.png", "./data/blob", HARD),
            ("b/again.png", "hard.png", SOFT),
            ("b/gone.png", "nothing.png", SOFT),
            ("b/lost.png", "nowhere/1.png", HARD),
            ("b/loop.png", "loop.png", SOFT),
            ("c", "a", SOFT),
        ),
    )
    assert [source.name(i) for i in range(4)] == [f"x.tar:{n}.png" for n in ("b/soon", "a/1", "b/hard", "b/again")]
    assert shades(source) == [1, 1, 2, 2]
    assert source.classes == ("a", "b")
    assert source.notes[0].endswith("3 links to nothing, 1 other files, 1 links to folders")


def test_a_device_is_no_image_whatever_it_is_called(tmp_path):
    source = opened(tmp_path / "x.tar", linked(("1.png", png(1), FILE), ("2.png", "", tarfile.FIFOTYPE)))
    assert shades(source) == [1]
    assert source.notes[0].endswith("1 pipes or devices")


@pytest.mark.parametrize(("target", "kind"), [("/etc/1.png", SOFT), ("../../1.png", SOFT), ("../1.png", HARD)])
def test_a_link_that_leaves_the_tar_is_refused(tmp_path, target, kind):
    with pytest.raises(UserError, match=rf"a/1.png leads out of it, to {target}; pack it again"):
        opened(tmp_path / "x.tar", linked(("b.png", png(1), FILE), ("a/1.png", target, kind)))


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "contents", "classes"),
    [
        ("cls", [b"10\n", b"9", b"10"], ("9", "10")),
        ("cls.txt", [b"dog", b"cat\n", b"dog"], ("cat", "dog")),
        ("json", [b'{"label": 1}', b'{"label": 0, "class": "x"}', b'{"label": 1.0}'], ("0", "1")),
        ("json", [b'{"class": "dog"}', b'{"class": "cat"}', b'{"class": "dog"}'], ("cat", "dog")),
    ],
)
@pytest.mark.parametrize("other", ["mask.png", "seg.png", "depth.jpg"])
def test_a_sample_is_one_image_and_its_label(tmp_path, suffix, contents, classes, other):
    members = {}
    for number, label in enumerate(contents):
        members |= {f"{number}.{other}": png(99), f"{number}.png": png(number), f"{number}.{suffix}": label}
    source = opened(tmp_path / "x.tar", pack(members))
    assert shades(source) == [0, 1, 2]
    assert (source.classes, source.labels.tolist()) == (classes, [1, 0, 1])
    (note,) = source.notes
    assert note.endswith(f"left out in x.tar: 3 .{other}")
    assert shades(open_source(Root("shards", tmp_path / "x.tar"), "train")) == [0, 1, 2]  # from the saved index
    assert open_source(Root("shards", tmp_path / "x.tar"), "train").otherwise == source.otherwise is not None
    changed = {**members, f"0.{suffix}": contents[1].ljust(len(contents[0]))}
    assert opened(tmp_path / "y.tar", pack(changed)).fingerprint != source.fingerprint


@pytest.mark.parametrize("kind", [HARD, SOFT])
def test_a_label_may_be_a_link(tmp_path, kind):
    images = (("1.png", png(1), FILE), ("2.png", png(2), FILE), ("3.png", png(3), FILE))
    labels = (("1.cls", "2.CLS", kind), ("2.CLS", b"5", FILE), ("3.cls", b"6", FILE))
    source = opened(tmp_path / "x.tar", linked(*images, *labels))
    assert (source.classes, source.labels.tolist()) == (("5", "6"), [0, 0, 1])
    assert source.notes == ()
    source = opened(tmp_path / "y.tar", linked(*images, ("1.cls", "/etc/5.txt", kind), *labels[1:]))
    assert source.notes[0].endswith("1 .cls")
    assert "1 of 3 images have no label beside them" in source.notes[1]


def test_a_sample_that_comes_twice_has_one_label(tmp_path):
    twice = [("1.png", png(1), FILE), ("1.cls", b"3", FILE), ("1.png", png(2), FILE), ("1.cls", b"3", FILE)]
    assert opened(tmp_path / "x.tar", linked(*twice)).labels.tolist() == [0, 0]
    with pytest.raises(UserError, match=r"must have one label in a sample; 1 has 3 and 4; keep one"):
        opened(tmp_path / "x.tar", linked(*twice[:3], ("1.cls", b"4", FILE)))


@pytest.mark.parametrize("names", [["9", "10", "a"], ["8" * 5000, "9" * 5000], ["00", "0", "002", "2", "10"]])
def test_classes_that_are_numbers_are_in_order_however_long_they_are(names):
    classes = [name.encode() for name in names]
    assert by_number(reversed(classes)) == by_number(classes)
    assert [name.lstrip(b"0") for name in by_number(classes)] == [name.lstrip(b"0") for name in classes]


def test_images_of_which_some_have_no_label_are_unlabelled(tmp_path):
    members = {"0.png": png(0), "0.cls": b"3", "1.png": png(1), "1.cls": b"-1", "2.png": png(2), "2.json": b"{}"}
    source = opened(tmp_path / "x.tar", pack(members))
    assert source.labels is None
    assert "2 of 3 images have no label beside them" in source.notes[1]
    assert all(kind in source.notes[0] for kind in ("1 .cls", "1 .json"))


def test_names_with_several_dots_are_images_where_no_plain_one_is_beside_them(tmp_path):
    source = opened(tmp_path / "x.tar", pack({"IMG.2021.png": png(1), "IMG.2022.png": png(2), "a.b/1.png": png(3)}))
    assert shades(source) == [1, 2, 3]
    assert source.notes == ()


@pytest.mark.parametrize("names", [("0.image.png", "0.mask.png"), ("0.jpg", "0.png")])
def test_a_sample_of_several_images_is_not_guessed(tmp_path, names):
    with pytest.raises(UserError, match=r"must have one image in a sample, and one has 0.* give each sample one image"):
        opened(tmp_path / "x.tar", pack({name: png(1) for name in names} | {"0.cls": b"1"}))


def test_a_tar_of_tars_is_named(tmp_path):
    with pytest.raises(UserError, match=r"its tars have none, but 2 \.tar; unpack the tars inside, each a class"):
        opened(tmp_path / "x.tar", pack({"n01.tar": pack({"1.png": png(1)}), "n02.tar": b""}))


@settings(max_examples=60)
@given(st.binary(max_size=60), st.sampled_from(["cls", "cls.txt", "json"]))
def test_any_label_is_read_or_counted(tmp_path_factory, data, suffix):
    source = opened(tmp_path_factory.mktemp("d") / "x.tar", pack({"0.png": png(0), f"0.{suffix}": data}))
    assert shades(source) == [0]
    assert (source.classes is None) == bool(source.survey.left_out)
