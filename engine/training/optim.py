"""AdamW and LARS on sharded parameters (paper section 5 and appendix A).

Both keep their whole state from the start (so that it can be saved before the first step), and do nothing in a step
whose `found_inf` is 1: the decision stays on the device.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw as adamw_each_

from engine.recipe.sections import Optimizer
from engine.torch_internals import add_each, descend_each_, norm_each, scale_each
from engine.training.parallelize import local

LARS_MOMENTUM = 0.9
LARS_TRUST = 0.001


def build_optimizer(
    section: Optimizer, parameters: Iterable[torch.nn.Parameter], shard_group: dist.ProcessGroup
) -> torch.optim.Optimizer:
    """The optimizer that a recipe names, over the trained parameters; the step sets `lr`.

    Weight decay applies to biases, norms and CLS too under AdamW, to matrices and kernels alone under LARS.

    Args:
        shard_group: the ranks over which one parameter is spread.
    """
    if section.name == "lars":
        return Lars(parameters, section.weight_decay, shard_group)
    return AdamW([{"params": list(parameters), "weight_decay": section.weight_decay}])


class AdamW(torch.optim.AdamW):
    """torch's, over groups with `params` and `weight_decay`; the step sets each one's `lr`.

    It works on this rank's shards: torch's own step sends each of its lists through DTensor's dispatch, which takes the
    host longer than all else in it.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict]):
        super().__init__(groups, lr=0.0)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            # The state that torch's would make in its first step.
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=local(parameter).device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = group["params"]
            states = [self.state[p] for p in parameters]
            adamw_each_(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017): the rate of a matrix or kernel follows |p| / |g|.

    Weight decay and scaling leave parameters of one dimension out. Norms are those of the whole parameter, however it
    is sharded: one all-reduce serves all of them.
    """

    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[torch.nn.Parameter], weight_decay: float, shard_group: dist.ProcessGroup):
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})
        self.shard_group = shard_group
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"mu": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        scaled = [p for p in group["params"] if p.ndim > 1]
        plain = [p for p in group["params"] if p.ndim <= 1]
        weights, gradients = [local(p) for p in scaled], [local(p.grad) for p in scaled]
        updates = add_each(gradients, weights, group["weight_decay"])
        updates = scale_each(updates, self._trust_ratios(weights, updates))
        descend_each_(
            [*weights, *(local(p) for p in plain)],
            [*updates, *(local(p.grad) for p in plain)],
            [local(self.state[p]["mu"]) for p in (*scaled, *plain)],
            momentum=LARS_MOMENTUM,
            lr=group["lr"],
            unless=self.found_inf,
        )

    def _trust_ratios(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
        squares = norm_each([*parameters, *updates]).square()
        dist.all_reduce(squares, group=self.shard_group)
        parameter_norms, update_norms = squares.sqrt().chunk(2)
        both = (parameter_norms > 0) & (update_norms > 0)
        ratios = torch.where(both, LARS_TRUST * parameter_norms / update_norms, 1.0)
        return ratios.to(updates[0].dtype)
