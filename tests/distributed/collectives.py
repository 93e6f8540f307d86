"""What a rank sends in one step, under every sharding, beside the least that this takes; prints one JSON line for each.

All messages count as a ring carries them, which is the least that any way of sending takes: of W equal parts a rank
sends W - 1 for an all-gather or a reduce-scatter, and twice as many for an all-reduce.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.world import World, make_mesh, process_group
from engine.recipe.sections import Optimizer, Parallel
from engine.training.health import health
from engine.training.parallelize import least_unit, materialize, parallelize, units
from engine.training.schedule import MocoSchedule
from engine.training.step import TrainState, train_step
from models.architecture import Architecture
from models.moco import MoCo
from models.norm import GlobalBatchNorm, batch_norm_weights
from tests.distributed.replays import SHARDINGS

IMAGES, SIDE, WIDTH = 4, 96, 32  # of a rank; of an image, for 145 positions; of a key
NUMBER = torch.float64.itemsize
Traffic = dict[str, tuple[int, float]]  # by kind of message: how many, and bytes that a rank sends


class Counting(TorchDispatchMode):
    """The messages that are sent inside, by kind: the bytes of each that this rank sends to others."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent = ranks, defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_allgather_base_":
            self.sent["all_gather"].append(args[0].nbytes - args[1].nbytes)
        elif name == "_reduce_scatter_base_":
            self.sent["reduce_scatter"].append(args[1].nbytes - args[0].nbytes)
        elif name in ("allreduce_", "all_reduce"):
            whole = sum(tensor.nbytes for tensor in (args[0] if isinstance(args[0], list) else [args[0]]))
            self.sent["all_reduce"].append(2 * whole * (self.ranks - 1) / self.ranks)
        elif func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise NotImplementedError(f"a message of a kind that is not counted: {name}")
        return func(*args, **(kwargs or {}))

    def traffic(self) -> Traffic:
        """Those that leave the rank: a group of one sends nothing."""
        leaving = {kind: [sent for sent in every if sent] for kind, every in self.sent.items()}
        return {kind: (len(sent), sum(sent)) for kind, sent in leaving.items() if sent}


def minimum(state: TrainState, shard: str, ranks: int, least: float) -> Traffic:
    """What the step cannot do without, where a rank may hold at rest what `shard` says."""
    part = (ranks - 1) / ranks
    moco = state.moco
    trained, followed = [moco.base, moco.predictor], [moco.momentum]
    gradients = numbers(*trained, trained=True) * NUMBER
    in_units = units(moco.base.trunk, least)
    # Beside the units of blocks, the rest of the trunk and the heads.
    apart, followed_apart = len(in_units) + 3, len(units(moco.momentum.trunk, least)) + 2
    passes = {"full": 2, "grad_op": 1}.get(shard, 0)  # units are gathered forward and backward, or once, or never
    gathers, gathered = 1, ranks * 2 * IMAGES * WIDTH  # the keys
    # BatchNorm, both views at once: four numbers for each channel forward and two backward. And the guard's one.
    forward, backward = channels(*trained, *followed), channels(*trained)
    reduces, reduced = len(forward) + len(backward) + 1, 2 * (4 * sum(forward) + 2 * sum(backward)) + 1
    if not passes:  # under replicate all gradients travel together
        reduces += apart if shard == "hybrid" else 1
        sums = {"all_reduce": (reduces, 2 * part * (reduced * NUMBER + gradients))}
        return {"all_gather": (gathers, part * gathered * NUMBER)} | sums
    gathers += apart + (passes - 1) * len(in_units) + followed_apart
    of_units = numbers(*(block for unit in in_units for block in unit))
    gathered += numbers(*trained) + (passes - 1) * of_units + numbers(*followed)
    return {
        "all_gather": (gathers, part * gathered * NUMBER),
        "all_reduce": (reduces, 2 * part * reduced * NUMBER),
        "reduce_scatter": (apart, part * gradients),
    }


def numbers(*modules: nn.Module, trained: bool = False) -> int:
    """Of all parameters, or those that are trained, which travel: BatchNorm's are whole on every rank, and its own
    messages bring their gradients."""
    whole = set(batch_norm_weights(modules))
    parameters = [p for module in modules for p in module.parameters() if p not in whole]
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def channels(*modules: nn.Module) -> list[int]:
    """Of every BatchNorm layer."""
    layers = [layer for module in modules for layer in module.modules()]
    return [len(layer.running_mean) for layer in layers if isinstance(layer, GlobalBatchNorm)]


def gathers(counting: Counting, state: TrainState) -> str:
    """What was gathered, in order: Block, Projector, pRedictor; what is none of them is left out."""
    moco, part = state.moco, (counting.ranks - 1) / counting.ranks
    parts = {"B": moco.base.trunk.blocks[0], "P": moco.base.projector, "R": moco.predictor}
    letters = {part * numbers(module) * NUMBER: letter for letter, module in parts.items()}
    return "".join(letters.get(sent, "") for sent in counting.sent["all_gather"])


def build(world: World, shard: str, *, conv_stem: bool, least: float) -> TrainState:
    shape = {"image_size": SIDE, "patch_size": 8, "dim": 48, "depth": 3, "heads": 4, "conv_stem": conv_stem}
    with torch.device("meta"):
        moco = MoCo(Architecture("vit", shape).build, 96, WIDTH)
    replicas = world.size if shard == "hybrid" else 1
    mesh = make_mesh(world, shard, replicas)
    parallel = Parallel(compile=False, precision="float64", shard=shard, replicate=replicas)
    parallelize(moco, mesh, world.group, parallel, least)
    materialize(moco, world.device, moco.initial_values(seed=0))
    schedule = MocoSchedule(peak_lr=1e-3, epochs=2, warmup_epochs=1, steps_per_epoch=2, momentum=0.9)
    optimizer = Optimizer(name="adamw", base_lr=1e-3, weight_decay=0.1)
    return TrainState(moco, schedule, optimizer, temperature=0.2, mesh=mesh, group=world.group)


def main() -> None:
    with process_group() as world:
        generator = torch.Generator().manual_seed(world.rank)
        images = torch.randn(2 * IMAGES, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(world.device)
        for conv_stem, least in ((False, 1), (True, least_unit(world.size))):
            for shard in SHARDINGS:
                state = build(world, shard, conv_stem=conv_stem, least=least)
                with Counting(world.size) as counting:
                    output = train_step(state, images)
                with Counting(world.size) as counting_health:
                    health(output, state)
                found = {"conv_stem": conv_stem, "shard": shard, "health": counting_health.traffic()}
                found |= {"sent": counting.traffic(), "least": minimum(state, shard, world.size, least)}
                found["gathers"] = gathers(counting, state)
                if world.is_first:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
