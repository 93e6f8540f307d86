"""The picture holds the views that training makes."""

import json

import numpy as np
from PIL import Image

from engine.data.augment import Augment
from engine.data.decode import Crops, crop_box, crop_draws, to_rgb
from engine.data.loader import train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.source import Root
from engine.data.workers import Workers
from engine.pictures.canvas import DOTS, HEADER, MARGIN
from engine.pictures.views import VIEW_COLOURS
from engine.recipe.load import load
from tests.pictures.drawn import FASHION, QUICKSTART, rgb, show


def test_views_picture_holds_the_first_batch_of_a_run(tmp_path):
    """The squares of the picture are, pixel by pixel, the views that training makes of its first batch."""
    overrides = [f"data.root={json.dumps(str(FASHION))}", "run.seed=3"]
    show("views", QUICKSTART, tmp_path / "v.png", *overrides)
    picture = np.asarray(Image.open(tmp_path / "v.png").convert("RGB")).astype(int)

    recipe = load(QUICKSTART, overrides)
    source = open_source(Root("shards", FASHION), "train")
    order, crops = Order(3, len(source), 128), Crops(28, recipe.augment.crop_min)
    batch = next(train_batches(source, order, crops, range(1), rank=0, world_size=1, workers=Workers(())))
    view_2B3SS = (
        Augment(recipe.augment, 3)(batch.crops, batch.sample_B, 0).unflatten(0, (2, -1)) * 0.5
    )  # the recipe's std; its mean is 0
    side, scale = 112, 112 * DOTS // 28
    for column in range(6):
        x = (MARGIN + 62 + column * (side + 6)) * DOTS
        for row in range(3):
            y = (HEADER + row * (side + 6)) * DOTS
            tile_SS3 = picture[y : y + side * DOTS, x : x + side * DOTS][scale // 2 :: scale, scale // 2 :: scale]
            if row:
                expected_SS3 = view_2B3SS[row - 1, column].clamp(0, 1).permute(1, 2, 0).numpy() * 255
                assert np.abs(tile_SS3 - expected_SS3).max() <= 1
                continue
            image = to_rgb(source.read(int(batch.sample_B[column])))
            clear_SS = np.abs(tile_SS3 - np.asarray(image).astype(int)).max(2) <= 1  # where no outline lies
            assert clear_SS.mean() > 0.7
            for view, colour in enumerate(VIEW_COLOURS):
                draw_D = crop_draws(3, 0, batch.sample_B[column : column + 1], view)[0]
                top, left, height, width = crop_box(draw_D, 28, 28, recipe.augment.crop_min)
                cut = image.crop((left, top, left + width, top + height)).resize((28, 28), Image.Resampling.BILINEAR)
                assert np.array_equal(np.asarray(cut).transpose(2, 0, 1), batch.crops[view, column])
                if view:  # the later outline lies on top: its lower edge, at a third of it
                    edge = picture[y + (top + height) * scale - 1, x + round((left + width / 3) * scale)]
                    assert np.abs(edge - rgb(colour)).max() < 60
