"""Many linear classifiers on made-up features, by all ranks of a launch: `python -m tests.distributed.fast_linear`.

Prints one JSON line: the scores that each rank found, and of each rank the largest tensor that it made, as a share of
all rows of train in float32.
"""

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.agreement import all_gather
from engine.distributed.world import World, process_group
from engine.evaluation import fast_linear
from engine.evaluation.features import BATCH, Features, rank_slice
from engine.evaluation.knn import gather_rows

TRAIN, VAL, WIDTH, CLASSES = 3000, 200, 12, 4


class Largest(TorchDispatchMode):
    """`bytes` of the largest tensor that is made inside, of what is no view."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if isinstance(made, torch.Tensor) and not made._is_view():
            self.bytes = max(self.bytes, made.nbytes)
        return made


def rows(count: int, seed: int, world: World) -> Features:
    """This rank's, as `features` deals them out."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(CLASSES, (count,), generator=generator)
    feature_ND = torch.randn(count, WIDTH, generator=generator) * 3 + label_N[:, None] + 7
    ids, _ = rank_slice(count, world.rank, world.size, BATCH)
    return Features(feature_ND[ids], ids, label_N[ids])


def main() -> None:
    torch.set_num_threads(1)
    with process_group() as world:
        bank, query = rows(TRAIN, 1, world), gather_rows(rows(VAL, 2, world), world.host_group)
        with Largest() as made:
            scores = fast_linear.train_all(bank, query, CLASSES, world)
        found = all_gather((scores, made.bytes / (TRAIN * WIDTH * 4)), world.host_group)
        if world.is_first:
            print(json.dumps({"scores": [scores for scores, _ in found], "largest": [share for _, share in found]}))


if __name__ == "__main__":
    main()
