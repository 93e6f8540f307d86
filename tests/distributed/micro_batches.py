"""Steps in micro-batches beside steps of the whole batch, under every sharding; prints one JSON line for each pair."""

import json
import sys
from collections import Counter
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from engine.distributed.world import World, process_group
from engine.training.micro_batch import MicroBatches
from engine.training.parallelize import local
from engine.training.step import TrainState, train_step
from tests.distributed.replays import GOLDEN, SHARDINGS
from tests.replay import Trace, build, compare

TRACE = "A_vit_adamw"
PIECES = (1, 2, 4)


class Counting(TorchDispatchMode):
    """The collectives that are called inside, by name."""

    def __init__(self):
        super().__init__()
        self.collectives = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Kept:
    """Bytes that autograd keeps for backward passes: now, and at the most."""

    def __init__(self):
        self.now = self.peak = 0

    def hooks(self) -> saved_tensors_hooks:
        class Held:
            def __init__(held, tensor: Tensor):  # noqa: N805
                held.tensor = tensor
                self.now += tensor.nbytes
                self.peak = max(self.peak, self.now)

            def __del__(held):  # noqa: N805
                self.now -= held.tensor.nbytes

        return saved_tensors_hooks(Held, lambda held: held.tensor)


class Run:
    """A trace's networks and its steps, whole or in pieces."""

    def __init__(
        self,
        world: World,
        shard: str,
        pieces: int | None,
        *,
        compile: bool = False,
        trace: str = TRACE,
        checkpoint: str = "none",
    ):
        self.trace = Trace(GOLDEN / f"{trace}.safetensors")
        replicas = world.size if shard == "hybrid" else 1
        self.state: TrainState = build(self.trace, world, "float64", compile, shard, replicas, checkpoint)
        self.rows, self.world, self.pieces = self.trace.config["global_batch"] // world.size, world, pieces
        self.compile, self.made = compile, []
        self.kept = Kept()

    def images(self, step: int) -> Tensor | MicroBatches:
        mine = slice(self.world.rank * self.rows, (self.world.rank + 1) * self.rows)
        views = [self.trace[f"images.{view}"][step, mine].to(self.world.device, torch.float64) for view in (1, 2)]

        def make(rows: slice) -> Tensor:
            self.made.append(rows.start)
            return torch.cat([view[rows] for view in views])

        return make(slice(None)) if self.pieces is None else MicroBatches(make, self.rows, self.rows // self.pieces)

    def steps(self) -> list[dict[str, Tensor]]:
        """What every step saw, and what the rank holds after the last one, whose collectives are counted."""
        seen, counting = [], Counting()
        torch.compiler.set_stance("default")
        for step in range(self.trace.config["steps"]):
            is_last = step == self.trace.config["steps"] - 1
            with self.kept.hooks(), counting if is_last and not self.compile else nullcontext():
                output = train_step(self.state, self.images(step))
            torch.compiler.set_stance("fail_on_recompile")  # all that is compiled is compiled in the first step
            names = ("loss", "top1", "positive", "negative", "features", "queries", "keys")
            seen.append({n: getattr(output, n) for n in names} | {"grad_norm": output.applied.grad_norm})
            assert not any(state._comm_ctx.post_forward_order for state in self.fsdp_states())
        self.collectives = counting.collectives
        return [*seen, {name: local(tensor).clone() for name, tensor in self.state.tensors().items()}]

    def fsdp_states(self) -> list:
        return [m._get_fsdp_state() for m in self.state.moco.modules() if hasattr(m, "_get_fsdp_state")]


def difference(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    """The largest of any entry, of any tensor on any rank, over the tensor's largest entry, or over 0.01."""
    worst = 0.0
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            if tensor.numel():
                scale = yours[name].double().abs().max().clamp(min=0.01)
                worst = max(worst, ((tensor.double() - yours[name].double()).abs().max() / scale).item())
    found = torch.tensor(worst, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def main(*options: str) -> None:
    """options: `compile` for compiled steps. Those and one rank are shown under one sharding."""
    compile = "compile" in options
    with process_group() as world:
        for shard in SHARDINGS if world.size > 1 and not compile else SHARDINGS[:1]:
            whole = Run(world, shard, None, compile=compile)
            expected = whole.steps()
            for pieces in PIECES if shard == SHARDINGS[0] and not compile else PIECES[-1:]:
                run = Run(world, shard, pieces, compile=compile)
                found = {
                    "shard": shard,
                    "pieces": pieces,
                    "difference": difference(run.steps(), expected),
                    "golden": compare(run.trace, run.state)["max_param_rel"],
                    "collectives": run.collectives,
                    "collectives_whole": whole.collectives,
                    "kept": run.kept.peak / whole.kept.peak,
                    "made": len(run.made) / run.trace.config["steps"],
                }
                if world.is_first:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
