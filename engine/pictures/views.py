"""Images beside both augmented views, as epoch 0 of a run of a recipe shows them to the model.

Shapes: B images, S side of a view.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data import bad_images
from engine.data.augment import Augment, denormalise
from engine.data.decode import Crops, Reading, crop_box, to_rgb
from engine.data.leaving_out import leave_out
from engine.data.loader import Batch, train_batches
from engine.data.order import Order
from engine.data.outputs import check_picture
from engine.data.source import Source
from engine.data.splits import open_splits
from engine.data.workers import Workers
from engine.distributed.world import process_group
from engine.pictures.canvas import COLOURS, HEADER, INK, MARGIN, WIDTH, Sheet, style
from engine.recipe.sections import Pretrain

SHOWN = 6  # images
GAP = 6
NAMES = 62  # room for the names of the rows
VIEW_COLOURS = COLOURS[:2]


class Sample(NamedTuple):
    """An image, where its two views were cut out ((top, left, height, width) in its pixels), and the views.

    image uint8 [height, width, 3]; views: two of float [S, S, 3] in 0..1.
    """

    image: np.ndarray
    boxes: Sequence[tuple[int, int, int, int]]
    views: Sequence[np.ndarray]


def show_views(recipe: Pretrain, recipe_file: Path, out: Path) -> None:
    """Draws the first images of the run's first batch. Raises UserError where its images are missing."""
    with process_group() as world:
        source = open_splits(recipe.data, recipe_file, world, batch=recipe.train.global_batch_size).train
        bears_any = replace(recipe.data, max_bad_fraction=1.0)  # a picture is for looking at what there is
        source = leave_out(source, bears_any, world)
    check_picture(out, source)
    title = f"What the model sees: {recipe_file.stem}"
    subtitle = (
        f"The first images of epoch 0, seed {recipe.run.seed}: "
        f"their two crops, and the views of {recipe.model.image_size} pixels made of them"
    )
    draw_views(first_samples(recipe, source), title, subtitle, out)


def first_samples(recipe: Pretrain, source: Source) -> list[Sample]:
    """The first images of epoch 0 that can be read; the others are named in a warning."""
    size, seed = recipe.model.image_size, recipe.run.seed
    # An epoch's order does not depend on the batch, so these are the first of the run's first batch.
    order = Order(seed, len(source), min(SHOWN, len(source)))
    crops = Crops(size, recipe.augment.crop_min, reading=Reading.of(recipe.data))
    batch = next(train_batches(source, order, crops, range(1), rank=0, world_size=1, workers=Workers(())))
    bad_images.report(batch.bad, "it is left out of the picture", source.fingerprint)
    unreadable = {bad.name for bad in batch.bad}
    draw_B2D = crops.draw(seed, batch.epoch, batch.sample_B)
    samples = []
    for i, draw_2D, view_2SS3 in zip(batch.sample_B.tolist(), draw_B2D, _views(recipe, batch), strict=True):
        if source.name(i) not in unreadable:
            image = to_rgb(source.read(i), crops.reading)
            boxes = [crop_box(draw_D, image.height, image.width, crops.crop_min) for draw_D in draw_2D]
            samples.append(Sample(np.asarray(image), boxes, view_2SS3))
    return samples


def _views(recipe: Pretrain, batch: Batch) -> np.ndarray:
    """[B, 2, S, S, 3] in 0..1: what the augmentation makes of the crops."""
    normalised = Augment(recipe.augment, recipe.run.seed)(batch.crops, batch.sample_B, batch.epoch)
    views = denormalise(normalised, recipe.augment.mean, recipe.augment.std).unflatten(0, (2, -1))
    return views.permute(1, 0, 3, 4, 2).numpy()


def draw_views(samples: Sequence[Sample], title: str, subtitle: str, out: Path) -> None:
    """A column per image: the image with both crops outlined, and under it what becomes of them."""
    side = (WIDTH - 2 * MARGIN - NAMES - (SHOWN - 1) * GAP) // SHOWN
    with style():
        sheet = Sheet(HEADER + 3 * (side + GAP) + MARGIN - GAP, title, subtitle)
        names = ("image", "view 1", "view 2")
        for row, (name, colour) in enumerate(zip(names, (INK, *VIEW_COLOURS), strict=True)):
            y = HEADER + row * (side + GAP)
            sheet.text(MARGIN, y + side / 2, name, size=13, weight="bold", color=colour, va="center")
            for column, sample in enumerate(samples):
                x = MARGIN + NAMES + column * (side + GAP)
                if row:
                    sheet.image(x, y, side, sample.views[row - 1])
                else:
                    _draw_outlined(sheet, x, y, side, sample)
        sheet.save(out)


def _draw_outlined(sheet: Sheet, x: float, y: float, side: float, sample: Sample) -> None:
    axes = sheet.image(x, y, side, sample.image)
    for (top, left, height, width), colour in zip(sample.boxes, VIEW_COLOURS, strict=True):
        # The centre of the first pixel is at 0.
        across, down = np.array([0, width, width, 0, 0]) + left - 0.5, np.array([0, 0, height, height, 0]) + top - 0.5
        axes.plot(across, down, color=colour, linewidth=1.5, clip_on=False)
