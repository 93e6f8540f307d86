"""Golden traces under each activation checkpoint beside none; prints one JSON line for each pair."""

import json
import sys
from collections.abc import Callable

import torch

from engine.distributed.world import process_group
from engine.torch_internals import keeping
from engine.training import parallelize
from tests.distributed.micro_batches import Run, difference
from tests.distributed.replays import TRACES
from tests.replay import compare

MODES = {
    "A_vit_adamw": ("selective", "full"),
    "B_resnet_lars": ("selective",),
    "C_conv_stem_adamw": ("selective", "full"),
}


def main(*options: str) -> None:
    """options: `compile`, for compiled steps; `partition`, for steps as compiled code divides them into forward and
    backward pass, which need no C++ compiler; a trace, in place of all."""
    compile = "compile" in options or "partition" in options
    if "partition" in options:
        parallelize.compiled = partitioned
    with process_group() as world:
        for trace in [name for name in TRACES if name in options] or TRACES:
            plain = Run(world, "full", None, compile=compile, trace=trace)
            expected, sent = steps_and_sent(plain, world.group)
            for mode in MODES[trace]:
                # Pieces too, of the trunk that takes them: a forward without a graph and one with it.
                for pieces in (None, 2) if trace == TRACES[0] and not compile else (None,):
                    run = Run(world, "full", pieces, compile=compile, trace=trace, checkpoint=mode)
                    steps, sent_too = steps_and_sent(run, world.group)
                    found = {
                        "trace": trace,
                        "mode": mode,
                        "pieces": pieces,
                        "difference": difference(steps, expected),
                        "golden": compare(run.trace, run.state),
                        "collectives": run.collectives,
                        "collectives_none": plain.collectives,
                        "sent": sent_too - sent,
                        "kept": run.kept.peak / plain.kept.peak,
                    }
                    if world.is_first:
                        print(json.dumps(found), flush=True)


def partitioned(function: Callable, kept: float = 1.0) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=keeping(kept, "aot_eager_decomp_partition"))


def steps_and_sent(run: Run, group: torch.distributed.ProcessGroup) -> tuple[list, int]:
    """What the steps saw, and how many messages the group sent in them, which compiled code does not hide."""
    before = group._get_sequence_number_for_group()
    return run.steps(), group._get_sequence_number_for_group() - before


if __name__ == "__main__":
    main(*sys.argv[1:])
