"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, arXiv 1805.01978, section 3.4).

The bank (the labelled features) stays spread over the ranks, and every rank finds the nearest neighbours of all queries
in its own part; what they found is then put together. The answer must not depend on how the bank was spread, and float
products do: their last bits change with the shape of a matrix product. So normalised features are rounded to a grid
of 2^-23 (as fine as float32 near 1) and multiplied as whole numbers in float64, where each product and each partial sum
is below 2^53 and so exact. Similarities, and with them ties, are then the same for any ranks, tiles and devices.

Shapes: N bank rows of this rank, T rows of a bank tile, Q queries, C queries of a chunk, D features, K neighbours.
A candidate is three whole numbers (similarity * 2^46, id, label).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.errors import UserError
from engine.evaluation.features import Features

TOP = 5  # guesses that are looked at
_GRID = 2**23
_MAX_TILE = 2**16  # a similarity has 47 bits and a sign: with a position in the tile it must fit into 64
_NOBODY = torch.iinfo(torch.int64).min  # similarity of a candidate that fills up a list


def check_k(k: int, bank: int, name: str = "k") -> None:
    """Raises UserError where a bank of `bank` images has no k neighbours; cheap: call it before extraction too."""
    if k < 1:
        raise UserError(f"{name} ({k}) must be at least 1; 20 is usual")
    if k > bank:
        raise UserError(
            f"{name} ({k}) must be at most {bank}, the number of training images; lower it or give more images"
        )


def accuracy(prediction_Q5: Tensor, label_Q: Tensor) -> dict[str, float]:
    """{"top1", "top5"}: the share of rows whose label is the first, or any, of the predicted classes.

    Raises ValueError where there is no row, or one without a label (a negative one).
    """
    if len(label_Q) == 0 or bool((label_Q < 0).any()):
        raise ValueError(f"accuracy needs labelled images; of {len(label_Q)}, {int((label_Q < 0).sum())} have no label")
    right_Q5 = prediction_Q5 == label_Q[:, None]
    return {
        "top1": int(right_Q5[:, 0].sum()) / len(label_Q),
        "top5": int(right_Q5.any(dim=1).sum()) / len(label_Q),
    }


@torch.no_grad()
def classify(
    bank: Features,
    query_QD: Tensor,
    *,
    classes: int,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    group: dist.ProcessGroup | None = None,
    tile: int = 8192,
    chunk: int = 512,
) -> dict[int, Tensor]:
    """The classes that the k nearest bank rows vote for, each with weight exp(cosine similarity / temperature).

    A collective of `group` (the default group where None) if torch.distributed is initialised: every rank gives its own
    part of the bank, which may be empty and may stay on the CPU, and the same queries, on the device that computes.
    The ids tell the bank's rows of all ranks apart. Of equally similar rows the one with the smaller id is nearer; of
    classes with equal votes the smaller comes first. A feature of zeros has similarity 0 with every other.

    Returns {k: int64 [Q, 5]}: per query the classes with most votes, best first, and -1 where fewer have a vote. They
    are equal on all ranks, and for any number of ranks, tile (bank rows at a time) and chunk (queries at a time).
    Raises UserError for a k out of range, FloatingPointError for features that are not finite, ValueError for labels
    outside 0..classes - 1; on all ranks alike.
    """
    if not 0 < tile <= _MAX_TILE:
        raise ValueError(f"tile ({tile}) must be from 1 to {_MAX_TILE}")
    _check(bank, query_QD, classes, ks, group)
    most = max(ks)
    nearest = _search(bank, query_QD.split(chunk), most, tile)
    predictions: dict[int, list[Tensor]] = {k: [query_QD.new_empty(0, TOP, dtype=torch.int64)] for k in ks}
    for part in nearest:
        everyones = torch.cat(list(_all_gather(part, group)), dim=1)
        for k, prediction in _vote(_best(everyones, most), classes, ks, temperature).items():
            predictions[k].append(prediction)
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def _search(bank: Features, chunks: Sequence[Tensor], most: int, tile: int) -> list[Tensor]:
    """Per chunk of queries the `most` nearest rows of this rank's bank, as candidates [C, most, 3]."""
    device = chunks[0].device
    queries = [_on_grid(query_CD) for query_CD in chunks]
    nearest = [_nobody(len(query_CD), most, device) for query_CD in queries]
    for rows_T in bank.id_N.argsort().split(tile):
        tile_TD = _on_grid(bank.feature_ND[rows_T].to(device)).double()
        names_T2 = torch.stack((bank.id_N[rows_T], bank.label_N[rows_T]), dim=1).to(device)
        for i, query_CD in enumerate(queries):
            found = _nearest_in_tile(query_CD.double() @ tile_TD.T, names_T2, most)
            nearest[i] = _best(torch.cat((nearest[i], found), dim=1), most)
    return nearest


def _on_grid(x_ND: Tensor) -> Tensor:
    """Rows of length 1 as whole multiples of 2^-23; the multiples are exact in float32."""
    x_ND = x_ND.double()
    square_N1 = x_ND * x_ND
    while square_N1.shape[1] > 1:  # adding halves: one order for any shape and device, where a library's sum has many
        square_N1 = F.pad(square_N1, (0, square_N1.shape[1] % 2))
        left, right = square_N1.chunk(2, dim=1)
        square_N1 = left + right
    norm_N1 = square_N1.sqrt()
    return (x_ND / norm_N1.where(norm_N1 > 0, 1) * _GRID).round().float()


def _nearest_in_tile(similarity_CT: Tensor, names_T2: Tensor, most: int) -> Tensor:
    """The nearest rows of a tile in id order, as candidates [C, <= most, 3].

    topk picks freely among equals, so the position in the tile joins the similarity in one key without equals.
    """
    rows = similarity_CT.shape[1]
    last_first_T = torch.arange(rows - 1, -1, -1, device=similarity_CT.device)
    key_CK = (similarity_CT.long() * rows + last_first_T).topk(min(most, rows), dim=1).values
    similarity_CK = key_CK.div(rows, rounding_mode="floor")
    names_CK2 = names_T2[rows - 1 - (key_CK - similarity_CK * rows)]
    return torch.cat((similarity_CK[..., None], names_CK2), dim=2)


def _nobody(queries: int, most: int, device: torch.device) -> Tensor:
    return torch.tensor([_NOBODY, 0, 0], device=device).repeat(queries, most, 1)


def _best(candidate_CN3: Tensor, most: int) -> Tensor:
    """The `most` first candidates by similarity, the largest first, then by id."""
    by_id = candidate_CN3[..., 1].argsort(dim=1, stable=True)
    candidate_CN3 = candidate_CN3.take_along_dim(by_id[..., None], dim=1)
    by_similarity = candidate_CN3[..., 0].argsort(dim=1, descending=True, stable=True)
    return candidate_CN3.take_along_dim(by_similarity[:, :most, None], dim=1)


def _vote(candidate_CK3: Tensor, classes: int, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """{k: [C, 5]} from neighbours in order. Votes are added one neighbour at a time, so in one order everywhere."""
    similarity_CK = candidate_CK3[..., 0].double() / _GRID**2
    weight_CK = ((similarity_CK - similarity_CK[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
    row_C = torch.arange(len(candidate_CK3), device=candidate_CK3.device)
    vote_CL = weight_CK.new_zeros(len(candidate_CK3), max(classes, TOP))
    predictions = {}
    for neighbour in range(max(ks)):
        vote_CL[row_C, candidate_CK3[:, neighbour, 2]] += weight_CK[:, neighbour]
        if neighbour + 1 in ks:
            vote, label = vote_CL.sort(dim=1, descending=True, stable=True)
            predictions[neighbour + 1] = label[:, :TOP].where(vote[:, :TOP] > 0, -1)
    return predictions


def _check(bank: Features, query_QD: Tensor, classes: int, ks: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Counts over all ranks first, so that all raise, or none does."""
    not_finite = sum(int((~rows.isfinite()).any(dim=1).sum()) for rows in bank.feature_ND.split(_MAX_TILE))
    strange = int(((bank.label_N < 0) | (bank.label_N >= classes)).sum())
    counts = torch.tensor([len(bank.id_N), not_finite, strange], device=query_QD.device)
    images, not_finite, strange = _all_gather(counts, group).sum(0).tolist()
    for k in ks:
        check_k(k, images)
    queries = int((~query_QD.isfinite()).any(dim=1).sum())
    if not_finite or queries:
        raise FloatingPointError(
            f"kNN needs finite features; those of {not_finite} of {images} training images and of {queries} of "
            f"{len(query_QD)} validation images are not: the trunk's weights have diverged or its precision overflows"
        )
    if strange:
        raise ValueError(
            f"kNN needs labelled images; of {images} for training, {strange} have no class, a label below {classes}"
        )


def gather_rows(rows: Features, group: dist.ProcessGroup | None, ranks: Sequence[int] | None = None) -> Features:
    """The rows of all ranks, in the order of their ids. Ranks may hold different numbers of rows.

    ranks: those of `group` that get them, where not all do; the others get none, and hold no more than their own.
    """
    most = int(_all_gather(torch.tensor(len(rows.id_N), device=rows.id_N.device), group).max())
    missing = most - len(rows.id_N)
    id_Q = _gather(F.pad(rows.id_N, (0, missing), value=-1), group, ranks).flatten()
    label_Q = _gather(F.pad(rows.label_N, (0, missing)), group, ranks).flatten()
    query_QD = _gather(F.pad(rows.feature_ND, (0, 0, 0, missing)), group, ranks).flatten(0, 1)
    order_Q = id_Q.argsort()[int((id_Q < 0).sum()) :]
    return Features(query_QD[order_Q], id_Q[order_Q], label_Q[order_Q])


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[world, *x.shape]; x has the same shape on every rank."""
    if not dist.is_initialized():
        return x[None]
    everyones = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(everyones.unbind()), x.contiguous(), group)
    return everyones


def _gather(x: Tensor, group: dist.ProcessGroup | None, ranks: Sequence[int] | None) -> Tensor:
    """As `_all_gather` on these ranks, on the others [0, *x.shape]; None: on all."""
    if ranks is None or not dist.is_initialized():
        return _all_gather(x, group)
    here, world = dist.get_rank(group), dist.get_world_size(group)
    everyones = x.new_empty(world if here in ranks else 0, *x.shape)
    for to in ranks:
        dist.gather(x.contiguous(), list(everyones.unbind()) if to == here else None, group=group, group_dst=to)
    return everyones
