"""data.classes: whether the folders of training images are classes, and the one line that says so."""

import itertools

import pytest

from engine.data.splits import open_splits
from engine.errors import UserError
from engine.recipe.sections import PretrainData
from tests.data.images import fill, pack, png

DIRECT = ("cat/1.png", "dog/2.png")
NESTED = ("2019/rome/1.png", "2020/2.png")
STRAY = (*DIRECT, "3.png")
ALONE = ("all/1.png", "all/2.png")


def lay(root, kind, names):
    """Images of these names in a folder, or in a tar of it."""
    if kind == "folder":
        return fill(root, dict.fromkeys(names, 1))
    root.mkdir()
    (root / "a.tar").write_bytes(pack(dict.fromkeys(names, png(1))))
    return root


@pytest.fixture(params=["folder", "shards"])
def classes_of(request, tmp_path, world, capfd):
    """The classes of training images of these names, beside validation images of those, and the lines about them."""
    numbers = itertools.count()

    def found(train, choice="auto", val=None, also=None):
        roots = [lay(tmp_path / f"{next(numbers)}", request.param, names) for names in (train, also, val) if names]
        root = str(roots[0]) if also is None else (str(roots[0]), str(roots[1]))
        data = PretrainData(source=request.param, root=root, val_root=val and str(roots[-1]), workers=0, classes=choice)
        splits = open_splits(data, tmp_path, world, batch=2)
        assert splits.val is None or splits.val.classes == splits.train.classes
        return splits.train.classes, capfd.readouterr().err.splitlines()

    return found


def test_folders_are_classes_where_validation_has_them_or_no_image_lies_deeper(classes_of):
    for val, lead in ((None, DIRECT), (("cat/9.png",), DIRECT), (("2019/8.png", "2020/rome/9.png"), NESTED)):
        classes, lines = classes_of(lead, val=val)
        assert classes == tuple(sorted({name.partition("/")[0] for name in lead}))
        assert len(lines) == (val is None)  # else validation confirms it
        for line in lines:
            assert "the 2 folders of data.root" in line
            assert line.endswith(f"({', '.join(classes)}) are classes; pass data.classes=none if they are not")
    assert classes_of(DIRECT, also=("fox/3.png",))[0] == ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("train", "val", "why"),
    [
        (NESTED, None, "as images lie in folders inside them"),
        (DIRECT, ("old/8.png", "new/9.png"), "as validation has others (new, old)"),
        (DIRECT, ("9.png",), "as validation images have none"),
        (ALONE, None, "as there is one alone"),
    ],
)
def test_else_images_are_unlabelled_and_the_line_says_why_and_what_to_pass(classes_of, train, val, why):
    classes, (line,) = classes_of(train, val=val)
    assert classes is None
    assert line.endswith(f" are no classes, {why}; pass data.classes=folders if they are")
    assert ": unlabelled: the " in line


def test_several_roots_are_nested_where_one_is(classes_of):
    assert classes_of(DIRECT, also=NESTED)[0] is None


def test_what_is_asked_for_is_taken_without_a_word(classes_of):
    assert classes_of(NESTED, "folders") == (("2019", "2020"), [])
    assert classes_of(DIRECT, "none") == (None, [])
    assert classes_of(DIRECT, "none", val=("bird/8.png",)) == (None, [])
    assert classes_of(STRAY) == (None, [])
    classes, (line,) = classes_of(STRAY, "folders")
    assert classes is None
    assert "data.classes (folders): unlabelled, as not all images of data.root (" in line


def test_validation_that_shares_some_classes_alone_is_asked_about(classes_of):
    text = r"validation classes \(fox\) must be among the 2 folders of data.root .*, or pass data.classes=none"
    with pytest.raises(UserError, match=text):
        classes_of(DIRECT, val=("cat/8.png", "fox/9.png"))
