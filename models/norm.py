"""BatchNorm over the global crop batch.

Shapes: V views, B images of this rank, N = V * B, C channels, S the dimensions of positions: height and width, or none.

What is computed of every value has the dimensions of the input. Were they split or merged, a compiler would make a pass
of its own over memory of it, and copies between the orders of channels first and last.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SAMPLED = 16  # one in so many images tells about where the mean is


class GlobalBatchNorm(nn.Module):
    """BatchNorm whose batch is one crop batch over all ranks (paper appendix A, "BatchNorm").

    In training the input holds `views` crop batches one after another, [V*B, C, ...]. Each is normalised by its own
    mean and variance over all ranks, and the running statistics move once for each, in order. In evaluation the
    running statistics normalise. Statistics are computed in float32 (float64 for float64 input), whatever the input's
    type, and combined over ranks in float64; the output has the input's type.

    Weight and bias are whole on every rank; the message of the backward pass brings their gradients too, the mean of
    those of all ranks.

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
        self.is_tracking = True  # whether a forward in training moves the running statistics
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalise_and_track(x) if self.training else self._normalise_by_running(x)
        return self.activation(y)

    def _normalise_by_running(self, x_NCS: Tensor) -> Tensor:
        scale_C = (self.running_var + self.eps).rsqrt()
        y_NCS = (x_NCS.to(_statistics_dtype(x_NCS)) - _wide(self.running_mean, x_NCS)) * _wide(scale_C, x_NCS)
        if self.weight is not None:
            y_NCS = y_NCS * _wide(self.weight, x_NCS) + _wide(self.bias, x_NCS)
        return y_NCS.to(x_NCS.dtype)

    def _normalise_and_track(self, x: Tensor) -> Tensor:
        # A view's vectors are taken for the positions of one image: numbers for each would be as many as they hold.
        x_NCS = x if x.dim() > 2 else _by_view(x, self.views).mT
        y_NCS, mean_VC, variance_VC = _NormaliseByBatch.apply(
            x_NCS, self.weight, self.bias, self.views, self.eps, self.ranks, self.group_name
        )
        if self.is_tracking:
            self._track(mean_VC, variance_VC, _values(x_NCS, self.views) * self.ranks)
        return y_NCS if x.dim() > 2 else y_NCS.mT.flatten(0, 1)

    @torch.no_grad()
    def _track(self, mean_VC: Tensor, variance_VC: Tensor, count: int) -> None:
        for mean_C, variance_C in zip(mean_VC, variance_VC, strict=True):
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * (count / max(count - 1, 1)), self.momentum)
        self.num_batches_tracked.add_(self.views)


class _NormaliseByBatch(torch.autograd.Function):
    """weight * (x - mean) / sqrt(variance + eps) + bias, of each view by its own statistics over all ranks.

    For its backward it keeps x as it came and a few numbers for each channel; autograd would keep float32 copies of x.
    Ranks speak to each other once forward and once backward, for all views together.

    Returns [N, C, S] in the type of x, and mean and variance [V, C], which take no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NCS: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        views: int,
        eps: float,
        ranks: int,
        group_name: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        near_VC, moved_NCS, mean_VC, variance_VC = _statistics(x_NCS, views, ranks, group_name)
        dtype = near_VC.dtype
        rstd_VC = (variance_VC + eps).rsqrt()
        shift_VC = (near_VC.double() - mean_VC) * rstd_VC
        scale_VC, offset_VC = rstd_VC, shift_VC
        if weight_C is not None:
            scale_VC, offset_VC = rstd_VC * weight_C, shift_VC * weight_C + bias_C
        y_NCS = torch.addcmul(_of_images(offset_VC.to(dtype), x_NCS), moved_NCS, _of_images(scale_VC.to(dtype), x_NCS))
        ctx.ranks, ctx.group_name = ranks, group_name
        ctx.save_for_backward(x_NCS, weight_C, near_VC, rstd_VC.to(dtype), shift_VC.to(dtype))
        mean_VC, variance_VC = mean_VC.to(dtype), variance_VC.to(dtype)
        ctx.mark_non_differentiable(mean_VC, variance_VC)
        # Not `to` of the type that it has: compiled by torch 2.11, that would take all gradients away without a word.
        return y_NCS if dtype == x_NCS.dtype else y_NCS.to(x_NCS.dtype), mean_VC, variance_VC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NCS: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x_NCS, weight_C, near_VC, rstd_VC, shift_VC = ctx.saved_tensors
        views, places = len(near_VC), _places(x_NCS)
        moved_NCS = x_NCS - _of_images(near_VC, x_NCS)
        # Sums of dy and of dy * normalised x: over all ranks the gradients of bias and weight.
        sum_VC = _by_view(dy_NCS, views).sum(places, dtype=rstd_VC.dtype)
        product_VC = _by_view(dy_NCS * moved_NCS, views).sum(places) * rstd_VC + shift_VC * sum_VC
        # Nothing of what is stacked is used afterwards: compiled code adds the ranks' numbers up in the same memory.
        sums_2VC = torch.stack([sum_VC, product_VC])
        if ctx.group_name is not None:  # every rank's loss depends on every rank's input
            sums_2VC = sum_over_ranks(sums_2VC, ctx.group_name)
        dy_mean_VC, product_mean_VC = (sums_2VC / (_values(x_NCS, views) * ctx.ranks)).unbind()
        # dx = scale * (dy - mean of dy - normalised x * mean of the products), with one factor for each channel
        scale_VC = rstd_VC if weight_C is None else rstd_VC * weight_C
        slope_VC, constant_VC = rstd_VC * product_mean_VC, dy_mean_VC + shift_VC * product_mean_VC
        constant_NCS, slope_NCS = (_of_images(scale_VC * each_VC, x_NCS) for each_VC in (constant_VC, slope_VC))
        through_mean_NCS = torch.addcmul(constant_NCS, moved_NCS, slope_NCS)
        dx_NCS = (dy_NCS * _of_images(scale_VC, x_NCS) - through_mean_NCS).to(x_NCS.dtype)
        if weight_C is None:
            return dx_NCS, None, None, None, None, None, None
        bias_gradient_C, weight_gradient_C = (sums_2VC.sum(1) / ctx.ranks).to(weight_C)
        return dx_NCS, weight_gradient_C, bias_gradient_C, None, None, None, None


def _statistics(x_NCS: Tensor, views: int, ranks: int, group_name: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A number near the mean of this rank's values, the values without it; mean and variance over all ranks (float64).

    The variance is taken of values near zero, so hardly anything of it is lost however far the mean is from zero. Near
    is the mean of some images: where it is off, these images lie as far off, and the square of that is at most
    `_SAMPLED` times the variance. So all values are read but once for their statistics.
    """
    places = _places(x_NCS)
    near_VC = _by_view(x_NCS, views)[:, ::_SAMPLED].mean(places, dtype=_statistics_dtype(x_NCS))
    moved_NCS = x_NCS - _of_images(near_VC, x_NCS)
    rest_VC = _by_view(moved_NCS, views).mean(places).double()
    # Of equal values each term is as large as the error of the other.
    variance_VC = (_by_view(moved_NCS.square(), views).mean(places).double() - rest_VC.square()).clamp(min=0)
    mean_VC = near_VC.double() + rest_VC
    if group_name is not None:
        mean_VC, variance_VC = _over_ranks(mean_VC, variance_VC, ranks, group_name)
    return near_VC, moved_NCS, mean_VC, variance_VC


def _over_ranks(mean_VC: Tensor, variance_VC: Tensor, ranks: int, group_name: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of all ranks' values from those of each rank's (float64, of equally many), by one all-reduce.

    Squares of means far from zero would drown a small variance. So a mean is split into its first 12 bits, whose
    squares and sums are exact, and the fine rest: mean^2 = coarse^2 + fine * (2 * coarse + fine).
    """
    coarse_VC = (mean_VC.view(torch.int64) & -(1 << 41)).view(torch.float64)
    fine_VC = mean_VC - coarse_VC
    rest_VC = fine_VC * (2 * coarse_VC + fine_VC) + variance_VC
    # Nothing of what is stacked is used afterwards: compiled code adds the ranks' numbers up in the same memory.
    parts_4VC = torch.stack([coarse_VC, fine_VC, coarse_VC.square(), rest_VC])
    coarse_VC, fine_VC, square_VC, rest_VC = sum_over_ranks(parts_4VC, group_name).unbind()
    of_coarse_VC = ranks * square_VC - coarse_VC.square()
    of_rest_VC = ranks * rest_VC - fine_VC * (2 * coarse_VC + fine_VC)
    return (coarse_VC + fine_VC) / ranks, ((of_coarse_VC + of_rest_VC) / ranks**2).clamp(min=0)


def sum_over_ranks(x: Tensor, group_name: str) -> Tensor:
    """The sum of all ranks' tensors, which takes no gradient.

    `functional.all_reduce` wraps it in a subclass of Tensor that waits at its first use. Here that is at once, and each
    operation on the subclass takes the host longer than the message.
    """
    return functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group_name))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_view(x_NCS: Tensor, views: int) -> Tensor:
    """The same values as [V, B, C, S]."""
    return torch.unflatten(x_NCS, 0, (views, -1))


def _places(x_NCS: Tensor) -> tuple[int, ...]:
    """The dimensions of [V, B, C, S] over which a channel's values lie."""
    return (1, *range(3, x_NCS.dim() + 1))


def _values(x_NCS: Tensor, views: int) -> int:
    """How many values a channel has in a view."""
    return x_NCS[:, 0].numel() // views


def _wide(channels_C: Tensor, x_NCS: Tensor) -> Tensor:
    """A number for each channel, [..., C, 1, 1] where positions have two dimensions."""
    return channels_C[(..., *[None] * (x_NCS.dim() - 2))]


def _of_images(channels_VC: Tensor, x_NCS: Tensor) -> Tensor:
    """Each image's numbers, those of its view: [N, C, 1, 1] where positions have two dimensions."""
    images = len(x_NCS) // len(channels_VC)
    return _wide(channels_VC.repeat_interleave(images, 0) if images > 1 else channels_VC, x_NCS)


def set_views(module: nn.Module, views: int) -> None:
    """Tell every GlobalBatchNorm in `module` how many crop batches lie one after another in a training input."""
    for child in module.modules():
        if isinstance(child, GlobalBatchNorm):
            child.views = views


@contextmanager
def without_tracking(module: nn.Module) -> Iterator[None]:
    """Meanwhile forwards leave the running statistics in `module` as they are: they repeat what has moved them."""
    norms = [child for child in module.modules() if isinstance(child, GlobalBatchNorm)]
    for norm in norms:
        norm.is_tracking = False
    try:
        yield
    finally:
        for norm in norms:
            norm.is_tracking = True


def batch_norm_weights(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Weights and biases of every GlobalBatchNorm in modules."""
    norms = [child for module in modules for child in module.modules() if isinstance(child, GlobalBatchNorm)]
    return [parameter for norm in norms for parameter in (norm.weight, norm.bias) if parameter is not None]


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(child, GlobalBatchNorm) for child in module.modules())


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
