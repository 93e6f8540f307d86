"""Golden traces under every sharding, in one launch: prints one JSON line for each replay."""

import json
import sys
from pathlib import Path

from engine.distributed import process_group
from tests.replay import Trace, replay

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
SHARDINGS = ("full", "grad_op", "hybrid", "replicate")


def main(precisions: list[str]) -> None:
    with process_group() as world:
        for name in TRACES:
            for precision in precisions:
                for shard in SHARDINGS if precision == "float64" else ("full",):
                    replicas = max(world.size // 2, 1) if shard == "hybrid" else 1
                    trace = Trace(GOLDEN / f"{name}.safetensors")
                    result = replay(trace, world, precision=precision, shard=shard, replicate=replicas)
                    if world.is_first:
                        print(json.dumps({"trace": name, "precision": precision, "shard": shard, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
