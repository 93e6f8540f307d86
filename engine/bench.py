"""How fast the engine is: `mocov3 bench COMMAND ...`; step and checkpoint also with torchrun.

  step        a recipe's train step on made-up images, against the published code's way of doing the same
  loss        the contrastive loss at large batches, against the whole matrix of logits
  checkpoint  how long a save keeps a run from training
  data        decoding and cropping on one core, against the published code's pipeline

Each command says more with --help. No images of yours are needed. The last line on stdout is the result as JSON.
"""

import os
from argparse import Namespace
from pathlib import Path

from engine import cli, door
from engine.distributed.launcher import ranks
from engine.errors import UserError
from engine.recipe.load import check_world, load
from engine.recipe.sections import Pretrain


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.bench", __doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    COMMANDS[parser.parse_args(arguments[:1]).command](arguments[1:])


def step(arguments: list[str]) -> None:
    """The real augmentation and train step, on noise that already lies on the device.

    images_per_second  over all processes, in median steps after warm-up
    ratio              the reference's time over ours, measured by turns; on a CPU of CPU time, which neighbours do not
                       lengthen. Both sides have the engine's augmentation. null without --vs
    mfu                useful work per GPU over the dense bf16 peak of its data sheet: 2 views x (3 base + 1 momentum)
                       forwards of the trunk, nothing that is computed twice. null where the peak is not known
    peak_memory_gb     10^9 bytes of tensors; on a CPU the process's peak resident set
    graph_breaks       of compiled code; recompiles: after warm-up, over an epoch's end and changes of the rate
    steps              that were counted; parts: milliseconds of each, in steps of their own; on a CPU of CPU time

    --vs reference: eager, autocast, a forward for each view, attention with an explicit softmax, plain BatchNorm, one
    parameter at a time. reference+: the same with fused attention, torch.compile and channels_last.
    """
    parser = cli.Parser("engine.bench step", step.__doc__)
    parser.add_argument("--vs", choices=("none", "reference", "reference+"), default="none", help="default: none")
    parser.add_argument("--profile", type=Path, metavar="OUT.json", help="a trace of three more steps, for Perfetto")
    options, recipe = _read_recipe(parser, arguments)
    trace = options.profile
    if trace is not None and (trace.is_dir() or not os.access(trace.parent, os.W_OK)):
        raise UserError(f"--profile ({trace}) must be a file in a folder that exists and may be written; name another")

    with door.joined(str(options.recipe)) as world:
        from engine.benchmarks.step import measure_step

        found = measure_step(recipe, world, options.vs, trace)
    door.result(found)


def loss(arguments: list[str]) -> None:
    """One forward and backward of the loss of one view's queries, as one rank of a large batch computes it.

    peak_memory_gb is what memory grows by, queries and keys included; dense_seconds is null where the whole matrix of
    logits would not fit into half of the free memory.
    """
    parser = cli.Parser("engine.bench loss", loss.__doc__)
    for name, what in (("--global-batch", "keys, of all ranks"), ("--local-batch", "queries, of one rank")):
        parser.add_argument(name, type=cli.at_least(1, name, f"it is the number of {what}"), required=True, help=what)
    dim = cli.at_least(1, "--dim", "256 is usual")
    parser.add_argument("--dim", type=dim, default=256, help="their width (default: 256)")
    options = parser.parse_args(arguments)

    with door.joined("loss") as world:
        from engine.benchmarks.loss import measure_loss

        found = measure_loss(options.global_batch, options.local_batch, options.dim, world.device)
    door.result(found)


def checkpoint(arguments: list[str]) -> None:
    """The real save of the real state, into a temporary folder ($TMPDIR says on which disk) that is removed afterwards.

    stall_seconds is how long training stands still, step_seconds a step on made-up images, gigabytes 10^9 bytes.
    """
    parser = cli.Parser("engine.bench checkpoint", checkpoint.__doc__)
    options, recipe = _read_recipe(parser, arguments)

    with door.joined(str(options.recipe)) as world:
        from engine.benchmarks.checkpoint import measure_checkpoint

        found = measure_checkpoint(recipe, world)
    door.result(found)


def data(arguments: list[str]) -> None:
    """JPEG files to two views of 224 pixels, in CPU time on one core. The engine decodes and crops there and does the
    rest on the device; the published pipeline does all of it there.

    images_per_second_per_core            of files of 500 x 375 pixels, as most of ImageNet: parts of photographs
    reference_images_per_second_per_core  the published pipeline, by turns with the engine's
    ratio                                 of both; the three that begin with large_ are of files of 2000 x 1500 pixels
    """
    cli.Parser("engine.bench data", data.__doc__).parse_args(arguments)
    from engine.benchmarks.data import measure_data

    door.result(measure_data())


def _read_recipe(parser: cli.Parser, arguments: list[str]) -> tuple[Namespace, Pretrain]:
    """Options, and the recipe that they name with what they put in its place. Raises UserError."""
    cli.add_recipe(parser, "--recipe", required=True)
    batch = cli.at_least(2, "--batch", "BatchNorm and the loss need two images")
    parser.add_argument("--batch", type=batch, help="instead of the recipe's train.global_batch_size")
    cli.add_overrides(parser, "parallel.compile=false")
    options = parser.parse_intermixed_args(arguments)
    size = [] if options.batch is None else [f"train.global_batch_size={options.batch}"]
    recipe = load(options.recipe, [*size, *options.overrides])
    check_world(recipe, ranks())
    return options, recipe


COMMANDS = {"step": step, "loss": loss, "checkpoint": checkpoint, "data": data}

if __name__ == "__main__":
    door.enter(main)
