"""Gradients that are not finite: found on all ranks without waiting for the device, and without consequence."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import RunFailed
from engine.training.optim import local

SKIPS_IN_A_ROW = 10  # steps without update after which a run has failed


@torch.no_grad()
def check_gradients(trained: Mapping[str, Tensor], group: dist.ProcessGroup, copies: int) -> tuple[Tensor, Tensor]:
    """The gradients' norm over all ranks, and 1.0 where any of them is not finite (else 0.0), on every rank alike.

    Args:
        copies: of every shard in the group.

    Raises:
        RuntimeError: a trained parameter took no part in the loss.
    """
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    if unused:
        raise RuntimeError(f"{len(unused)} trained parameters took no part in the loss: {', '.join(unused[:5])}")
    # float64: squares of finite float32 numbers cannot overflow, so a norm that is not finite means a bad gradient.
    norms = torch._foreach_norm([local(p.grad) for p in trained.values()], 2, dtype=torch.float64)
    square = torch.stack(norms).square().sum()
    dist.all_reduce(square, group=group)
    return (square / copies).sqrt(), (~square.isfinite()).float()


def check_skips(skipped_in_a_row: Tensor, step: int) -> None:
    """Raises RunFailed where too many steps in a row had bad gradients. Waits for the device."""
    skips = int(skipped_in_a_row)
    if skips >= SKIPS_IN_A_ROW:
        raise RunFailed(
            f"the last {skips} steps up to {step} had gradients that are not finite and changed nothing; no weights "
            "were harmed: go on with parallel.precision=float32, or start anew with a lower optimizer.base_lr or a "
            "longer train.warmup_epochs in another run.dir"
        )


class BufferSnapshot:
    """BatchNorm's buffers as they were before a step, to go back to without asking the device."""

    def __init__(self, buffers: list[Tensor]):
        self.kinds = [[b for b in buffers if b.dtype == dtype] for dtype in dict.fromkeys(b.dtype for b in buffers)]
        self.flat = [torch.cat([b.flatten() for b in kind]) for kind in self.kinds]

    def restore_where(self, condition: Tensor) -> None:
        """Put the old values back where `condition` (0-d) holds."""
        for kind, old in zip(self.kinds, self.flat, strict=True):
            kept = torch.where(condition, old, torch.cat([b.flatten() for b in kind]))
            parts = kept.split([b.numel() for b in kind])
            torch._foreach_copy_(kind, [part.view_as(b) for part, b in zip(parts, kind, strict=True)])
