"""Pictures of what was learned, and of what the model will see.

  python -m engine.show views RECIPE OUT [dotted.key=value ...]     images and their augmented views
  python -m engine.show attention CHECKPOINT IMAGE OUT              where the class token of a ViT looks
  python -m engine.show neighbours CHECKPOINT --data ROOT OUT       images and those most like them
  python -m engine.show embedding CHECKPOINT --data ROOT OUT        a map of the features

CHECKPOINT is a run directory, a checkpoint directory, an exported file or folder, a published .pth.tar or timm/<name>.
OUT ends in .png, .svg or .pdf; a file that is there is replaced.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.cli import Parser, enter
from engine.errors import UserError
from engine.logger import say_once
from engine.recipe.load import load

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from engine.data.loader import EvalBatch
    from engine.data.sources import Source
    from engine.weights.opening import Encoder
    from engine.weights.weights import About

VIEWED = 6  # images in `views`
BATCH = 128


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    from engine.pictures.canvas import check_out

    check_out(options.out)
    options.show(options)
    print(json.dumps({"file": str(options.out)}))


def _parser() -> Parser:
    parser = Parser("engine.show", __doc__)
    kinds = parser.add_subparsers(required=True, metavar="views | attention | neighbours | embedding")

    def add(show: Callable[[argparse.Namespace], None], *positional: str) -> Parser:
        kind = kinds.add_parser(show.__name__, description=show.__doc__)
        kind.set_defaults(show=show)
        for each in positional:
            kind.add_argument(each, metavar=each.upper())
        kind.add_argument("out", metavar="OUT", type=Path, help="a .png, .svg or .pdf; replaced if it is there")
        return kind

    add(views, "recipe").add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="of the recipe"
    )
    add(attention, "checkpoint", "image")
    with_queries, with_method = add(neighbours, "checkpoint"), add(embedding, "checkpoint")
    for kind in (with_queries, with_method):
        kind.add_argument("--data", required=True, metavar="ROOT", type=Path, help="its val images where it has some")
        kind.add_argument("--source", choices=("folder", "shards", "torchvision"), help="default: tars are shards")
        kind.add_argument("--dataset", help="class name, for torchvision")
        kind.add_argument("--images", type=_at_least(1), default=5000, help="at most, evenly spread (default: 5000)")
        kind.add_argument(
            "--workers", type=_at_least(0), default=min(8, os.cpu_count() or 1), help="processes that read images"
        )
    with_queries.add_argument("--queries", type=_at_least(1), default=8, help="rows (default: 8)")
    with_queries.add_argument("--k", type=_at_least(1), default=8, help="neighbours of each (default: 8)")
    with_method.add_argument("--method", choices=("pca", "tsne"), default="pca", help="default: pca")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
        return value

    return number


# ---- the pictures ----------------------------------------------------------------------------------------------------


def views(options: argparse.Namespace) -> None:
    """Images beside both augmented views, as epoch 0 of a run of the recipe shows them to the model."""
    recipe = load(options.recipe, options.overrides)
    say_once("loading PyTorch")
    import numpy as np
    import torch

    from engine.data import bad_images
    from engine.data.decode import crop_box, crop_draws
    from engine.data.loader import train_batches
    from engine.data.splits import open_sources
    from engine.distributed.world import process_group
    from engine.pictures.pictures import Sample, draw_views
    from engine.runs.pretrain import make_augment

    with process_group() as world:
        source = open_sources(recipe, Path(options.recipe), world).train
    size, augment, seed = recipe.model.image_size, recipe.augment, recipe.run.seed
    # An epoch's order does not depend on the batch, so these are the first of the run's first batch.
    shares = {"global_batch_size": min(VIEWED, len(source)), "rank": 0, "world_size": 1}
    form = {"image_size": size, "crop_min": augment.crop_min, "workers": 0, "pin_memory": False}
    batch = next(iter(train_batches(source, seed=seed, first_step=0, last_step=1, **shares, **form)))
    bad_images.report(batch.bad, "it is left out of the picture")
    unreadable = {bad.name for bad in batch.bad}

    eager = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, compile=False))
    normalised = make_augment(eager, torch.float32)(batch.crops, batch.sample_B, 0).unflatten(0, (2, -1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    view_B2SS3 = (normalised * std + mean).clamp(0, 1).permute(1, 0, 3, 4, 2).numpy()
    samples = []
    for i, view_2SS3 in zip(batch.sample_B.tolist(), view_B2SS3, strict=True):
        if source.name(i) in unreadable:
            continue
        image = source.read(i)
        draws = [crop_draws(seed, 0, torch.tensor([i]), view)[0] for view in (0, 1)]
        boxes = [crop_box(draw_D, image.height, image.width, augment.crop_min) for draw_D in draws]
        samples.append(Sample(np.asarray(image), boxes, view_2SS3))
    title = f"What the model sees: {Path(options.recipe).stem}"
    subtitle = f"The first images of epoch 0, seed {seed}: their two crops, and the views of {size} pixels made of them"
    draw_views(samples, title, subtitle, options.out)


def attention(options: argparse.Namespace) -> None:
    """The attention of a ViT's class token to the patches of an image, in every head of the last block."""
    say_once("loading PyTorch")
    import torch

    from engine.data.decode import center_crop, decode
    from engine.pictures.attention import check_attention, class_attention
    from engine.pictures.pictures import draw_attention
    from engine.weights.opening import open_encoder

    try:
        image = decode(Path(options.image).read_bytes())
    except Exception as error:  # broken files make Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"IMAGE ({options.image}) must be a readable image: {reason}; pass another") from error
    encoder = open_encoder(options.checkpoint)
    check_attention(encoder.trunk, options.checkpoint)
    about = encoder.about
    image_3SS = center_crop(image, about.image_size, about.crop_fraction)
    mean, std = (torch.tensor(values)[:, None, None] for values in (about.mean, about.std))
    attention_HRC = class_attention(encoder.trunk, ((image_3SS / 255 - mean) / std)[None])[0]
    title = f"What the class token looks at: {Path(options.image).name}"
    subtitle = "Attention to each patch in the last block; brightest: the largest of each picture"
    draw_attention(image_3SS.permute(1, 2, 0).numpy(), attention_HRC.numpy(), title, subtitle, options.out)


def neighbours(options: argparse.Namespace) -> None:
    """Images and those whose features are nearest to theirs by cosine, framed by whether they share the class."""
    say_once("loading PyTorch")
    import torch

    from engine.pictures.geometry import nearest, spread
    from engine.pictures.pictures import Gallery, draw_neighbours

    encoder, source = _open(options)
    feature_ND, id_N, label_N = _features(encoder, source, options)
    query_Q = spread(label_N, options.queries)
    row_QK = torch.cat((query_Q[:, None], nearest(feature_ND, query_Q, options.k)), dim=1)
    image_QKSS3 = _images(source, id_N[row_QK.flatten()], encoder.about).unflatten(0, row_QK.shape)
    gallery = Gallery(image_QKSS3.numpy(), label_N[row_QK].numpy(), source.classes or ())
    draw_neighbours(
        gallery, f"Nearest neighbours: {_name(options)}", f"By cosine, among {_among(source, id_N)}", options.out
    )


def embedding(options: argparse.Namespace) -> None:
    """A map of images by their features, coloured by class where they have one."""
    from engine.pictures.geometry import check_method, flat_map

    check_method(options.method)
    say_once("loading PyTorch")
    from engine.pictures.pictures import draw_map

    encoder, source = _open(options)
    feature_ND, id_N, label_N = _features(encoder, source, options)
    places = flat_map(feature_ND, options.method)
    title = f"Map of the features: {_name(options)}"
    method = {"pca": "principal components", "tsne": "t-SNE"}[options.method]
    subtitle = f"{_among(source, id_N)[0].upper()}{_among(source, id_N)[1:]} by {method}"
    draw_map(places, label_N.numpy(), source.classes or (), title, subtitle, options.out)


def _open(options: argparse.Namespace) -> "tuple[Encoder, Source]":
    """The trunk, and the validation images of --data; all of its images where it tells none apart."""
    from engine.data.sources import guess_kind, open_source
    from engine.weights.opening import open_encoder

    if (options.dataset is not None) != (options.source == "torchvision"):
        raise UserError(f"--dataset ({options.dataset}) must go with --source torchvision; pass both, or neither")
    kind = options.source or guess_kind(options.data)
    where = {"dataset": options.dataset, "key": "--data"}
    source = open_source(kind, options.data, "val", **where) or open_source(kind, options.data, "train", **where)
    return open_encoder(options.checkpoint), source


def _features(encoder: "Encoder", source: "Source", options: argparse.Namespace) -> "tuple[Tensor, Tensor, Tensor]":
    """(feature_ND, id_N, label_N) of at most --images images, evenly spread over the source."""
    import numpy as np
    import torch

    from engine.evaluation.features import extract

    about, device = encoder.about, "cuda" if torch.cuda.is_available() else "cpu"
    ids = np.linspace(0, len(source) - 1, min(options.images, len(source))).round().astype(np.int64)
    form = {"mean": about.mean, "std": about.std, "device": device, "dtype": torch.float32}
    return extract(encoder.trunk.to(device), _batches(source, ids, about, options.workers), **form)


def _images(source: "Source", id_N: "Tensor", about: "About") -> "Tensor":
    """uint8 [N, S, S, 3]: what the trunk sees of these images, which were readable before."""
    import torch

    images = [batch.images[: batch.valid] for batch in _batches(source, id_N.numpy(), about, workers=0)]
    return torch.cat(images).permute(0, 2, 3, 1)


def _batches(source: "Source", ids: "np.ndarray", about: "About", workers: int) -> "Iterator[EvalBatch]":
    from engine.data import bad_images
    from engine.data.loader import eval_batches

    form = {"batch_size": BATCH, "image_size": about.image_size, "crop_fraction": about.crop_fraction}
    for batch in eval_batches(source, ids, workers=workers, **form):
        bad_images.report(batch.bad, "it is left out of the picture")
        yield batch


def _name(options: argparse.Namespace) -> str:
    return options.checkpoint if options.checkpoint.startswith("timm/") else Path(options.checkpoint).resolve().name


def _among(source: "Source", id_N: "Tensor") -> str:
    of = f" of {len(source):,}" if len(id_N) < len(source) else ""
    return f"{len(id_N):,}{of} images" + ("" if source.classes is None else f" of {len(source.classes)} classes")


if __name__ == "__main__":
    enter(main)
