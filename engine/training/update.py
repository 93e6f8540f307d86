"""The second half of every step: from gradients to new weights, or to the old ones where a gradient is not finite.

Nothing here waits for the device: whether a step counts is decided on it, on all ranks alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.torch_internals import copy_each_, norm_each
from engine.training.parallelize import local, shares


class Applied(NamedTuple):
    """What an update did, on the device."""

    lr: float
    grad_norm: Tensor  # of all ranks
    skipped: Tensor  # 1.0 where a gradient on any rank was not finite, else 0.0


class Update:
    """An optimizer, the parameters that it trains, and the counts of its steps.

    A step calls `begin`, computes gradients, and calls `apply`. Where a gradient on any rank is not finite, parameters
    and the optimizer's state stay as they are, and the tensors of `kept` return to what they were at `begin`.

    Args:
        optimizer: a group's `lr_scale` is its share of the learning rate.
        trained: its parameters, by name.
        kept: what else a step changes, as BatchNorm's buffers.
        own: those of the trained whose gradients are of this rank's images alone (`parallelize.own_gradients`).
        group: the ranks over which gradients are spread; None where each rank has the whole of them.
        knows_found_inf: whether the optimizer skips its step where its `found_inf` is 1; if not, its parameters and
            state must be in `kept`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, Tensor],
        kept: Sequence[Tensor],
        own: Sequence[Tensor] = (),
        *,
        group: dist.ProcessGroup | None = None,
        knows_found_inf: bool = True,
    ):
        self.optimizer, self.trained, self.kept, self.own = optimizer, trained, kept, own
        self.group, self.knows_found_inf = group, knows_found_inf
        self.step = 0  # skipped ones count
        self.message: Callable[[], Tensor] | None = None  # of the caller, 1-d: the guard adds it up over `group`
        device = next(iter(trained.values())).device
        self.shares = shares(trained.values(), group).to(device)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self.heard = torch.empty(0, device=device)  # of the last step: the sum of the ranks' messages

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state and the counts, by name; loading fills them in place."""
        state = {
            f"optimizer.{kind}.{name}": tensor
            for name, parameter in self.trained.items()
            for kind, tensor in self.optimizer.state[parameter].items()
        }
        return state | {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def begin(self) -> None:
        self.before = Snapshot(self.kept)

    def apply(self, lr: float) -> Applied:
        """Move the parameters by their gradients, which are used up.

        Raises:
            RuntimeError: a trained parameter took no part in the loss.
        """
        check_used(self.trained)
        if self.own and self.group is not None:
            average([parameter.grad for parameter in self.own], self.group)
        message = None if self.message is None else self.message()
        grad_norm, self.heard = gradient_norm(self.trained, self.shares, self.group, message)
        skipped = (~grad_norm.isfinite()).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.knows_found_inf:
            self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.before.restore_where(skipped > 0)
        del self.before
        self.skipped += skipped.long()
        self.skipped_in_a_row.add_(1).mul_(skipped.long())
        self.step += 1
        return Applied(lr, grad_norm, skipped)


def check_used(trained: Mapping[str, Tensor]) -> None:
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    if unused:
        raise RuntimeError(f"{len(unused)} trained parameters took no part in the loss: {', '.join(unused[:5])}")


def average(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Put the mean over all ranks in the place of each gradient, by one message."""
    sums = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(sums, group=group)
    parts = sums.div_(group.size()).split([gradient.numel() for gradient in gradients])
    copy_each_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


@torch.no_grad()
def gradient_norm(
    trained: Mapping[str, Tensor], shares: Tensor, group: dist.ProcessGroup | None, message: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of all gradients on all ranks, on every rank alike; not finite where one of them is not.

    shares: of the trained, as `parallelize.shares` counts them. message: more numbers, 1-d, to be added up on the same
    way; the second result is their sum over ranks, each its own whatever the gradients are.
    """
    # In float64, where no square of a finite float32 number overflows: not finite means a bad gradient.
    square = norm_each([local(p.grad) for p in trained.values()]).square() @ shares
    sums = square[None] if message is None else torch.cat([square[None], message])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums[0].sqrt(), sums[1:]


class Snapshot:
    """Tensors as they are now, to go back to without asking the device."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]):
        self.kinds = [[t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)]
        self.flat = [torch.cat([t.flatten() for t in kind]) for kind in self.kinds]

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put the old values back where `condition` (0-d) holds."""
        for kind, old in zip(self.kinds, self.flat, strict=True):
            values = torch.where(condition, old, torch.cat([t.flatten() for t in kind]))
            parts = values.split([t.numel() for t in kind])
            copy_each_(kind, [part.view_as(t) for part, t in zip(parts, kind, strict=True)])
