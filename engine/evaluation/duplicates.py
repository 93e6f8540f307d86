"""Near-duplicates among images, by the cosine of their features: groups in which each is near to another.

Shapes: N images, Q of a tile of queries, P pairs, D features.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.source import Root
from engine.data.splits import open_all
from engine.data.workers import Workers
from engine.distributed.agreement import all_gather
from engine.distributed.world import World
from engine.errors import UserError
from engine.evaluation.features import Features, features, progress
from engine.evaluation.knn import gather_rows
from engine.evaluation.rows import FileNames, csv_lines, writing, written
from engine.evaluation.subject import open_subject_together

TILE = 1024  # rows and columns of the similarities that are there at a time
MOST = 10_000_000  # pairs, above which groups say nothing and memory may end


class Pairs(NamedTuple):
    """Rows [P] of images that are alike, `first` below `second`, and their cosine [P]."""

    first: Tensor
    second: Tensor
    cosine: Tensor


def find_duplicates(
    checkpoint: str, data: Root, out: Path, least: float, world: World, workers: int, **choice: Any
) -> dict[str, int | str]:
    """Write groups of images whose features' cosine is at least `least` to the CSV `out`; all ranks call it together.

    Returns {"groups", "images", "file"}; images: those in groups. Raises UserError and RunFailed.
    """
    source = open_all(data, world)
    with Workers([source], workers, device=world.device) as readers:
        subject = open_subject_together(checkpoint, world, **choice)
        rows = gather_rows(features(subject, source, "data", world, readers).to(world.device), world.group)
    parts = all_gather(pairs_of_rank(rows.feature_ND, least, world), world.host_group)
    if sum(len(part.cosine) for part in parts) > MOST:
        raise UserError(f"--least ({least:g}) must be higher: over {MOST:,} pairs of images are alike; raise it")
    pairs = Pairs(*(torch.cat(column) for column in zip(*parts, strict=True)))
    group_of = groups(pairs)
    with written(world, out) as (place,), writing(world):
        if world.is_first:
            write_groups(place, rows, FileNames(source, data), pairs, group_of)
    return {"groups": len(set(group_of.values())), "images": len(group_of), "file": str(out)}


def pairs_of_rank(feature_ND: Tensor, least: float, world: World) -> Pairs:
    """The alike among tiles of all rows, which are dealt out to the ranks.

    Tiles are the same for any number of ranks, and with them the bits of their products. Above MOST no more are sought.
    """
    tiles = F.normalize(feature_ND.double(), dim=1).float().split(TILE)
    places = [(i, j) for i in range(len(tiles)) for j in range(i, len(tiles))][world.rank :: world.size]
    empty = torch.zeros(0, dtype=torch.int64)
    found, count = [Pairs(empty, empty, torch.zeros(0))], 0
    for i, j in progress(places, len(places), "pairs", "tile", world):
        if count <= MOST:
            found.append(_alike(tiles[i], tiles[j], i, j, least))
            count += len(found[-1].cosine)
    return Pairs(*(torch.cat(column) for column in zip(*found, strict=True)))


def _alike(one_QD: Tensor, other_QD: Tensor, i: int, j: int, least: float) -> Pairs:
    similarity_QQ = one_QD @ other_QD.T
    near_QQ = similarity_QQ >= least
    if i == j:
        near_QQ = near_QQ.triu(1)
    row_P, column_P = near_QQ.nonzero(as_tuple=True)
    cosine_P = similarity_QQ[row_P, column_P].clamp(max=1)
    return Pairs((row_P + i * TILE).cpu(), (column_P + j * TILE).cpu(), cosine_P.cpu())


def groups(pairs: Pairs) -> dict[int, int]:
    """{row: the first row of its group} for each row that is like another, directly or through others."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while (above := parent.setdefault(row, row)) != row:
            parent[row] = parent[above]
            row = parent[row]
        return row

    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return {row: root(row) for row in sorted(parent)}


def write_groups(place: Path, rows: Features, names: FileNames, pairs: Pairs, group_of: dict[int, int]) -> None:
    """group (the name of its first image), name, cosine (with the most similar one of the group); groups together."""
    nearest: dict[int, float] = {}
    for first, second, cosine in zip(*(column.tolist() for column in pairs), strict=True):
        for row in (first, second):
            nearest[row] = max(cosine, nearest.get(row, -1.0))
    name_of = {row: names[int(rows.id_N[row])] for row in group_of}
    with place.open("w", encoding="utf-8", newline="") as file:
        lines = csv_lines(file)
        lines.writerow(["group", "name", "cosine"])
        for row in sorted(group_of, key=lambda row: (group_of[row], row)):
            lines.writerow([name_of[group_of[row]], name_of[row], f"{nearest[row]:.6f}"])
