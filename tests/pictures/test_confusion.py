"""Confusion: counts by true class, and a picture for any number of classes that says what they say."""

import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.errors import UserError
from engine.pictures.canvas import DOTS, HEADER, MARGIN, Sheet
from engine.pictures.confusion import NAMES, SIDE, by_class, confusion, confusion_picture


def test_rows_are_true_classes():
    prediction, label = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 1])
    assert confusion(prediction, label, 3).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert by_class(prediction, label, ["a", "b,c", "d", "none"]).splitlines() == [
        "class,images,top1",
        "a,2,0.500000",
        '"b,c",2,0.500000',
        "d,1,1.000000",
        "none,0,",
    ]


@pytest.mark.parametrize("classes", [4, 40, 41, 300, 5000])
def test_squares_are_darker_the_larger_the_share_of_the_row(classes):
    """Whatever the number of classes, the square of (true, predicted) is where it should be, and as dark."""
    label = torch.arange(classes).repeat_interleave(4)
    prediction = label.clone()
    prediction[3::4] = 0  # a quarter of each class is taken for the first
    content = confusion_picture(prediction, label, [f"class {i}" for i in range(classes)])
    grey = np.asarray(Image.open(io.BytesIO(content)).convert("L")).astype(int)
    squares = min(classes, SIDE)
    pitch = DOTS * SIDE // squares
    left, top = ((edge + NAMES * (classes <= 40)) * DOTS for edge in (MARGIN, HEADER))
    corner = np.arange(squares) * pitch  # of a square, where no number stands
    matrix = grey[top + corner][:, left + corner]
    # Where classes are joined, their shares are those of all their images.
    middle, paper = squares // 2, matrix[0, 1]
    assert matrix[middle, middle] < matrix[middle, 0] < paper
    assert (
        matrix == matrix[middle, middle]
    ).sum() == squares - 1  # all of the diagonal but the first, which is all right
    assert matrix[0, 0] < matrix[middle, middle]
    assert (matrix[1:, 0] == matrix[middle, 0]).all()
    off = ~np.eye(squares, dtype=bool)
    assert (matrix[off & (np.arange(squares) > 0)] == paper).all()


def test_names_and_percents_are_written_for_few_classes(monkeypatch):
    label, prediction = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(Sheet, "encoded", lambda sheet, kind: _texts(sheet))
    names = ["a", "b $x$", "a class whose name is far too long for its place"]
    texts = confusion_picture(prediction, label, names)
    assert texts[:2] == [
        "Which classes are taken for which",
        "Rows: true class, in percent of its images; columns: predicted class; 6 images",
    ]
    assert texts[2:6] == ["a", "a", "b $x$", "b $x$"]
    assert all(re.fullmatch(r"a class whose.*…", text) for text in texts[6:8])
    assert texts[8:] == ["67", "33", "100", "100"]


def _texts(sheet: Sheet) -> list[str]:
    return [text.get_text() for text in sheet.figure.texts]


def test_the_table_needs_no_matplotlib(monkeypatch):
    labels = torch.arange(3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "engine.pictures.canvas")
    assert by_class(labels, labels, "abc").endswith("c,1,1.000000\n")
    with pytest.raises(UserError, match="pictures need matplotlib"):
        confusion_picture(labels, labels, "abc")
