"""Evaluate a network: `mocov3 evaluate COMMAND CHECKPOINT ...`, or `torchrun ... -m engine.evaluate` on several ranks.

  knn       how many validation images their nearest training images classify rightly
  rankme    the effective rank of the features; needs no labels
  linear    a linear classifier on the frozen features: the paper's protocol, or --fast, which is not
  finetune  the whole network and a classifier trained on labels, all of them or a few

Each command says more with --help. The last line on stdout is the result as JSON.
"""

from argparse import Namespace

from engine import cli, door
from engine.recipe.sections import Finetune, Linear

SIDES = ("--train", "--val")


def main(arguments: list[str]) -> None:
    parser = cli.Parser("engine.evaluate", __doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    COMMANDS[parser.parse_args(arguments[:1]).command](arguments[1:])


def knn(arguments: list[str]) -> None:
    """Weighted k-nearest-neighbour classification: val's images by the labels of the nearest of train's."""
    parser = cli.Parser("engine.evaluate knn", knn.__doc__)
    cli.add_subject(parser, *SIDES)
    parser.add_argument("--k", type=cli.read_k, default=[20], help="neighbours that vote: 20, or 10,20,100")
    options = parser.parse_args(arguments)
    choice, workers = cli.read_choice(options), cli.decoding_workers(options)

    with door.joined(options.checkpoint) as world:
        from engine.evaluation.measure import knn_result, knn_table, measure_knn

        found = measure_knn(options.checkpoint, *cli.image_roots(options, *SIDES), options.k, world, workers, **choice)
    door.result(knn_result(found), knn_table(found))


def rankme(arguments: list[str]) -> None:
    """RankMe (Garrido et al. 2023): how many directions the features really use."""
    parser = cli.Parser("engine.evaluate rankme", rankme.__doc__)
    cli.add_subject(parser, "--data")
    options = parser.parse_args(arguments)
    choice, workers = cli.read_choice(options), cli.decoding_workers(options)

    with door.joined(options.checkpoint) as world:
        from engine.evaluation.measure import measure_rankme

        found = measure_rankme(options.checkpoint, *cli.image_roots(options, "--data"), world, workers, **choice)
    door.result({"rankme": found})


def linear(arguments: list[str]) -> None:
    """A linear classifier on frozen features.

    With --recipe the paper's protocol: augmented images, 90 epochs, a run directory that the same command resumes.
    With --fast features are taken once, of the centre crop, and many learning rates and weight decays are trained on
    them at once. That takes minutes, is not the paper's protocol, and its number, the best of many, is a little high.
    """
    parser = cli.Parser("engine.evaluate linear", linear.__doc__)
    cli.add_subject(parser, *SIDES, required=False)
    cli.add_labelled_run(
        parser,
        "linear_vit (the paper's), linear_small (a few thousand images) or another of task linear; or pass --fast",
    )
    parser.add_argument("--fast", action="store_true", help="minutes, and not the paper's protocol")
    options = parser.parse_intermixed_args(arguments)
    _fast_linear(options) if options.fast else _paper_linear(options)


def _fast_linear(options: Namespace) -> None:
    where = "with --fast; leave out --fast for the paper's protocol"
    cli.refuse(options, ["--recipe", "--out", cli.OVERRIDES], where)
    cli.require(options, SIDES, f"{cli.IMAGES}; pass --train and --val")
    share = cli.read_share(options.labels, "--labels") if options.labels else 1.0
    choice, workers = cli.read_choice(options), cli.decoding_workers(options)

    with door.joined(options.checkpoint) as world:
        from engine.evaluation.fast_linear import best, table
        from engine.evaluation.measure import measure_fast_linear

        roots = cli.image_roots(options, *SIDES)
        scores = measure_fast_linear(options.checkpoint, *roots, world, workers, share=share, **choice)
    door.result(best(scores), table(scores))


def _paper_linear(options: Namespace) -> None:
    cli.refuse(options, ["--features", "--baseline"], "without --fast, or pass --fast")
    cli.refuse(options, ["--crop-fraction"], "without --fast; the recipe's evaluate.crop_fraction is the crop")
    recipe = cli.read_labelled_run(options, Linear)

    with door.joined(options.checkpoint) as world:
        from engine.runs.linear import linear as run

        found = run(recipe, options.checkpoint, options.encoder, world, options.heads)
    door.result(found)


def finetune(arguments: list[str]) -> None:
    """All of a network and a classifier on it, trained on labelled images as DeiT is.

    The run directory is resumed by the same command. --labels 1% takes that share of the training images, as many of
    every class. --baseline initial starts from the network as it was before pre-training: what labels teach alone.
    """
    parser = cli.Parser("engine.evaluate finetune", finetune.__doc__)
    cli.add_network(parser, "initial")
    cli.add_images(parser, *SIDES, required=False)
    cli.add_labelled_run(
        parser, "finetune_vit_b (the paper's), finetune_small (a few thousand images) or another of task finetune"
    )
    options = parser.parse_intermixed_args(arguments)
    cli.check_baseline(options)
    recipe = cli.read_labelled_run(options, Finetune)

    with door.joined(options.checkpoint) as world:
        from engine.runs.finetune import finetune as run

        found = run(recipe, options.checkpoint, options.encoder, options.baseline, world, options.heads)
    door.result(found)


COMMANDS = {"knn": knn, "rankme": rankme, "linear": linear, "finetune": finetune}

if __name__ == "__main__":
    door.enter(main)
