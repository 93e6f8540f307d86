"""BatchNorm over the global crop batch.

Shapes: V views, B images of this rank, C channels, S positions (1 for a vector).
"""

import torch
import torch.distributed._functional_collectives as functional
from timm.layers import BatchNormAct2d
from torch import Tensor, nn


class GlobalBatchNorm(nn.Module):
    """BatchNorm whose batch is one crop batch over all ranks (paper appendix A, "BatchNorm").

    In training the input holds `views` crop batches one after another, [V*B, C, ...]. Each is normalised by its own
    mean and variance over all ranks, and the running statistics move once for each, in order. In evaluation the
    running statistics normalise. Statistics are computed in float32 (float64 for float64 input), whatever the input's
    type; the output has the input's type.

    Unlike `torch.nn.SyncBatchNorm` it runs on the CPU and compiles into one graph, and its running statistics are equal
    on every rank. Parameter and buffer names are those of `torch.nn.BatchNorm2d`.

    Args:
        channels: C.
        affine: whether a weight and a bias follow the normalisation.
        views: crop batches in one training input.
        activation: applied to the output; for trunks that fuse the two.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        views: int = 1,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.eps, self.momentum, self.views = eps, momentum, views
        # A name and a number, not the group itself: compiled code guards what it finds in that, and compiles again.
        self.group_name: str | None = None  # None: this rank holds the whole batch
        self.ranks = 1
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        views = self.views if self.training else 1
        x_VBCS = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(views, -1, x.shape[1], x[0, 0].numel())
        if self.training:
            y_VBCS = self._normalise_and_track(x_VBCS)
        else:
            scale_C = (self.running_var + self.eps).rsqrt()
            y_VBCS = (x_VBCS - self.running_mean[:, None]) * scale_C[:, None]
        if self.weight is not None:
            y_VBCS = y_VBCS * self.weight[:, None] + self.bias[:, None]
        return self.activation(y_VBCS.reshape(x.shape).to(x.dtype))

    def _normalise_and_track(self, x_VBCS: Tensor) -> Tensor:
        # Two passes, not E[x^2] - E[x]^2: the variance stays exact however far the mean is from zero.
        count = x_VBCS.shape[1] * x_VBCS.shape[3] * self.ranks
        mean_VC = self._sum_over_ranks(x_VBCS.sum((1, 3))) / count
        centred_VBCS = x_VBCS - mean_VC[:, None, :, None]
        variance_VC = self._sum_over_ranks(centred_VBCS.square().sum((1, 3))) / count
        with torch.no_grad():
            for mean_C, variance_C in zip(mean_VC, variance_VC, strict=True):
                self.running_mean.lerp_(mean_C, self.momentum)
                self.running_var.lerp_(variance_C * (count / max(count - 1, 1)), self.momentum)
            self.num_batches_tracked.add_(self.views)
        return centred_VBCS * (variance_VC + self.eps).rsqrt()[:, None, :, None]

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        # The gradient of this sum is again a sum over ranks: every rank's loss depends on every rank's input.
        return x if self.group_name is None else functional.all_reduce(x, "sum", self.group_name)


def set_views(module: nn.Module, views: int) -> None:
    """Tell every GlobalBatchNorm in `module` how many crop batches lie one after another in a training input."""
    for child in module.modules():
        if isinstance(child, GlobalBatchNorm):
            child.views = views


def set_batch_norm_group(module: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Let every GlobalBatchNorm in `module` take its batch over the ranks of `group`."""
    for child in module.modules():
        if isinstance(child, GlobalBatchNorm):
            child.ranks = group.size()
            child.group_name = group.group_name if group.size() > 1 else None


def replace_batch_norm(module: nn.Module) -> None:
    """Put a GlobalBatchNorm in the place of every BatchNorm layer of a trunk, names and values unchanged.

    Raises:
        ValueError: the trunk has a BatchNorm of a kind that is not known here.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _from_torch(child))
        else:
            replace_batch_norm(child)


def _from_torch(norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    fused = isinstance(norm, BatchNormAct2d)
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not fused:
        raise ValueError(f"its BatchNorm ({type(norm).__name__}) must be torch's or timm's BatchNormAct2d")
    if norm.momentum is None or not norm.track_running_stats:
        raise ValueError("its BatchNorm must keep running statistics with a fixed momentum")
    activation = norm.act if fused else None
    new = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, activation=activation)
    if norm.affine:
        new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    return new
