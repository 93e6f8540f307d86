import codecs
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.opening import align_labels, guess_kind, open_source
from engine.data.source import Root
from engine.data.splits import open_labelled
from engine.errors import UserError
from tests.data.images import fill, shades

FILES = {"a/1.png": 1, "b/2.png": 2, "b/ü ü.PNG": 3}


def listing(root, text: str | bytes, name: str = "list.txt"):
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return Root("list", root / name)


def opened(root, text: str | bytes, name: str = "list.txt"):
    return open_source(listing(root, text, name), "train")


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path, FILES)


def test_images_are_numbered_as_the_list_has_them(root):
    source = opened(root, f"b/2.png\n{root}/a/1.png\n./b/ü ü.PNG\n")
    assert shades(source) == [2, 1, 3]
    assert [source.name(i) for i in range(3)] == ["b/2.png", f"{root}/a/1.png", "./b/ü ü.PNG"]
    assert (source.labels, source.classes, source.notes) == (None, None, ())
    assert open_source(Root("list", root / "list.txt"), "val") is None
    assert shades(open_source(Root("list", root / "list.txt"), "all")) == [2, 1, 3]


def test_labels_come_after_a_tab_and_numbers_are_in_order(root):
    source = opened(root, "a/1.png\t10\nb/2.png\t9\r\nb/ü ü.PNG\t 010 \n")
    assert (source.labels.tolist(), source.classes) == ([1, 0, 1], ("9", "10"))
    val = opened(root, "b/2.png\t10\n")
    assert align_labels(source, val).labels.tolist() == [1]
    with pytest.raises(UserError, match=r"classes \(10\) must be among the 1 classes"):
        align_labels(opened(root, "b/2.png\t9\n"), val)


def test_what_a_list_has_beside_images_is_said(root):
    text = "a/1.png\ta\n\n \t \nb\nnotes.txt\nb/2.png\tb\ngone.png\ta\na/1.png\ta\n.//a/1.png\ta\nb/ü ü.PNG\t-1\n"
    source = opened(root, codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert shades_or_none(source) == [1, 2, None, 1, 1, 3]
    assert source.labels is None
    assert source.notes == tuple(
        f"data.root ({root}/list.txt): {line}"
        for line in (
            "left out: 1 folders, 1 .txt (line 4: b)",
            "1 of 6 files are not there (line 7: gone.png)",
            "2 lines name an image again, and it counts again",
            "1 of 6 images have no label, so none of them is read",
        )
    )


def test_an_image_is_named_again_by_links_too(root):
    (root / "link.png").symlink_to("a/1.png")
    (root / "hard.png").hardlink_to(root / "a/1.png")
    (root / "c").symlink_to("b")
    source = opened(root, "a/1.png\nlink.png\nhard.png\nc/2.png\nb/2.png\ngone.png\n./gone.png\nlost.png\n")
    assert any(note.endswith("4 lines name an image again, and it counts again") for note in source.notes)


def shades_or_none(source) -> list[int | None]:
    def shade(i: int) -> int | None:
        try:
            return source.read(i).getpixel((0, 0))[0]
        except OSError:
            return None

    return [shade(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there are none"),
        ("a/1.png 3\n", r"a label after a tab; there are none, but 1 other files \(line 1: a/1.png 3\)"),
        ("'a/1.png'\n", r"there are none, but 1 other files \(line 1: 'a/1.png'\)"),
        ("\ta\n", "a path on each line and at most a tab and a label after it; line 1 is"),
        ("a/1.png\n a/1.png\tx\ty\n", r"line 2 is ' a/1.png\\tx\\ty'$"),
        ("gone.png\n../x.png\n", r"none of 2 is, such as line 1: gone.png"),
        ("a/1.png\tcat\na/1.png\tdog\n", r"must give each image one label; a/1.png has cat and dog"),
        ("a/1.png\tcat\na/1.png\n", r"a/1.png has cat and none"),
        ("a/1.png\n".encode("utf-16"), "must be text in UTF-8, a path on each line; line 1 is something else"),
        (b"a/1.png\n\0\n", "line 2 is something else"),
        (b"x" * 200_000, "line 1 is something else"),
    ],
)
def test_a_list_that_is_none_is_one_line(root, text, says):
    with pytest.raises(UserError, match=says) as error:
        opened(root, text)
    assert str(error.value).isprintable()


def test_a_root_of_another_kind_names_the_other(root):
    listing(root, "a/1.png\n")
    for kind, path, other in (("list", root, "folder"), ("folder", root / "list.txt", "list")):
        with pytest.raises(UserError, match=f"pass data.source={other}"):
            open_source(Root(kind, path), "train")
    assert guess_kind(root / "list.txt") == "list"
    assert guess_kind(root / "a/1.png") == "folder"
    with pytest.raises(UserError, match="this is one of them: pass the folder that it lies in"):
        open_source(Root("folder", root / "a/1.png"), "train")
    with pytest.raises(UserError, match=r"must exist; pass data.root="):
        open_source(Root("list", root / "gone.txt"), "train")


def test_bytes_that_are_no_text_name_files_and_classes(tmp_path):
    fill(tmp_path, {os.fsdecode(b"\xff.png"): 7})
    source = opened(tmp_path, b"\xff.png\t\xfe\n")
    assert shades(source) == [7]
    assert source.name(0).isascii()
    assert source.classes[0].isprintable()


def test_a_moved_set_has_the_same_fingerprint_and_another_one_has_not(tmp_path):
    here, there = (fill(tmp_path / name, FILES) for name in ("here", "there"))
    order = ("b/2.png\tx\n", "a/1.png\ty\n")

    def absolute(root, lines=order):
        return opened(tmp_path, "".join(f"{root}/{line}" for line in lines)).fingerprint

    assert absolute(here) == absolute(there) == opened(here, "".join(order)).fingerprint
    others = [order[::-1], order[:1], ("b/2.png\tx\n", "a/1.png\tx\n"), ("b/2.png\n", "a/1.png\n")]
    assert len({absolute(here), *(absolute(here, lines) for lines in others)}) == 5


def test_a_list_without_labels_is_refused_where_they_are_needed(root, world):
    bare, full = listing(root, "a/1.png\n", "bare.txt"), listing(root, "a/1.png\ta\nb/2.png\tb\n", "full.txt")
    assert len(open_labelled(full, full, world).val) == 2
    with pytest.raises(UserError, match=r"must hold labelled images, on each line a label after a tab"):
        open_labelled(full, bare, world)


NAMES = st.sampled_from([*FILES, "gone.png", "b", "a/notes.txt", "x" * 300 + ".png", " a/1.png ", "", "//", "~/1.png"])
LABELS = st.sampled_from(["", "\t", "\tcat", "\t 3", "\t-1", "\tü", "\ta\tb", "\t\x7f"])
LINES = st.lists(st.tuples(NAMES, LABELS, st.sampled_from(["\n", "\r\n", "\n\n"])).map("".join), max_size=6)


def attempt(root, text: bytes) -> tuple:
    """The source, or else why there is none."""
    try:
        return opened(root, text), ""
    except UserError as error:
        return None, str(error)


@settings(max_examples=150)
@given(text=st.one_of(LINES.map(lambda lines: "".join(lines).encode()), st.binary(max_size=40)))
def test_any_list_opens_or_is_refused_in_one_line(tmp_path_factory, text):
    root = fill(tmp_path_factory.mktemp("set"), FILES)
    source, refused = attempt(root, text)
    assert refused.isprintable()
    if source is None:
        return
    shown = shades_or_none(source)
    assert len(shown) == len(source)
    assert any(shown)
    assert all(map(str.isprintable, (*source.notes, *(source.name(i) for i in range(len(source))))))
    assert source.labels is None or source.labels.max() < len(source.classes)
