"""Two ranks that meet the same unreadable images in other epochs; prints the counts that rank 0 has, as JSON."""

import json

from engine.data.bad_images import Bad, BadImages
from engine.distributed.world import process_group

RANKS = 2
MET = ([["a"], ["b"]], [["b"], ["a", "c"]], [["c", "b"], []], [["d", "d"], []])  # {epoch}{rank}


def main() -> None:
    with process_group() as world:
        run, counts = BadImages(1.0, world), []
        for epoch in MET:
            run.meet([Bad(f"{name}.png", "no image") for name in epoch[world.rank]])
            counts.append(run.count())
        if world.is_first:
            print(json.dumps({"counts": counts}), flush=True)


if __name__ == "__main__":
    main()
