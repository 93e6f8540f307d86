"""Golden traces under every sharding, in one launch: prints one JSON line for each replay."""

import json
import sys
from pathlib import Path

from engine.distributed.world import process_group
from tests.replay import Trace, replay

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = ("A_vit_adamw", "B_resnet_lars", "C_conv_stem_adamw")
SHARDINGS = ("full", "grad_op", "hybrid", "replicate")
PAIR = 40_000  # parameters: more than one of the first trace's three blocks has, fewer than two


def main(which: str) -> None:
    """The first trace in float64 under every sharding, the others under one, and all in float32 under one.

    which: `all` for every trace under every sharding. Four ranks on a small machine replay the first trace alone.
    A ResNet's float32, which takes long, is one rank's or comes with `all`.
    """
    with process_group() as world:
        for name in TRACES if world.size < 4 else TRACES[:1]:
            is_first = name == TRACES[0]
            shardings = SHARDINGS if world.size > 1 and (is_first or which == "all") else ("full",)
            cases = [("float64", shard, 1) for shard in shardings]
            if world.size == 1 or which == "all" or name != "B_resnet_lars":
                cases.append(("float32", "full", 1))
            if is_first:  # two blocks in one unit, the third with the rest of the trunk
                cases += [("float64", shard, PAIR) for shard in shardings[:2]]
            for precision, shard, least in cases:
                replicas = max(world.size // 2, 1) if shard == "hybrid" else 1
                trace = Trace(GOLDEN / f"{name}.safetensors")
                result = replay(trace, world, precision=precision, shard=shard, replicate=replicas, least=least)
                if world.is_first:
                    print(json.dumps({"trace": name, "precision": precision, "shard": shard, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
