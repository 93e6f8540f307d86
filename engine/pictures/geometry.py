"""Where images lie in the space of features: their nearest neighbours, and flat maps.

Features are compared by cosine, as in kNN: every row is taken to length 1 first.
Shapes: N images, Q queries, K neighbours, D features.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import UserError

METHODS = ("pca", "tsne")
_SMALLEST = 5  # images of which a map says something


class Map(NamedTuple):
    """place_N2: a point for each image; axes: what the two directions are called."""

    place_N2: Tensor
    axes: tuple[str, str]


def spread(label_N: Tensor, count: int) -> Tensor:
    """Rows of `count` images, evenly spread over the classes: int64 [Q]. Raises UserError where there are fewer."""
    if count > len(label_N):
        raise UserError(f"--queries ({count}) must be at most {len(label_N)}, the number of images; lower it")
    middle_Q = (torch.arange(count) * 2 + 1) * len(label_N) // (2 * count)
    return label_N.argsort(stable=True)[middle_Q]


def nearest(feature_ND: Tensor, query_Q: Tensor, k: int) -> Tensor:
    """The k images nearest to each query image, nearest first, itself apart: int64 [Q, K].

    query_Q: the queries' rows. Raises UserError where there are no k others, or features that are not finite.
    """
    if k > len(feature_ND) - 1:
        raise UserError(f"--k ({k}) must be at most {len(feature_ND) - 1}, the number of other images; lower it")
    unit_ND = _unit(feature_ND)
    similarity_QN = unit_ND[query_Q] @ unit_ND.T
    similarity_QN[torch.arange(len(query_Q)), query_Q] = -torch.inf
    return similarity_QN.topk(k, dim=1).indices


def check_method(method: str) -> None:
    """Raises UserError where a method's library is not installed; cheap: for before the features are made."""
    if method == "tsne" and importlib.util.find_spec("sklearn") is None:
        do = "`pip install -e '.[pictures]'` or `pip install scikit-learn`"
        raise UserError(f"--method (tsne) needs scikit-learn, which is not installed; do {do}, or pass --method pca")


def flat_map(feature_ND: Tensor, method: str) -> Map:
    """The images on a plane. Raises UserError for fewer than 5 images or features that are not finite."""
    if len(feature_ND) < _SMALLEST:
        raise UserError(f"--data must hold at least {_SMALLEST} readable images for a map, and has {len(feature_ND)}")
    return _tsne(_unit(feature_ND)) if method == "tsne" else _pca(_unit(feature_ND))


def _unit(feature_ND: Tensor) -> Tensor:
    if not feature_ND.isfinite().all():
        raise UserError("CHECKPOINT must give finite features, and does not: its weights have diverged; pass another")
    return F.normalize(feature_ND.double(), dim=1)


def _pca(unit_ND: Tensor) -> Map:
    """The two directions of largest variance. The sign of each is free: its largest entry is made positive."""
    centred_ND = unit_ND - unit_ND.mean(0)
    variance_D, direction_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
    direction_D2 = direction_DD[:, -2:].flip(1)
    largest_12 = direction_D2.gather(0, direction_D2.abs().argmax(0, keepdim=True))
    share_2 = variance_D.flip(0)[:2] / variance_D.sum().clamp_min(torch.finfo(torch.float64).tiny)
    axes = tuple(f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(share_2.tolist()))
    return Map(centred_ND @ (direction_D2 * largest_12.sign()), axes)


def _tsne(unit_ND: Tensor) -> Map:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(unit_ND) - 1) / 3)  # scikit-learn's default, and what few images bear
    place_N2 = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(unit_ND.numpy())
    return Map(torch.from_numpy(place_N2), ("", ""))
