"""RankMe: how many directions the features really use, a measure of their quality that needs no labels.

Garrido et al. 2023 (arXiv 2210.02885), equation 1: the exponential of the entropy of the singular values of the feature
matrix. It is 1 for collapsed features and D for features that fill their space evenly.

Shapes: N rows, B rows of this rank, D features.
"""

import torch
import torch.distributed as dist

_EPS = 1e-7  # the paper's, added to each share
_ROWS = 8192  # rows that are in float64 at one time


def feature_gram(z_BD: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Z^T Z [D, D] in float64, where Z has the rows of all ranks of `group` (the default group where None).

    A collective where torch.distributed is initialised. The memory does not depend on the number of rows.
    """
    gram_DD = z_BD.new_zeros(z_BD.shape[1], z_BD.shape[1], dtype=torch.float64)
    for rows in z_BD.detach().split(_ROWS):
        gram_DD.addmm_(rows.double().T, rows.double())
    if dist.is_initialized():
        dist.all_reduce(gram_DD, group=group)
    return gram_DD


def rankme_from_gram(gram_DD: torch.Tensor) -> torch.Tensor:
    """RankMe of the features whose Gram matrix Z^T Z is gram_DD (float64), 0-d; NaN where it is not finite, or where
    its eigenvalues are not found.

    With fewer rows than columns the D - N directions that cannot be used count too, each with the paper's eps, which
    raises the result by less than 2e-6 of itself per direction.
    """
    finite = gram_DD.isfinite().all()
    # Eigenvalues of what is not finite would raise.
    try:
        singular_D = torch.linalg.eigvalsh(gram_DD.where(finite, 0)).clamp_min(0).sqrt()
    except torch.linalg.LinAlgError:  # a measure ends no run
        return gram_DD.new_full((), torch.nan)
    share_D = singular_D / singular_D.sum().clamp_min(torch.finfo(torch.float64).tiny) + _EPS
    return torch.exp(-(share_D * share_D.log()).sum()).where(finite, torch.nan)
