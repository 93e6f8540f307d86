"""Pictures of what was learned, and of what the model will see.

  mocov3 show views RECIPE OUT [dotted.key=value ...]     images and their augmented views
  mocov3 show attention CHECKPOINT IMAGE OUT              where the class token of a ViT looks
  mocov3 show neighbours CHECKPOINT --data ROOT OUT       images and those most like them
      [--query photo.jpg]                                 of a file of yours instead
  mocov3 show embedding CHECKPOINT --data ROOT OUT        a map of the features

CHECKPOINT is a run directory, a checkpoint directory, an exported file or folder, weights of others or timm/<name>.
OUT ends in .png, .svg or .pdf; a file that is there is replaced.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli import (
    Parser,
    add_checkpoint,
    add_encoder,
    add_images,
    add_overrides,
    add_recipe,
    at_least,
    decoding_workers,
    image_roots,
    refuse,
)
from engine.door import enter, result
from engine.logger import note
from engine.recipe.load import load

if TYPE_CHECKING:
    from engine.pictures.features import Featured

QUERIES = 8


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    from engine.pictures.canvas import check_out  # tells before all else where matplotlib is missing

    check_out(options.out)
    options.show(options)
    result({"file": str(options.out)})


def _parser() -> Parser:
    parser = Parser("engine.show", __doc__)
    kinds = parser.add_subparsers(required=True, metavar="views | attention | neighbours | embedding")

    def add(show: Callable[[Namespace], None], *positional: Callable[[Parser], object]) -> Parser:
        kind = kinds.add_parser(show.__name__, description=show.__doc__)
        kind.set_defaults(show=show)
        for add_one in positional:
            add_one(kind)
        kind.add_argument("out", metavar="OUT", type=Path, help="a .png, .svg or .pdf; replaced if it is there")
        return kind

    def add_count(kind: Parser, name: str, default: int, what: str) -> None:
        count = at_least(1, name, f"{default} is usual")
        kind.add_argument(name, type=count, default=default, help=f"{what} (default: {default})")

    def add_image(kind: Parser) -> None:
        kind.add_argument("image", metavar="IMAGE")

    add_overrides(add(views, add_recipe), "run.seed=1")
    of_attention = add(attention, add_checkpoint, add_image)
    of_neighbours, of_map = add(neighbours, add_checkpoint), add(embedding, add_checkpoint)
    for kind in (of_attention, of_neighbours, of_map):
        add_encoder(kind)
    for kind in (of_neighbours, of_map):
        add_images(kind, "--data")
        what = "at most this many, evenly spread over ROOT's val images (all of ROOT where it has no val)"
        add_count(kind, "--images", 5000, what)
    queries = at_least(1, "--queries", f"{QUERIES} is usual")
    of_neighbours.add_argument("--queries", type=queries, help=f"rows (default: {QUERIES})")
    add_count(of_neighbours, "--k", 8, "neighbours of each")
    of_neighbours.add_argument("--query", type=Path, metavar="IMAGE", help="a file; the neighbours of it alone")
    of_map.add_argument("--method", choices=("pca", "tsne"), default="pca", help="default: pca")
    return parser


def views(options: Namespace) -> None:
    """Images beside both augmented views, as epoch 0 of a run of the recipe shows them to the model."""
    recipe = load(options.recipe, options.overrides)
    note("loading PyTorch")
    from engine.pictures.views import show_views

    show_views(recipe, options.recipe, options.out)


def attention(options: Namespace) -> None:
    """The attention of a ViT's class token to the patches of an image, in every head of the last block."""
    note("loading PyTorch")
    from engine.pictures.attention import show_attention

    show_attention(options.checkpoint, options.encoder, options.heads, Path(options.image), options.out)


def neighbours(options: Namespace) -> None:
    """Images and those whose features are nearest to theirs by cosine, framed by whether they share the class."""
    if options.query is not None:
        refuse(options, ["--queries"], "with --query IMAGE, whose neighbours alone are shown")
    note("loading PyTorch")
    from engine.pictures.neighbours import show_neighbours, show_query

    if options.query is not None:
        show_query(_featured(options), options.query, options.k, options.out)
    else:
        show_neighbours(_featured(options), options.queries or QUERIES, options.k, options.out)


def embedding(options: Namespace) -> None:
    """A map of images by their features, coloured by class; without classes some of the images themselves are on it."""
    note("loading PyTorch")
    from engine.pictures.map import check_method, show_map

    check_method(options.method)
    show_map(_featured(options), options.method, options.out)


def _featured(options: Namespace) -> "Featured":
    from engine.pictures.features import open_featured

    (root,) = image_roots(options, "--data")
    workers = decoding_workers(options)
    choice = {"encoder": options.encoder, "heads": options.heads}
    return open_featured(options.checkpoint, root, options.out, at_most=options.images, workers=workers, **choice)


if __name__ == "__main__":
    enter(main)
