"""Golden traces under every sharding, in one launch: prints one JSON line for each replay."""

import json
from pathlib import Path

from engine.distributed.world import process_group
from tests.replay import Trace, replay

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
SHARDINGS = ("full", "grad_op", "hybrid", "replicate")


def main() -> None:
    """float64 under every sharding, float32 under one; four ranks on a small machine replay the first trace alone."""
    with process_group() as world:
        for name in TRACES if world.size < 4 else TRACES[:1]:
            for precision in ("float64", "float32"):
                for shard in SHARDINGS if precision == "float64" and world.size > 1 else ("full",):
                    replicas = max(world.size // 2, 1) if shard == "hybrid" else 1
                    trace = Trace(GOLDEN / f"{name}.safetensors")
                    result = replay(trace, world, precision=precision, shard=shard, replicate=replicas)
                    if world.is_first:
                        print(json.dumps({"trace": name, "precision": precision, "shard": shard, **result}), flush=True)


if __name__ == "__main__":
    main()
