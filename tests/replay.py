"""Replay a golden trace through the real train step: `torchrun ... -m tests.replay TRACE.safetensors [options]`.

Prints one JSON line: the largest relative differences of losses, parameters and buffers from the trace
(tests/golden/README.md defines the measures). The numbers of ranks and the sharding must not change them.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.distributed.world import World, make_mesh, process_group
from engine.recipe.sections import Optimizer, Parallel
from engine.training.parallelize import local, materialize, parallelize
from engine.training.schedule import MocoSchedule
from engine.training.step import StepOutput, TrainState, train_step
from models.architecture import Architecture
from models.moco import MoCo

FLOOR = 0.01  # of a tensor's largest entry, under which differences are absolute


class Trace:
    """A golden trace: its configuration and its tensors, read on demand."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        self.config = json.loads(self.file.metadata()["config"])
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def initial(self) -> dict[str, Tensor]:
        """Initial parameters under our names; the momentum encoder starts as a copy of the base encoder."""
        values = {our_name(n.removeprefix("init.")): self[n] for n in self.names if n.startswith("init.")}
        return values | {n.replace("base.", "momentum.", 1): v for n, v in values.items() if n.startswith("base.")}

    def schedule(self) -> MocoSchedule:
        keys = ("epochs", "warmup_epochs", "steps_per_epoch", "momentum")
        peak_lr = self.config["base_lr"] * self.config["global_batch"] / 256
        return MocoSchedule(peak_lr=peak_lr, **{key: self.config[key] for key in keys})


def our_name(name: str) -> str:
    """The trace calls the projector `head` (ViT) or `fc` (ResNet) and hangs it beside the trunk."""
    part, _, rest = name.partition(".")
    if part == "predictor":
        return name
    child, _, leaf = rest.partition(".")
    return f"{part}.projector.{leaf}" if child in ("head", "fc") else f"{part}.trunk.{rest}"


def build(
    trace: Trace,
    world: World,
    precision: str,
    compile: bool,
    shard: str,
    replicate: int = 1,
    activation_checkpoint: str = "none",
    least: int = 1,
) -> TrainState:
    """The trace's networks in the real engine, with the trace's initial weights.

    least: parameters that travel together at least; 1: each block is a unit of its own, as in large models.
    """
    trunk = dict(trace.config["trunk"])
    kind, image_size = trunk.pop("kind"), trunk.pop("image_size")
    if kind == "resnet":
        build_trunk = Architecture("resnet", trunk).build
    else:
        frozen = trunk.pop("frozen_patch_projection")
        vit = Architecture("vit", {"image_size": image_size, "conv_stem": kind == "vit_conv", **trunk})
        build_trunk = partial(vit.build, freeze_patch_projection=frozen)
    with torch.device("meta"):
        moco = MoCo(build_trunk, trace.config["hidden_dim"], trace.config["output_dim"])
    mesh = make_mesh(world, shard, replicate)
    parallel = Parallel(
        compile=compile,
        precision=precision,
        shard=shard,
        replicate=replicate,
        activation_checkpoint=activation_checkpoint,
    )
    parallelize(moco, mesh, world.group, parallel, least)
    materialize(moco, world.device, moco.initial_values(seed=0))
    fill(moco, trace.initial())
    config = trace.config
    optimizer = Optimizer(name=config["optimizer"], base_lr=config["base_lr"], weight_decay=config["weight_decay"])
    return TrainState(
        moco, trace.schedule(), optimizer, temperature=config["temperature"], mesh=mesh, group=world.group
    )


@torch.no_grad()
def fill(moco: MoCo, values: dict[str, Tensor]) -> None:
    parameters = dict(moco.named_parameters())
    assert parameters.keys() == values.keys(), sorted(parameters.keys() ^ values.keys())
    for name, parameter in parameters.items():
        value = values[name].to(parameter)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        local(parameter).copy_(local(value))


def replay(
    trace: Trace,
    world: World,
    *,
    precision: str = "float64",
    compile: bool = False,
    shard: str = "full",
    replicate: int = 1,
    least: int = 1,
) -> dict[str, float]:
    """Run every step of the trace; returns steps, max_loss_rel, max_param_rel, max_buffer_rel."""
    state = build(trace, world, precision, compile, shard, replicate, least=least)
    dtype = torch.float64 if precision == "float64" else torch.float32
    rows = trace.config["global_batch"] // world.size
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    views = [trace[f"images.{view}"][:, mine].to(world.device, dtype) for view in (1, 2)]
    torch.compiler.set_stance("default")
    worst_loss = 0.0
    for step in range(trace.config["steps"]):
        output = train_step(state, torch.cat([view[step] for view in views]))
        torch.compiler.set_stance("fail_on_recompile")  # all that is compiled is compiled in the first step
        golden = trace["step.loss"][step].item()
        worst_loss = max(worst_loss, abs(global_loss(output, world) - golden) / abs(golden))
    return {"steps": trace.config["steps"], "max_loss_rel": worst_loss, **compare(trace, state)}


def global_loss(output: StepOutput, world: World) -> float:
    loss = output.loss.double()
    torch.distributed.all_reduce(loss, group=world.group)
    return loss.item() / world.size


def compare(trace: Trace, state: TrainState) -> dict[str, float]:
    """The final state against the trace's probes."""
    worst = {"max_param_rel": 0.0, "max_buffer_rel": 0.0}
    saved = {name.removeprefix("model."): tensor for name, tensor in state.saved.items()}
    ours = {n: (t.full_tensor() if isinstance(t, DTensor) else t) for n, t in saved.items()}  # all ranks in one order
    probed = {n.removeprefix("final.").rpartition(".")[0] for n in trace.names if n.startswith("final.")}
    assert {our_name(n) for n in probed} == ours.keys(), sorted({our_name(n) for n in probed} ^ ours.keys())
    for name in probed:
        tensor = ours[our_name(name)].detach().cpu().double().flatten()
        measure = "max_param_rel" if isinstance(saved[our_name(name)], torch.nn.Parameter) else "max_buffer_rel"
        pairs = [
            (tensor[trace[f"final.{name}.index"].long()], trace[f"final.{name}.value"].double()),
            (tensor.norm().reshape(1), trace[f"final.{name}.norm"].double().reshape(1)),
        ]
        for value, golden in pairs:
            difference = (value - golden).abs().max() / golden.abs().max().clamp(min=FLOOR)
            worst[measure] = max(worst[measure], difference.item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--precision", choices=("float32", "float64"), default="float64")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shard", choices=("full", "grad_op", "replicate"), default="full")
    options = parser.parse_args()
    with process_group() as world:
        result = replay(
            Trace(options.trace), world, precision=options.precision, compile=options.compile, shard=options.shard
        )
        if world.is_first:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
