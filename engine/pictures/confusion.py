"""Which classes are taken for which: counts, a table by class, and a picture.

Shapes: Q images, C classes.
"""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.pictures.canvas import Sheet

NAMED = 40  # classes up to which each has its name and its numbers in the picture
SIDE = 640  # of the matrix, in pixels
NAMES = 128  # room for names beside it and above it
TEXT = 0.7  # its height over that of a square, up to the usual height
SHADES = "Blues"  # from nothing to all


def confusion(prediction_Q: Tensor, label_Q: Tensor, classes: int) -> Tensor:
    """int64 [C, C]: row by true class, column by predicted class."""
    return torch.bincount(label_Q * classes + prediction_Q, minlength=classes**2).view(classes, classes)


def by_class(prediction_Q: Tensor, label_Q: Tensor, classes: Sequence[str]) -> str:
    """CSV: class, images, top1 (the share of the class's images that are predicted rightly; empty without any)."""
    images_C = torch.bincount(label_Q, minlength=len(classes)).tolist()
    right_C = torch.bincount(label_Q[prediction_Q == label_Q], minlength=len(classes)).tolist()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "images", "top1"])
    for name, images, right in zip(classes, images_C, right_C, strict=True):
        writer.writerow([name, images, f"{right / images:.6f}" if images else ""])
    return text.getvalue()


def confusion_picture(prediction_Q: Tensor, label_Q: Tensor, classes: Sequence[str]) -> bytes:
    """PNG: rows are true classes, columns predicted ones, each row in shares of its images.

    Up to 40 classes are named and numbered; more are joined into as many squares as the picture has room for.
    Raises UserError where matplotlib, an extra, is not installed.
    """
    from engine.pictures.canvas import DOTS, HEADER, MARGIN, Sheet, style

    squares = min(len(classes), SIDE)
    joined = [tensor * squares // len(classes) for tensor in (prediction_Q, label_Q)]
    counts_CC = confusion(*joined, squares).double()
    share_CC = counts_CC / counts_CC.sum(1, keepdim=True).clamp(min=1)
    is_named = squares <= NAMED
    pitch = DOTS * SIDE // squares / DOTS  # whole dots, so that all squares are equal
    left, top = MARGIN + NAMES * is_named, HEADER + NAMES * is_named
    subtitle = f"Rows: true class, in percent of its images; columns: predicted class; {len(label_Q):,} images"
    with style():
        sheet = Sheet(top + pitch * squares + MARGIN, "Which classes are taken for which", subtitle)
        # The square root shows rare confusions too.
        sheet.image(left, top, pitch * squares, share_CC.sqrt().numpy(), cmap=SHADES, vmin=0, vmax=1)
        if is_named:
            _write_names(sheet, classes, left, top, pitch)
            _write_percents(sheet, share_CC, left, top, pitch)
        return sheet.encoded("png")


def _write_names(sheet: "Sheet", names: Sequence[str], left: float, top: float, pitch: float) -> None:
    size, width = min(12, TEXT * pitch), NAMES - 8
    for c, name in enumerate(names):
        middle = pitch * (c + 0.5)
        sheet.text(left - 8, top + middle, name, size=size, width=width, ha="right", va="center")
        sheet.text(left + middle, top - 8, name, size=size, width=width, ha="center", upright=True)


def _write_percents(sheet: "Sheet", share_CC: Tensor, left: float, top: float, pitch: float) -> None:
    percent_CC = (100 * share_CC).round().int()
    for row, column in percent_CC.nonzero().tolist():
        percent = int(percent_CC[row, column])
        x, y = left + pitch * (column + 0.5), top + pitch * (row + 0.5)
        look = {"color": "white"} if percent > 50 else {}
        sheet.text(x, y, str(percent), size=min(12, TEXT * pitch), ha="center", va="center", **look)
