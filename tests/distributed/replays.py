"""Golden traces under every sharding, in one launch: prints one JSON line for each replay."""

import json
import sys
from pathlib import Path

from engine.distributed.world import process_group
from tests.replay import Trace, replay

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
SHARDINGS = ("full", "grad_op", "hybrid", "replicate")


def main(which: str) -> None:
    """The first trace in float64 under every sharding, the others under one, and all in float32 under one.

    which: `all` for every trace under every sharding. Four ranks on a small machine replay the first trace alone.
    """
    with process_group() as world:
        for name in TRACES if world.size < 4 else TRACES[:1]:
            shardings = SHARDINGS if world.size > 1 and (name == TRACES[0] or which == "all") else ("full",)
            for precision in ("float64", "float32"):
                for shard in shardings if precision == "float64" else ("full",):
                    replicas = max(world.size // 2, 1) if shard == "hybrid" else 1
                    trace = Trace(GOLDEN / f"{name}.safetensors")
                    result = replay(trace, world, precision=precision, shard=shard, replicate=replicas)
                    if world.is_first:
                        print(json.dumps({"trace": name, "precision": precision, "shard": shard, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
