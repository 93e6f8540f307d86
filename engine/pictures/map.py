"""A flat map of images by their features: points coloured by class, or some of the images themselves.

Features are compared by cosine, as in kNN: every row is scaled to length 1 first.
Shapes: N images, D features.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from torch import Tensor

from engine.errors import UserError
from engine.pictures.canvas import COLOURS, DOTS, HEADER, MARGIN, WIDTH, Sheet, style
from engine.pictures.features import Featured, unit

METHODS = {"pca": "principal components", "tsne": "t-SNE"}
SIDE = 560
THUMBNAIL = 44  # side of an image on the map
LEFT = MARGIN + 18  # of the map
OTHERS = "#c8cdd3"  # classes that are not told apart
LEGEND_ROWS = 18  # classes that are
LEGEND_PITCH = 22
_SMALLEST = 5  # images of which a map says something


class Map(NamedTuple):
    """place_N2: a point for each image; axes: what the two directions are called."""

    place_N2: Tensor
    axes: tuple[str, str]


def show_map(images: Featured, method: str, out: Path) -> None:
    """Draws the images as points, and without classes as many of them as find room. Raises UserError as `flat_map`."""
    places = flat_map(images.feature_ND, method)
    title, subtitle = f"Map of the features: {images.name}", f"{images.number} by {METHODS[method]}"
    draw_map(places, images.label_N.numpy(), images.classes, title, subtitle, out, images.pixels)


def check_method(method: str) -> None:
    """Raises UserError where a method's library is not installed; cheap: for before the features are made."""
    if method == "tsne" and importlib.util.find_spec("sklearn") is None:
        do = "`pip install -e '.[pictures]'` or `pip install scikit-learn`"
        raise UserError(f"--method (tsne) needs scikit-learn, which is not installed; do {do}, or pass --method pca")


def flat_map(feature_ND: Tensor, method: str) -> Map:
    """The images on a plane. Raises UserError for fewer than 5 images or features that are not finite."""
    if len(feature_ND) < _SMALLEST:
        raise UserError(f"--data must hold at least {_SMALLEST} readable images for a map, and has {len(feature_ND)}")
    return (_tsne if method == "tsne" else _pca)(unit(feature_ND))


def _pca(unit_ND: Tensor) -> Map:
    """The two directions of largest variance. The sign of each is free: its largest entry is made positive."""
    centred_ND = unit_ND - unit_ND.mean(0)
    variance_D, direction_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    direction_D2 = direction_DD[:, -2:].flip(1)
    largest_12 = direction_D2.gather(0, direction_D2.abs().argmax(0, keepdim=True))
    share_2 = variance_D.flip(0)[:2] / variance_D.sum().clamp_min(torch.finfo(torch.float64).tiny)
    first, second = (f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(share_2.tolist()))
    return Map(centred_ND @ (direction_D2 * largest_12.sign()), (first, second))


def _tsne(unit_ND: Tensor) -> Map:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(unit_ND) - 1) / 3)  # scikit-learn's default, and what few images bear
    place_N2 = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(unit_ND.numpy())
    return Map(torch.from_numpy(place_N2), ("", ""))


# ---- the drawing -----------------------------------------------------------------------------------------------------


def draw_map(
    places: Map,
    label_N: np.ndarray,
    classes: Sequence[str],
    title: str,
    subtitle: str,
    out: Path,
    pixels: Callable[[Tensor], Tensor],
) -> None:
    """Points on a plane, coloured by class; of many classes the most frequent are told apart.

    pixels: the images of rows, uint8 [N, S, S, 3], which are shown where there are no classes.
    """
    with style():
        sheet = Sheet(HEADER + SIDE + 24 + MARGIN, title, subtitle)
        axes = sheet.axes(LEFT, HEADER, SIDE if classes else WIDTH - MARGIN - LEFT, SIDE)
        axes.set(xticks=[], yticks=[], xlabel=places.axes[0], ylabel=places.axes[1])
        axes.spines[:].set_visible(True)
        place_N2, colour_N3 = places.place_N2.numpy(), np.tile(to_rgb(COLOURS[0]), (len(label_N), 1))
        if classes:
            shown = _most_frequent(label_N)
            colour_N3[:] = to_rgb(OTHERS)
            for label, colour in zip(shown, _distinct(len(shown)), strict=True):
                colour_N3[label_N == label] = colour
            _draw_legend(sheet, LEFT + SIDE + 20, label_N, shown, classes)
        # In a random order, so that no class lies on top of the others.
        order_N = np.random.default_rng(0).permutation(len(label_N))
        axes.scatter(*place_N2[order_N].T, s=14, c=colour_N3[order_N], alpha=0.75, linewidths=0)
        axes.set_aspect("equal", adjustable="datalim")
        if not classes:
            axes.margins(0.06)  # an image at the edge is whole
            axes.apply_aspect()
            _draw_images(sheet, axes.transData.transform(place_N2) / DOTS, pixels)
        sheet.save(out)


def _draw_images(sheet: Sheet, point_N2: np.ndarray, pixels: Callable[[Tensor], Tensor]) -> None:
    """In the place of their points, which are counted from the lower left corner."""
    rows = apart(point_N2, THUMBNAIL)
    for (x, y), image in zip(point_N2[rows], pixels(torch.from_numpy(rows)).numpy(), strict=True):
        sheet.image(x - THUMBNAIL / 2, sheet.height - y - THUMBNAIL / 2, THUMBNAIL, image)


def apart(point_N2: np.ndarray, side: float) -> np.ndarray:
    """Rows of as many points, in a random order, as squares of this side around them do not overlap: int64."""
    kept: list[int] = []
    for row in np.random.default_rng(0).permutation(len(point_N2)):
        if (np.abs(point_N2[kept] - point_N2[row]).max(1) >= side).all():
            kept.append(row)
    return np.array(kept)


def _most_frequent(label_N: np.ndarray) -> np.ndarray:
    """The classes that are told apart, in the order of their labels."""
    labels, counts = np.unique(label_N, return_counts=True)
    return np.sort(labels[np.argsort(-counts, kind="stable")[:LEGEND_ROWS]])


def _distinct(count: int) -> list[tuple[float, float, float]]:
    if count <= 10:
        return list(colormaps["tab10"].colors[:count])
    # Without its greys, which would look like the other classes.
    return [colour for colour in colormaps["tab20"].colors if np.ptp(colour) > 0][:count]


def _draw_legend(sheet: Sheet, x: float, label_N: np.ndarray, shown: np.ndarray, classes: Sequence[str]) -> None:
    rows = [(classes[label], colour) for label, colour in zip(shown, _distinct(len(shown)), strict=True)]
    if others := len(np.unique(label_N)) - len(shown):
        rows.append((f"{others} more", OTHERS))
    for row, (name, colour) in enumerate(rows):
        y = HEADER + 12 + row * LEGEND_PITCH
        sheet.text(x, y, "●", size=15, color=colour)
        sheet.text(x + 18, y, name, width=WIDTH - MARGIN - x - 18)
