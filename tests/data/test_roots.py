"""Roots as people have them: what is trained on, what is left out and said, what is asked."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.data import twice
from engine.data.decode import IMAGE_SUFFIXES
from engine.data.naming import class_of_tar, split_of_tar
from engine.data.opening import guess_kind, open_source
from engine.data.source import Root
from engine.errors import UserError
from tests.data.images import fill, pack, png, shades


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tars(root: Path, **members) -> Path:
    """Tars by name, each of members by shade; a number alone stands for one image without a folder."""
    root.mkdir(exist_ok=True)
    for name, shade_of in members.items():
        inner = shade_of if isinstance(shade_of, dict) else {"1.png": shade_of}
        (root / name).write_bytes(pack({at: png(shade) for at, shade in inner.items()}))
    return root


def opened(kind: str, root: Path, split: str = "train"):
    return open_source(Root(kind, root), split)


def seen(kind: str, root: Path) -> tuple:
    val = opened(kind, root, "val")
    return shades(opened(kind, root)), None if val is None else shades(val)


# ---- splits by name --------------------------------------------------------------------------------------------------

SHARDS = [
    ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
    ("cc3m-train-00000.tar", "cc3m-val-00000.tar"),
    ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
    ("train_0.tar", "val_0.tar"),
    ("train0.tar", "val0.tar"),
    ("dataset.train.tar", "dataset.val.tar"),
    ("ILSVRC2012_img_train.TAR", "ILSVRC2012_img_val.TAR"),
    ("x-Train-000-of-002.tar", "x-Valid-000-of-001.tar"),
    ("PetsTrain.tar", "PetsVal.tar"),
]


@pytest.mark.parametrize("names", SHARDS, ids=lambda names: names[0])
def test_validation_shards_are_not_trained_on(tmp_path, names):
    root = tars(tmp_path / "d", **{names[0]: 1, names[1]: 2, "x-test-0.tar": 3, "more.tar": 4})
    assert seen("shards", root) == ([1], [2])
    assert any("left out beside train and val: more.tar, x-test-0.tar" in note for note in opened("shards", root).notes)
    (root / "more.tar").unlink()
    assert guess_kind(root) == "shards"


@settings(max_examples=60)
@given(
    before=st.sampled_from(["", "cc3m-", "a.b-", "my_set_", "x2-", "Pets"]),
    after=st.sampled_from(["", "-000000", "_0", ".0", "-00000-of-00010", "2017"]),
    suffix=st.sampled_from([".tar", ".TAR", ".tar.gz"]),
)
def test_a_split_is_a_word_of_a_tars_name(before, after, suffix):
    for word, split in {"train": "train", "val": "val", "validation": "val", "test": "test", "extra": None}.items():
        said = word.title() if before == "Pets" else word
        assert split_of_tar(f"{before}{said}{after}{suffix}") == split


@pytest.mark.parametrize("name", ["valley", "restrained", "trainers", "interval-1", "tester", "evaluation"])
def test_a_word_that_holds_another_one_is_none_of_a_split(name):
    assert split_of_tar(f"{name}.tar") is None


def test_train_beside_other_classes_is_a_class(tmp_path):
    root = fill(tmp_path / "d", {"bus/1.png": 1, "car/1.png": 2, "train/1.png": 3, "valley/1.png": 4})
    source = opened("folder", root)
    assert (shades(source), source.classes) == ([1, 2, 3, 4], ("bus", "car", "train", "valley"))
    assert opened("folder", root, "val") is None
    assert len(opened("folder", root, "all")) == 4
    assert any("train is a class" in note and f"data.root={root}/train" in note for note in source.notes)
    root = tars(tmp_path / "t", **{"bus.tar": 1, "car.tar": 2, "bullet-train.tar": 3, "train.tar": 4})
    source = opened("shards", root)
    assert (shades(source), source.classes) == ([3, 1, 2, 4], ("bullet-train", "bus", "car", "train"))


@pytest.mark.parametrize("beside", ["val", "test"])
def test_train_beside_another_split_is_a_split(tmp_path, beside):
    root = fill(tmp_path / "d", {"train/a/1.png": 1, f"{beside}/a/2.png": 2, "bus/1.png": 3, ".x/1.png": 4})
    assert seen("folder", root) == ([1], [2] if beside == "val" else None)
    (note,) = opened("folder", root).notes
    assert "left out beside train" in note
    assert "bus" in note


def test_other_words_for_a_split_count_where_both_are_there(tmp_path):
    root = fill(tmp_path / "d", {"Training/a/1.png": 1, "validation/a/2.png": 2, "test/a/3.png": 3})
    assert seen("folder", root) == ([1], [2])
    root = fill(tmp_path / "f", {"Training/a/1.png": 1, "Training/b/2.png": 2, "Testing/a/3.png": 3})
    assert seen("folder", root) == ([1, 2], None)
    assert opened("folder", root).otherwise == "Training/ (it is the training split)"
    assert "left out beside Training: Testing" in opened("folder", root).notes[0]
    root = fill(tmp_path / "e", {"training/1.png": 1, "running/2.png": 2, "test/1.png": 3})
    assert opened("folder", root).classes == ("running", "test", "training")


@pytest.mark.parametrize("beside", ["val/2.png", "test/2.png", "x.txt"])
def test_images_beside_a_split_that_lie_in_no_folder_are_said(tmp_path, beside):
    root = fill(tmp_path / "d", {"train/1.png": 1, beside: 2})
    assert not any("in no folder" in note for note in opened("folder", root).notes)
    fill(root, {"3.png": 3, "4.PNG": 4, ".5.png": 5, "@eaDir/6.png": 6})
    (note,) = opened("folder", root).notes
    assert note.endswith("2 images in no folder")
    assert len(opened("folder", root)) == 1


def test_what_may_be_a_split_or_a_class_is_asked(tmp_path):
    root = fill(tmp_path / "d", {"train/cat/1.png": 1, "extra/1.png": 2})
    with pytest.raises(UserError, match=rf"split or a class beside extra; .* pass data.root={root}/train, to make it"):
        opened("folder", root)
    (root / "extra/1.png").unlink()  # no images: it can be no class
    assert seen("folder", root) == ([1], None)
    root = tars(tmp_path / "t", **{"x-train-0.tar": 1, "x-train-1.tar": 2, "x-dev-0.tar": 3})
    with pytest.raises(UserError, match=r"x-train-0.tar is of a split or of a class beside x-dev-0.tar; put"):
        opened("shards", root)


# ---- classes by tar --------------------------------------------------------------------------------------------------


def test_tars_without_folders_are_classes_unless_they_are_numbered(tmp_path):
    root = tars(tmp_path / "d", **{"n01440764.tar": 1, "n01443537.tar": 2, "n01440999.tar": {"1.png": 3, "2.png": 4}})
    source = opened("shards", root)
    assert (source.classes, source.labels.tolist()) == (("n01440764", "n01440999", "n01443537"), [0, 1, 1, 2])
    assert "each tar is a class" in source.notes[0]
    numbered = opened("shards", tars(tmp_path / "e", **{f"part-{number:04}.tar": number for number in range(3)}))
    assert numbered.labels is None
    assert "numbered" in numbered.notes[0]
    assert opened("shards", root / "n01440764.tar").labels is None


def test_classes_by_tar_have_the_same_names_in_both_splits(tmp_path):
    names = ("train-cat.tar", "train-dog.tar", "val-cat.tar", "val-dog.tar")
    root = tars(tmp_path / "d", **{name: number for number, name in enumerate(names)})
    assert opened("shards", root).classes == opened("shards", root, "val").classes == ("cat", "dog")
    assert [class_of_tar(name, is_split=True) for name in ("dog_train.tar", "a.b.tar", "train.tar")] == [
        "dog",
        "a.b",
        "train",
    ]


# ---- the kind of source ----------------------------------------------------------------------------------------------


def test_another_kind_of_source_is_named(tmp_path):
    root = tars(tmp_path / "d", **{"a.tar": 1})
    for at in (root, root / "a.tar"):
        with pytest.raises(UserError, match=r"pass data.source=shards$"):
            opened("folder", at)
        with pytest.raises(UserError, match=r"pass --source shards$"):
            open_source(Root("folder", at, "--train"), "train")
    with pytest.raises(UserError, match=r"no \*\.tar; for images in folders pass data.source=folder"):
        opened("shards", fill(tmp_path / "e", {"a/1.png": 1}))
    (tmp_path / "z").mkdir()
    (tmp_path / "z/photos.ZIP").touch()
    with pytest.raises(UserError, match=r"has none, but 1 \.zip; unpack the archives$"):
        opened("folder", tmp_path / "z")
    (tmp_path / "y").mkdir()
    inner = tars(tmp_path / "y/train", **{"a.tar": 1})
    with pytest.raises(UserError, match=rf"has no \*\.tar; pass a folder that does, such as data.root={inner}$"):
        opened("shards", tmp_path / "y")
    (root / "a.parquet").touch()  # a table of captions beside a tar, as downloaders write it
    assert guess_kind(root) == "shards"


# ---- files and folders that are none of the set ----------------------------------------------------------------------


def test_formats_of_the_list_count_and_others_are_counted(tmp_path):
    files = {f"a/{suffix[1:]}{suffix}": 1 for suffix in IMAGE_SUFFIXES} | {"a/X.JFIF": 1, "a/.hidden.png": 1}
    root = fill(tmp_path / "d", files | {"a/1.heic": 1, "a/2.HEIC": 1, "b/3.eps": 1, "notes": 1, "c/a.1234": 1})
    source = opened("folder", root)
    assert len(source) == len(IMAGE_SUFFIXES) + 1
    assert {".ppm", ".pgm", ".jfif", ".jpe", ".avif"} < set(IMAGE_SUFFIXES)
    (note,) = source.notes
    assert "left out in" in note
    assert all(count in note for count in ("2 .heic", "1 .eps", "2 other files", "1 hidden"))
    assert note.endswith("; convert .heic to JPEG where they shall count")
    tar = tmp_path / "x.tar"
    tar.write_bytes(pack({"a/1.ppm": png(1), "a/1.heic": b"", "__MACOSX/a/1.png": b"", "a/._1.ppm": b""}))
    source = opened("shards", tar)
    assert shades(source) == [1]
    assert "1 .heic, 1 in __MACOSX, 1 hidden" in source.notes[0]


SYSTEM = ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found", "#recycle", "@Recycle", "$RECYCLE.BIN", ".@__thumb"]


@pytest.mark.parametrize("name", SYSTEM)
def test_a_systems_own_folders_hold_no_images_of_the_set(tmp_path, name):
    root = fill(tmp_path / "d", {"a/1.png": 1, f"a/{name}/1.png": 2, f"{name}/a/2.png": 3})
    (root / name).chmod(0)
    source = opened("folder", root)
    assert (shades(source), source.classes) == ([1], ("a",))
    assert ("2 hidden" if name.startswith(".") else f"2 {name}") in source.notes[0]
    assert (source.otherwise is None) == name.startswith(".")


def test_a_clean_root_has_nothing_to_say(tmp_path):
    root = fill(tmp_path / "d", {"train/a/1.png": 1, "val/a/2.png": 2})
    assert [opened("folder", root, split).notes for split in ("train", "val")] == [(), ()]
    root = tars(tmp_path / "t", **{"train-0.tar": {"a/1.png": 1}, "val-0.tar": {"a/2.png": 2}})
    sources = [opened("shards", root, split) for split in ("train", "val")]
    assert [(source.notes, source.otherwise) for source in sources] == [((), None)] * 2


@settings(max_examples=40)
@given(names=st.lists(st.text("abtrainvl-.@#0", min_size=1, max_size=9), min_size=1, max_size=6, unique=True))
def test_every_file_is_an_image_or_is_counted(tmp_path_factory, names):
    assume(not any(set(name) <= {"."} for name in names))
    root = fill(tmp_path_factory.mktemp("d"), {"x.png": 1})
    for name in names:
        (root / f"{name}.png").write_bytes(png(1))
        (root / name).write_bytes(b"no image")
    source = opened("folder", root)
    assert len(source) + sum(source.survey.left_out.values()) == 1 + 2 * len(names)


# ---- the same images twice -------------------------------------------------------------------------------------------


def said_again(root: Root) -> list[str]:
    return [note for note in open_source(root, "train").notes if "again" in note]


def test_images_that_links_lead_to_again_are_said(tmp_path, monkeypatch):
    root = fill(tmp_path / "d", {"a/1.png": 1, "a/2.png": 2, "b/3.png": 3, "b/4.png": 4})
    fill(tmp_path / "away", {"5.png": 5})
    (root / "c").symlink_to(tmp_path / "away")
    assert not said_again(Root("folder", root))
    (root / "b/up").symlink_to("..")  # without end, if it were followed
    (root / "b/self").symlink_to("self")
    (root / "e").symlink_to("a")
    (root / "b/5.png").symlink_to("../a/1.png")
    (root / "b/6.png").hardlink_to(root / "b/3.png")
    (root / "b/lost.png").symlink_to("nothing")
    (root / "b/gone.png").symlink_to("nothing")
    for parts in (1 << 24, 3):
        monkeypatch.setattr(twice, "_AT_ONCE", parts)
        (line,) = said_again(Root("folder", root))
        assert f"4 images in {root} are others again, by links, and count again" in line
        assert len(opened("folder", root)) == 11


def test_links_that_multiply_folders_are_refused(tmp_path):
    root = tmp_path / "d"
    for k in range(12):
        fill(root, {f"{k}/1.png": k})
        for other in range(12):
            (root / f"{k}/{other}").symlink_to(root / str(other))
    with pytest.raises(UserError, match=r"must not be reached by more than 100 ways; links"):
        opened("folder", root)


def test_images_that_several_roots_have_in_common_are_said(tmp_path, monkeypatch):
    root = fill(tmp_path / "d", {"a/1.png": 1, "a/2.png": 2, "a/3.png": 3})
    fill(tmp_path / "e", {"4.png": 4})
    (tmp_path / "one.txt").write_text("d/a/1.png\nd/a/1.png\nd/a/2.png\nlost.png\n")
    (root / "two.txt").write_text(f"./a/2.png\n{root}/../d/a/1.png\na/3.png\n../lost.png\n")
    (tmp_path / "e.txt").write_text("e/4.png\n")
    lists = Root("list", tmp_path / "one.txt", more=(root / "two.txt", tmp_path / "e.txt"))
    inside, between = said_again(lists)
    assert inside.endswith("1 lines name an image again, and it counts again")
    assert between.endswith("2 images of one root are another's too, and count again")
    assert not said_again(Root("list", root / "two.txt", more=(tmp_path / "e.txt",)))
    (tmp_path / "e/link").symlink_to(root)
    (line,) = said_again(Root("folder", root, more=(tmp_path / "e",)))
    assert "3 images of one root are another's too" in line


def test_a_tar_that_is_not_all_there_is_said(tmp_path):
    root = tars(tmp_path / "d", **{"a.tar": 1})
    opened("shards", root)
    for name in ("b.tar.part", "c.TAR.aria2", "a.tar.tmp-0123abcd", ".d.tar.part"):
        (root / name).touch()
    assert any(
        note.endswith("left out beside tars: 1 other files, 1 .part, 1 .aria2") for note in opened("shards", root).notes
    )


def test_a_tar_beside_a_link_to_it_is_said(tmp_path):
    root = tars(tmp_path / "d", **{"cat.tar": 1, "dog.tar": 2})
    (root / "cow.tar").symlink_to("cat.tar")
    (root / "emu.tar").hardlink_to(root / "dog.tar")
    (line,) = said_again(Root("shards", root))
    assert line.endswith("a tar again, by a link, and its images count again: cow.tar is cat.tar, emu.tar is dog.tar")


@pytest.mark.parametrize("name", ["secret", "a/secret", "train"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    """Root may read all of them."""
    root = fill(tmp_path / "d", {"a/1.png": 1, f"{name}/2.png": 2})

    def refuse(act, mark):
        def asked(path, *args, **more):
            if not isinstance(path, int) and mark in os.fsencode(path) + b"/":
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return act(path, *args, **more)

        return asked

    secret = os.fsencode(root / name) + b"/"
    monkeypatch.setattr(os, "scandir", refuse(os.scandir, secret))
    monkeypatch.setattr(os, "stat", refuse(os.stat, secret + b"r"))  # a recipe.yaml that may be there
    with pytest.raises(UserError, match=rf"must be readable; {root}/{name}: Permission denied"):
        opened("folder", root)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_that_is_called_a_tar_is_refused_at_once(tmp_path, make):
    make(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"tar \(.*x.tar\) must be a file"):
        opened("shards", tmp_path)


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    root = fill(tmp_path / "d", {"1.png": 1})
    os.mkfifo(root / "2.png")
    (root / "all.lst").write_text("1.png\n2.png\n")
    for kind, place in (("folder", root), ("list", root / "all.lst")):
        source = opened(kind, place)
        assert shades(source) == [1]
        assert any("1 pipes or devices" in note for note in source.notes)
