"""Batches as the loader yields them for evaluation, of images that are at hand."""

import torch
from torch.nn.functional import pad

from engine.data.loader import EvalBatch


def padded_batch(images: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, batch_size: int) -> EvalBatch:
    """Images `ids` of images [N, 3, S, S] and labels [N], and padding up to batch_size."""
    missing = batch_size - len(ids)
    padded = pad(images[ids], (0, 0, 0, 0, 0, 0, 0, missing))
    id_B, label_B = (pad(values, (0, missing), value=-1) for values in (ids, labels[ids]))
    return EvalBatch(padded, id_B, label_B, len(ids), [])
