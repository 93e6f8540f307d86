"""Evaluate a network: `python -m engine.evaluate COMMAND CHECKPOINT ...`, or torchrun with any number of ranks.

  knn       how many validation images their nearest training images classify rightly
  rankme    the effective rank of the features; needs no labels
  linear    a linear classifier on the frozen features: the paper's protocol, or --fast, which is not
  finetune  the whole network and a classifier trained on labels, all of them or a few

Each command says more with --help. The last line on stdout is the result as JSON.
"""

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli import (
    Parser,
    add_checkpoint,
    add_encoder,
    add_images,
    add_overrides,
    decoding_workers,
    enter,
    given_source,
    result,
    source_kind,
)
from engine.errors import UserError
from engine.logger import say_once
from engine.recipe.keys import wrong
from engine.recipe.load import AnyRecipe, check_world, load, locate
from engine.recipe.sections import Finetune, Linear

if TYPE_CHECKING:
    from engine.data.source import Root
    from engine.data.splits import Splits
    from engine.distributed.world import World
    from engine.evaluation.subject import Subject


def main(arguments: list[str]) -> None:
    parser = Parser("engine.evaluate", __doc__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    COMMANDS[parser.parse_args(arguments[:1]).command](arguments[1:])


def knn(arguments: list[str]) -> None:
    """Weighted k-nearest-neighbour classification: val's images by the labels of the nearest of train's."""
    parser = _parser("knn", knn.__doc__)
    add_images(parser, "--train", "--val")
    _add_network(parser)
    parser.add_argument("--k", default="20", help="neighbours that vote; several as 10,20,100 (default: 20)")
    options = parser.parse_args(arguments)
    ks = _read_ks(options.k)

    _say_loading(options)
    from engine.distributed.world import process_group
    from engine.evaluation.measure import measure_knn

    with process_group() as world:
        subject, sources = _open_both(options, world)
        results = measure_knn(subject, sources, ks, world, decoding_workers(options))
    rows = [f"{r['k']:>6} {100 * r['top1']:>7.2f} {100 * r['top5']:>7.2f}" for r in results]
    result(results[0], "\n".join(["     k   top-1   top-5", *rows]) if len(ks) > 1 else None)


def rankme(arguments: list[str]) -> None:
    """RankMe (Garrido et al. 2023): how many directions the features really use."""
    parser = _parser("rankme", rankme.__doc__)
    add_images(parser, "--data")
    _add_network(parser)
    options = parser.parse_args(arguments)

    _say_loading(options)
    from engine.data.splits import open_unlabelled
    from engine.distributed.world import process_group
    from engine.evaluation.measure import measure_rankme
    from engine.evaluation.subject import open_subject_together

    with process_group() as world:
        source = open_unlabelled(_roots(options, "--data")[0], world)
        subject = open_subject_together(options.checkpoint, world, **_network(options))
        found = measure_rankme(subject, source, world, decoding_workers(options))
    result({"rankme": found})


def linear(arguments: list[str]) -> None:
    """A linear classifier on frozen features.

    With --recipe the paper's protocol: augmented images, 90 epochs, a run directory that the same command resumes.
    With --fast features are taken once, of the centre crop, and many learning rates and weight decays are trained on
    them at once. That takes minutes, is not the paper's protocol, and reports the best on val of many, so its number is
    a little too good.
    """
    parser = _parser("linear", linear.__doc__)
    add_images(parser, "--train", "--val", required=False)
    _add_network(parser)
    _add_run(parser, "recipes/linear_vit.yaml or recipes/linear_resnet50.yaml")
    parser.add_argument("--fast", action="store_true", help="minutes, and not the paper's protocol")
    options = parser.parse_intermixed_args(arguments)
    _check_belongs(options)
    _fast_linear(options) if options.fast else _paper_linear(options)


def finetune(arguments: list[str]) -> None:
    """All of a network and a classifier on it, trained on labelled images as DeiT is.

    The run directory is resumed by the same command. --labels 1% takes that share of the training images, as many of
    every class.
    --baseline initial starts from the network as it was before pre-training: what the labels teach alone.
    """
    parser = _parser("finetune", finetune.__doc__)
    add_images(parser, "--train", "--val", required=False)
    add_encoder(parser)
    parser.add_argument("--baseline", choices=("initial",), help="start from the untrained network instead")
    _add_run(parser, "recipes/finetune_vit_b.yaml or another of task finetune")
    options = parser.parse_intermixed_args(arguments)
    _check_baseline(options)
    if options.recipe is None:
        raise UserError("--recipe (missing) must be recipes/finetune_vit_b.yaml or another of task finetune")
    recipe = _run_recipe(options, Finetune)

    _say_loading(options)
    from engine.distributed.world import process_group
    from engine.runs.finetune import finetune as run

    with process_group() as world:
        found = run(recipe, options.checkpoint, options.encoder, options.baseline, world)
    result(found)


def _fast_linear(options: argparse.Namespace) -> None:
    _say_loading(options)
    from engine.distributed.world import process_group
    from engine.evaluation.fast_linear import best, table
    from engine.evaluation.measure import measure_fast_linear

    with process_group() as world:
        subject, sources = _open_both(options, world)
        scores = measure_fast_linear(subject, sources, world, decoding_workers(options))
    top = best(scores)
    result({"top1": top.top1, "top5": top.top5, **top.candidate._asdict()}, table(scores))


def _paper_linear(options: argparse.Namespace) -> None:
    recipe = _run_recipe(options, Linear)

    _say_loading(options)
    from engine.distributed.world import process_group
    from engine.runs.linear import probe

    with process_group() as world:
        found = probe(recipe, options.checkpoint, options.encoder, world)
    result(found)


def _open_both(options: argparse.Namespace, world: "World") -> tuple["Subject", "Splits"]:
    """The network and the labelled images to measure it on; the images first, for their mistakes cost the least."""
    from engine.data.splits import open_labelled
    from engine.evaluation.subject import open_subject_together

    sources = open_labelled(*_roots(options, "--train", "--val"), world)
    return open_subject_together(options.checkpoint, world, **_network(options)), sources


COMMANDS = {"knn": knn, "rankme": rankme, "linear": linear, "finetune": finetune}


# ---- arguments -------------------------------------------------------------------------------------------------------


def _parser(command: str, text: str) -> Parser:
    parser = Parser(f"engine.evaluate {command}", text)
    add_checkpoint(parser)
    return parser


def _add_network(parser: Parser) -> None:
    add_encoder(parser)
    parser.add_argument("--features", help="of a ViT: cls, mean (of the patches) or last4 (CLS of four blocks)")
    parser.add_argument(
        "--baseline", choices=("initial", "pixels"), help="measure the untrained network, or no network, instead"
    )
    parser.add_argument("--crop-fraction", type=float, help="of the resized shorter side (default: as it was trained)")


def _add_run(parser: Parser, recipes: str) -> None:
    parser.add_argument("--recipe", type=Path, help=recipes)
    parser.add_argument("--out", type=Path, metavar="RUN_DIR", help="instead of the recipe's run.dir")
    parser.add_argument(
        "--labels", metavar="SHARE", help="of the training images, as many of every class, as 1%% (default: all)"
    )
    add_overrides(parser, "train.epochs=30")


def _run_recipe(options: argparse.Namespace, kind: type[AnyRecipe]) -> AnyRecipe:
    """The recipe with what the command line says in its place."""
    given = {"data.root": options.train, "data.val_root": options.val, "data.dataset": options.dataset}
    given |= {"data.source": given_source(options), "data.workers": options.workers}
    given["run.dir"] = options.out and str(options.out)
    given["data.labels"] = options.labels and read_share(options.labels, "--labels")
    recipe = _load(options, given, kind)
    if (options.train is None) != (options.val is None):
        missing, other = ("--train", "--val") if options.train is None else ("--val", "--train")
        raise UserError(f"{missing} (missing) must be given with {other}; pass both, or none for the recipe's own")
    if options.train is None:
        roots = {"data.root": recipe.data.root, "data.val_root": recipe.data.val_root}
        given |= {key: root and str(locate(root, options.recipe)) for key, root in roots.items()}
    elif given["data.source"] is None and recipe.data.source != "torchvision":
        # A torchvision dataset's root looks like any folder: the recipe knows better than a guess.
        given["data.source"] = source_kind(options, options.train)
    recipe = _load(options, given, kind)
    check_world(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    return recipe


def _load(options: argparse.Namespace, given: dict[str, Any], kind: type[AnyRecipe]) -> AnyRecipe:
    # JSON is YAML: no path is taken for another kind of value.
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return load(options.recipe, [*overrides, *options.overrides], kind)


def _roots(options: argparse.Namespace, *names: str) -> "list[Root]":
    """Where the options of these names say that images are, all of the first one's kind."""
    from engine.data.source import Root

    paths = [getattr(options, name[2:]) for name in names]
    kind = source_kind(options, paths[0])
    return [Root(kind, Path(path), name, options.dataset) for name, path in zip(names, paths, strict=True)]


def _network(options: argparse.Namespace) -> dict[str, Any]:
    """What `open_subject_together` is to know."""
    fraction = options.crop_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"--crop-fraction ({fraction}) must be > 0 and <= 1; 0.875 is usual")
    if options.baseline == "pixels" and options.features:
        raise UserError(f"--features ({options.features}) must be left out for --baseline pixels, which has none")
    _check_baseline(options)
    names = ("encoder", "features", "baseline", "crop_fraction")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _check_baseline(options: argparse.Namespace) -> None:
    if options.baseline and options.encoder == "momentum":
        raise UserError(f"--encoder (momentum) must be left out for --baseline {options.baseline}")


def _check_belongs(options: argparse.Namespace) -> None:
    """Raises UserError for what only the other of linear's two ways takes."""
    if options.fast:
        for name in ("--train", "--val"):
            if getattr(options, name[2:]) is None:
                raise UserError(f"{name} (missing) must be a folder of images, tars or one tar; pass {name} ROOT")
        given = {"--recipe": options.recipe, "--out": options.out, "--labels": options.labels}
        given["dotted.key=value"] = options.overrides
        do = "; leave out --fast for the paper's protocol"
    else:
        given = {name: getattr(options, name[2:].replace("-", "_")) for name in ("--features", "--baseline")}
        given["--crop-fraction"] = options.crop_fraction
        do = "; the recipe's evaluate.crop_fraction is the crop" if options.crop_fraction else ", or pass --fast"
    for name, value in given.items():
        if value:
            shown = " ".join(value) if isinstance(value, list) else value
            raise UserError(f"{name} ({shown}) must be left out {'with' if options.fast else 'without'} --fast{do}")
    if not options.fast and options.recipe is None:
        raise UserError("--recipe (missing) must be recipes/linear_vit.yaml or another of task linear; or pass --fast")


def _read_ks(text: str) -> list[int]:
    ks = text.split(",")
    if not all(k.isascii() and k.isdigit() and 0 < int(k) < 2**31 for k in ks):
        raise UserError(f"--k ({text}) must be a number >= 1, or several as 10,20,100; 20 is usual")
    return [int(k) for k in ks]


def read_share(text: str, key: str) -> float:
    """The fraction, above 0 and up to 1, that a percentage as "1%" says. Raises UserError, which calls it `key`."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)%", text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise wrong(key, text, "a percentage above 0% and up to 100%, as 1%", f"pass {key}=1%")
    return share


def _say_loading(options: argparse.Namespace) -> None:
    """These imports take seconds, and a mistake in the arguments should show before."""
    say_once(f"{options.checkpoint}: loading PyTorch")


if __name__ == "__main__":
    enter(main)
