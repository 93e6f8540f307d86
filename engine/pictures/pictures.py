"""The pictures of `engine.show`, drawn from what is already computed.

Shapes: N images or points, Q queries, K neighbours, H heads, R rows and C columns of patches, S side of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from engine.pictures.canvas import COLOURS, FAINT, HEADER, INK, MARGIN, RIGHT, WIDTH, WRONG, Sheet, style
from engine.pictures.geometry import Map

GAP = 6
VIEW_COLOURS = COLOURS[:2]
HEAT = "inferno"
OTHERS = "#c8cdd3"  # classes that a map does not tell apart
LEGEND_ROWS = 18  # classes that a map tells apart


class Sample(NamedTuple):
    """An image, where its two views were cut out ((top, left, height, width) in its pixels), and the views.

    image uint8 [height, width, 3]; views: two of float [S, S, 3] in 0..1.
    """

    image: np.ndarray
    boxes: Sequence[tuple[int, int, int, int]]
    views: Sequence[np.ndarray]


def draw_views(samples: Sequence[Sample], title: str, subtitle: str, out: Path) -> None:
    """A column per image: the image with both crops outlined, and under it what becomes of them."""
    columns, label = 6, 62
    side = (WIDTH - 2 * MARGIN - label - (columns - 1) * GAP) // columns
    with style():
        sheet = Sheet(HEADER + 3 * (side + GAP) + MARGIN - GAP, title, subtitle)
        names = ("image", "view 1", "view 2")
        for row, (name, colour) in enumerate(zip(names, (INK, *VIEW_COLOURS), strict=True)):
            y = HEADER + row * (side + GAP)
            sheet.text(MARGIN, y + side / 2, name, size=13, weight="bold", color=colour, va="center")
            for column, sample in enumerate(samples):
                x = MARGIN + label + column * (side + GAP)
                if row:
                    sheet.image(x, y, side, sample.views[row - 1])
                else:
                    _outlined(sheet, x, y, side, sample)
        sheet.save(out)


def _outlined(sheet: Sheet, x: float, y: float, side: float, sample: Sample) -> None:
    axes = sheet.image(x, y, side, sample.image)
    for (top, left, height, width), colour in zip(sample.boxes, VIEW_COLOURS, strict=True):
        # The centre of the first pixel is at 0.
        across, down = np.array([0, width, width, 0, 0]) + left - 0.5, np.array([0, 0, height, height, 0]) + top - 0.5
        axes.plot(across, down, color=colour, linewidth=1.5, clip_on=False)


def draw_attention(image_SS3: np.ndarray, attention_HRC: np.ndarray, title: str, subtitle: str, out: Path) -> None:
    """The image, the mean over heads laid over it, and every head."""
    heads = len(attention_HRC)
    rows = max(1, round(heads**0.5))
    columns = -(-heads // rows)
    # Two large squares as high as the rows of small ones fill the width; under each stands a line of text.
    line = 20
    small = (WIDTH - 2 * MARGIN - 4 * GAP - (columns - 1) * GAP - 2 * (rows - 1) * (GAP + line)) / (2 * rows + columns)
    large = rows * small + (rows - 1) * (GAP + line)
    with style():
        sheet = Sheet(HEADER + large + line + MARGIN, title, subtitle)
        sheet.image(MARGIN, HEADER, large, image_SS3)
        sheet.text(MARGIN, HEADER + large + 15, "image", color=FAINT)
        x = MARGIN + large + 2 * GAP
        sheet.image(x, HEADER, large, _heated(image_SS3, attention_HRC.mean(0)))
        sheet.text(x, HEADER + large + 15, "mean over heads", color=FAINT)
        x += large + 2 * GAP
        for head, weight_RC in enumerate(attention_HRC):
            row, column = divmod(head, columns)
            left, top = x + column * (small + GAP), HEADER + row * (small + GAP + line)
            sheet.image(left, top, small, weight_RC, cmap=HEAT, vmin=0)
            sheet.text(left, top + small + 15, f"head {head + 1}", color=FAINT)
        sheet.save(out)


def _heated(image_SS3: np.ndarray, weight_RC: np.ndarray) -> np.ndarray:
    """The image in grey, coloured by how large the weights are."""
    side = len(image_SS3)
    row_S, column_S = (np.arange(side) * patches // side for patches in weight_RC.shape)
    heat_SS3 = colormaps[HEAT](weight_RC / max(weight_RC.max(), np.finfo(float).tiny))[row_S][:, column_S, :3]
    grey_SS1 = image_SS3.mean(axis=2, keepdims=True) / 255
    return 0.4 * grey_SS1 + 0.6 * heat_SS3


class Gallery(NamedTuple):
    """A row per query: itself, then its K neighbours, the nearest first.

    image_QKSS3 uint8 [Q, 1 + K, S, S, 3]; label_QK [Q, 1 + K]; classes: names by label, empty without labels.
    """

    image_QKSS3: np.ndarray
    label_QK: np.ndarray
    classes: Sequence[str]


def draw_neighbours(gallery: Gallery, title: str, subtitle: str, out: Path) -> None:
    """The gallery, with a frame around each neighbour that tells whether it is of the query's class."""
    queries, columns = gallery.label_QK.shape
    apart, line = 20, 18 if gallery.classes else 0
    side = min(160, (WIDTH - 2 * MARGIN - apart - (columns - 1) * GAP) / columns)
    pitch, top = side + line + GAP + 4, HEADER + 20
    with style():
        sheet = Sheet(top + queries * pitch + MARGIN - GAP, title, subtitle)
        sheet.text(MARGIN, HEADER + 12, "query", weight="bold")
        sheet.text(MARGIN + apart + side + GAP, HEADER + 12, "its neighbours, the nearest first", weight="bold")
        if gallery.classes:
            _frames_explained(sheet, gallery.label_QK)
        for row, column in np.ndindex(queries, columns):
            x, y = MARGIN + apart * (column > 0) + column * (side + GAP), top + row * pitch
            label, frame = gallery.label_QK[row, column], None
            if gallery.classes:
                if column:
                    frame = RIGHT if label == gallery.label_QK[row, 0] else WRONG
                sheet.text(x, y + side + 15, gallery.classes[label], size=11, width=side, color=frame or INK)
            sheet.image(x, y, side, gallery.image_QKSS3[row, column], frame=frame)
        sheet.save(out)


def _frames_explained(sheet: Sheet, label_QK: np.ndarray) -> None:
    same = (label_QK[:, 1:] == label_QK[:, :1]).sum()
    total = label_QK[:, 1:].size
    right = WIDTH - MARGIN
    sheet.text(right, HEADER + 12, f"{total - same} of another class", color=WRONG, weight="bold", ha="right")
    sheet.text(right - 140, HEADER + 12, f"{same} of the same class", color=RIGHT, weight="bold", ha="right")


def draw_map(places: Map, label_N: np.ndarray, classes: Sequence[str], title: str, subtitle: str, out: Path) -> None:
    """Points on a plane, coloured by class; of many classes the most frequent are told apart."""
    side = 560
    with style():
        sheet = Sheet(HEADER + side + 24 + MARGIN, title, subtitle)
        axes = sheet.axes(MARGIN + 18, HEADER, side, side)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(places.axes[0])
        axes.set_ylabel(places.axes[1])
        axes.spines[:].set_visible(True)
        place_N2, colour_N3 = places.place_N2.numpy(), np.tile(to_rgb(COLOURS[0]), (len(label_N), 1))
        if classes:
            shown = _most_frequent(label_N)
            colour_N3[:] = to_rgb(OTHERS)
            for label, colour in zip(shown, _distinct(len(shown)), strict=True):
                colour_N3[label_N == label] = colour
            _legend(sheet, MARGIN + 18 + side + 20, label_N, shown, classes)
        # In a random order, so that no class lies on top of the others.
        order_N = np.random.default_rng(0).permutation(len(label_N))
        axes.scatter(*place_N2[order_N].T, s=14, c=colour_N3[order_N], alpha=0.75, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        sheet.save(out)


def _most_frequent(label_N: np.ndarray) -> np.ndarray:
    """The classes that are told apart, in the order of their labels."""
    labels, counts = np.unique(label_N, return_counts=True)
    return np.sort(labels[np.argsort(-counts, kind="stable")[:LEGEND_ROWS]])


def _distinct(count: int) -> list[tuple[float, float, float]]:
    if count <= 10:
        return list(colormaps["tab10"].colors[:count])
    # Without its greys, which would look like the other classes.
    return [colour for colour in colormaps["tab20"].colors if np.ptp(colour) > 0][:count]


def _legend(sheet: Sheet, x: float, label_N: np.ndarray, shown: np.ndarray, classes: Sequence[str]) -> None:
    pitch = 22
    for row, (label, colour) in enumerate(zip(shown, _distinct(len(shown)), strict=True)):
        y = HEADER + 12 + row * pitch
        sheet.text(x, y, "●", size=15, color=colour)
        sheet.text(x + 18, y, classes[label], width=WIDTH - MARGIN - x - 18)
    others = len(np.unique(label_N)) - len(shown)
    if others:
        y = HEADER + 12 + len(shown) * pitch
        sheet.text(x, y, "●", size=15, color=OTHERS)
        sheet.text(x + 18, y, f"{others} more")
