"""Which classes are taken for which: counts, a table by class, and a picture.

Shapes: Q images, C classes.
"""

import csv
import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

NAMED = 40  # classes up to which each has its name and its numbers in the picture
SIDE = 640  # of the matrix, in pixels
INK, PAPER = (36, 41, 47), (255, 255, 255)
LIGHT, DARK = (247, 251, 255), (8, 48, 107)  # from nothing to all


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


def confusion_picture(prediction_Q: Tensor, label_Q: Tensor, classes: Sequence[str]) -> Image.Image:
    """Rows are true classes, columns predicted ones, each row in shares of its images.

    Up to 40 classes are named and numbered; more are joined into as many squares as the picture has room for.
    """
    squares = min(len(classes), SIDE)
    joined = [tensor * squares // len(classes) for tensor in (prediction_Q, label_Q)]
    counts_CC = confusion(*joined, squares).double()
    share_CC = counts_CC / counts_CC.sum(1, keepdim=True).clamp(min=1)
    side = max(SIDE // squares, 1)
    names = [_short(name) for name in classes] if squares <= NAMED and squares == len(classes) else []
    font = ImageFont.load_default(max(9, min(15, side // 3)))
    left = 24 + max((round(font.getlength(name)) for name in names), default=0)
    picture = Image.new("RGB", (left + side * squares + 24, left + side * squares + 24), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, 6), f"rows: true class, columns: predicted class, {len(label_Q):,} images", INK, font)
    _draw_squares(picture, share_CC, (left, left), side)
    for c, name in enumerate(names):
        middle = left + side * c + side // 2
        draw.text((left - 8, middle), name, INK, font, anchor="rm")
        _draw_upright(picture, name, (middle, left - 8), font)
        for p in range(squares):
            percent = round(100 * share_CC[c, p].item())
            if percent:
                ink = PAPER if percent > 50 else INK
                draw.text((left + side * p + side // 2, middle), f"{percent}", ink, font, anchor="mm")
    return picture


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:18]}..."


def _draw_squares(picture: Image.Image, share_CC: Tensor, corner: tuple[int, int], side: int) -> None:
    light, dark = torch.tensor(LIGHT).double(), torch.tensor(DARK).double()
    # The square root shows rare confusions too.
    colour_CC3 = (light + share_CC.sqrt()[..., None] * (dark - light)).round().byte()
    matrix = Image.fromarray(colour_CC3.numpy()).resize(
        (side * len(share_CC), side * len(share_CC)), Image.Resampling.NEAREST
    )
    picture.paste(matrix, corner)


def _draw_upright(picture: Image.Image, text: str, foot: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    """Text that reads upwards, its beginning above `foot`."""
    width, height = round(font.getlength(text)) + 2, round(font.size * 1.5)
    strip = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(strip).text((0, height // 2), text, INK, font, anchor="lm")
    upright = strip.rotate(90, expand=True)
    picture.paste(upright, (foot[0] - height // 2, foot[1] - width))
