"""What a checkpoint of a ViT-L costs with many ranks, whose plans are made in one process: `python -m
tests.checkpoint.many RANKS [SHARD [REPLICATE]]` prints a row of a table, of CPU seconds.

What one rank has of each tensor is asked of torch, with the rank's place in a mesh that no process stands behind. So
what is made of it is the engine's own; what is missing is the network, and the writing of the tensors.
"""

import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.checkpoint.dcp import _Writer
from engine.checkpoint.manifest import METADATA, Manifest
from engine.checkpoint.metadata import checked
from engine.checkpoint.plan import Written, entries_of, own_shards, share_out, which
from engine.recipe.load import load
from engine.runs.pretrain import make_moco
from engine.training.parallelize import parallelize, saved

RECIPE = Path(__file__).parents[2] / "recipes/vit_l.yaml"
LENGTH = 1500  # bytes of a shard, about as they are with torch.save's frame; its size is of no account here


def make_tensors(ranks: int, shard: str, replicate: int) -> tuple[dict[str, Tensor], DeviceMesh]:
    """All that a checkpoint of the recipe holds, without memory, spread over a mesh of so many ranks."""
    recipe = load(RECIPE, ["parallel.compile=false", f"parallel.shard={shard}", f"parallel.replicate={replicate}"])
    copies = {"replicate": ranks, "hybrid": replicate}.get(shard, 1)
    mesh = init_device_mesh("cpu", (copies, ranks // copies), mesh_dim_names=("replicate", "shard"))
    moco = make_moco(recipe)
    parallelize(moco, mesh, dist.group.WORLD, recipe.parallel)
    tensors = {f"model.{name}": tensor for name, tensor in saved(moco).items()}
    for name, parameter in moco.named_parameters():
        if parameter.requires_grad:
            tensors |= {f"optimizer.{kind}.{name}": parameter.detach() for kind in ("exp_avg", "exp_avg_sq")}
            tensors[f"optimizer.step.{name}"] = torch.zeros(())
    return tensors, mesh


def stand_at(rank: int, tensors: dict[str, Tensor], mesh: DeviceMesh) -> None:
    """From now on this process has the place of a rank in every mesh."""
    place = dict(zip(mesh.mesh_dim_names, divmod(rank, mesh.shape[1]), strict=True))
    for own in {id(t.device_mesh): t.device_mesh for t in tensors.values() if isinstance(t, DTensor)}.values():
        own._coordinate_on_dim = tuple(place[name] for name in own.mesh_dim_names)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    began = time.process_time()
    found = work(*arguments)
    return time.process_time() - began, found


def sent(values: list[Any]) -> tuple[float, float, list[Any]]:
    """What one rank gets of all others: CPU seconds to make objects of what came, its MB, the objects."""
    packed = [pickle.dumps(value) for value in values]
    seconds, found = timed(lambda: [pickle.loads(each) for each in packed])
    return seconds, sum(map(len, packed)) / 1e6, found


def measure(ranks: int, shard: str, replicate: int) -> dict[str, str]:
    tensors, mesh = make_tensors(ranks, shard, replicate)
    found, longest = [], 0.0
    for rank in range(ranks):
        stand_at(rank, tensors, mesh)
        seconds, rows = timed(lambda: which(own_shards(tensors), tensors))
        longest = max(longest, seconds)
        found.append(rows)
    heard, megabytes, found = sent(found)
    shared, (turns, chunks) = timed(share_out, found, tensors)
    written = [
        Written(f"__{rank}_0.distcp", [(LENGTH * k, LENGTH) for k in range(len(turn))])
        for rank, turn in enumerate(turns)
    ]
    told, _, written = sent(written)
    with tempfile.TemporaryDirectory() as folder:
        made, table = timed(write_table, Path(folder), chunks, written)
        manifest = make_manifest(ranks, tensors)
        read, metadata = timed(checked, Path(folder), table, manifest)
    stand_at(ranks - 1, tensors, mesh)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata)
    planned, plan = timed(planner.create_local_plan)
    opened = {metadata.storage_data[item.storage_index].relative_path for item in plan.items}
    return {
        "ranks": f"{ranks:,}",
        "shard": shard,
        "shards": f"{len(chunks.row_CE):,}",
        "own": f"{longest:.2f} s",
        "plan": f"{heard + shared:.1f} s",
        "MB": f"{megabytes:.0f}",
        "first save": f"{told + made:.1f} s",
        ".metadata": f"{len(table) / 1e6:.0f} MB",
        "resume": f"{read + planned:.1f} s",
        "files": f"{len(opened):,}",
    }


def write_table(folder: Path, chunks: Any, written: list[Written]) -> bytes:
    """As engine.checkpoint.dcp.write does on rank 0."""
    writer = _Writer(folder)
    writer.set_up_storage_writer(True)
    table, results = chunks.table(written)
    writer.finish(table, [results])
    return (folder / METADATA).read_bytes()


def make_manifest(ranks: int, tensors: dict[str, Tensor]) -> Manifest:
    files = {f"__{rank}_0.distcp": {"bytes": 2**40, "sha256": ""} for rank in range(ranks)}
    return Manifest(1, ranks, "", files, entries_of(tensors), {})


def main(ranks: str, shard: str = "full", replicate: str = "1") -> None:
    dist.init_process_group("fake", rank=0, world_size=int(ranks), store=FakeStore())
    row = measure(int(ranks), shard, int(replicate))
    print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}\n| {' | '.join(row.values())} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
