"""Images beside those whose features are nearest to theirs, by cosine as in kNN.

Shapes: N images, Q queries, K neighbours, D features, S side of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.pictures.canvas import HEADER, INK, MARGIN, RIGHT, WIDTH, WRONG, Sheet, style
from engine.pictures.features import Featured, unit

GAP = 6
APART = 20  # between a query and its neighbours
LARGEST = 160  # side of an image
NAME = 18  # below an image
UNKNOWN = -1  # the label of an image of no source


class Gallery(NamedTuple):
    """A row per query: itself, then its K neighbours, the nearest first.

    image_QKSS3 uint8 [Q, 1 + K, S, S, 3]; label_QK [Q, 1 + K], where a query's is UNKNOWN, or all are; captions: of the
    images, row by row; possible: how many neighbours of the queries' own classes there could be at most.
    """

    image_QKSS3: np.ndarray
    label_QK: np.ndarray
    captions: Sequence[str]
    possible: int = 0


def show_neighbours(images: Featured, queries: int, k: int, out: Path) -> None:
    """Draws `queries` images with their k nearest. Raises UserError where the images are too few."""
    query_Q = spread(images.label_N, queries)
    row_QK = torch.cat((query_Q[:, None], nearest(images.feature_ND, query_Q, k)), dim=1)
    pixels_QKSS3 = images.pixels(row_QK.flatten()).unflatten(0, row_QK.shape)
    label_QK = images.label_N[row_QK].numpy()
    captions = [images.caption(row) for row in row_QK.flatten().tolist()]
    gallery = Gallery(pixels_QKSS3.numpy(), label_QK, captions, possible(images.label_N, query_Q, k))
    draw_neighbours(gallery, f"Nearest neighbours: {images.name}", f"By cosine, among {images.number}", out)


def show_query(images: Featured, query: Path, k: int, out: Path) -> None:
    """Draws the k images nearest to an image of another file. Raises UserError where it cannot be read, or there are no
    k images."""
    image_SS3, feature_D = images.of_file("--query", query)
    feature_ND = torch.cat((images.feature_ND, feature_D[None]))
    (row_K,) = nearest(feature_ND, torch.tensor([len(feature_ND) - 1]), k)
    pixels_KSS3 = torch.cat((image_SS3[None], images.pixels(row_K)))
    label_K = torch.cat((torch.tensor([UNKNOWN]), images.label_N[row_K]))
    captions = [query.name, *(images.caption(row) for row in row_K.tolist())]
    gallery = Gallery(pixels_KSS3[None].numpy(), label_K[None].numpy(), captions)
    draw_neighbours(gallery, f"Nearest to {query.name}: {images.name}", f"By cosine, among {images.number}", out)


def spread(label_N: Tensor, count: int) -> Tensor:
    """Rows of `count` images, evenly spread over the classes: int64 [Q]. Raises UserError where there are fewer."""
    if count > len(label_N):
        raise UserError(f"--queries ({count}) must be at most {len(label_N)}, the number of images; lower it")
    middle_Q = (torch.arange(count) * 2 + 1) * len(label_N) // (2 * count)
    return label_N.argsort(stable=True)[middle_Q]


def possible(label_N: Tensor, query_Q: Tensor, k: int) -> int:
    """How many of the k neighbours of each query, added up, can be of its class, of which there may be fewer others."""
    return int((label_N == label_N[query_Q, None]).sum(1).sub(1).clamp_max(k).sum())


def nearest(feature_ND: Tensor, query_Q: Tensor, k: int) -> Tensor:
    """The k images nearest to each query image, nearest first, without itself: int64 [Q, K].

    query_Q: the queries' rows. Raises UserError where there are no k others, or features that are not finite.
    """
    if k > len(feature_ND) - 1:
        raise UserError(f"--k ({k}) must be at most {len(feature_ND) - 1}, the number of other images; lower it")
    unit_ND = unit(feature_ND)
    similarity_QN = unit_ND[query_Q] @ unit_ND.T
    similarity_QN[torch.arange(len(query_Q)), query_Q] = -torch.inf
    return similarity_QN.topk(k, dim=1).indices


def draw_neighbours(gallery: Gallery, title: str, subtitle: str, out: Path) -> None:
    """The gallery, with a frame around each neighbour that tells whether it is of the query's class."""
    queries, columns = gallery.label_QK.shape
    side = min(LARGEST, (WIDTH - 2 * MARGIN - APART - (columns - 1) * GAP) / columns)
    pitch, top = side + NAME + GAP + 4, HEADER + 20
    with style():
        sheet = Sheet(top + queries * pitch + MARGIN - GAP, title, subtitle)
        sheet.text(MARGIN, HEADER + 12, "query", weight="bold")
        sheet.text(MARGIN + APART + side + GAP, HEADER + 12, "its neighbours, the nearest first", weight="bold")
        knows = bool((gallery.label_QK[:, 0] != UNKNOWN).all())
        if knows:
            _explain_frames(sheet, gallery)
        for row, column in np.ndindex(queries, columns):
            x, y = MARGIN + APART * (column > 0) + column * (side + GAP), top + row * pitch
            frame = None
            if column and knows:
                frame = RIGHT if gallery.label_QK[row, column] == gallery.label_QK[row, 0] else WRONG
            caption = gallery.captions[row * columns + column]
            sheet.text(x, y + side + 15, caption, size=11, width=side, color=frame or INK)
            sheet.image(x, y, side, gallery.image_QKSS3[row, column], frame=frame)
        sheet.save(out)


def _explain_frames(sheet: Sheet, gallery: Gallery) -> None:
    is_same_QK = gallery.label_QK[:, 1:] == gallery.label_QK[:, :1]
    right, same = WIDTH - MARGIN, is_same_QK.sum()
    others = f"{is_same_QK.size - same} of another class"
    sheet.text(right, HEADER + 12, others, color=WRONG, weight="bold", ha="right")
    words = f"{same} of the same class, {gallery.possible} at most"
    sheet.text(right - 140, HEADER + 12, words, color=RIGHT, weight="bold", ha="right")
