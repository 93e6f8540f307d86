"""What pre-training says of its images and steps when it begins, and of its result when it ends."""

from pathlib import Path

from engine.data.order import Order
from engine.data.source import Source
from engine.recipe.load import locate
from engine.recipe.paths import each
from engine.recipe.sections import Pretrain
from engine.recipe.shipped import FOLDER
from engine.runs.log import Row
from engine.training.loss import chance_level

FEW_STEPS = 10  # of an epoch: fewer are said


def images_in_words(train: Source, val: Source | None) -> str:
    labels = "unlabelled" if train.labels is None else f"{len(train.classes)} classes"
    images = "no validation images" if val is None else f"{len(val):,} for validation"
    return f"data      {len(train):,} training images ({labels}) in {train.found_in}, {images}"


def loss_in_words(temperature: float, batch: int) -> str:
    return f"loss      by chance {chance_level(temperature, batch):.2f}: 4 T ln({batch})"


def few_steps(order: Order, ranks: int) -> list[str]:
    """A line where an epoch has few steps, as it must to leave out a tenth of the images or more."""
    images, batch, steps = order.images, order.batch, order.steps_per_epoch
    if steps >= FEW_STEPS:
        return []
    fits = images // FEW_STEPS // ranks * ranks
    do = f"pass train.global_batch_size={fits} for {images // fits} steps" if fits > 1 else "give it more images"
    left = images - steps * batch
    left_out = f" and leaves out {left:,} of {images:,} images, others each time" if left else ""
    return [f"warning   an epoch has {steps} step{'s' * (steps > 1)}{left_out}: {do}"]


def result_in_words(monitor_rows: list[Row], last: Row | None) -> str:
    """Of all the monitor's rows and the last of the others, where null stands for a number that is not finite."""
    knn = [f"{row['knn_top1']:.2%}" for row in monitor_rows]
    probe = [f"{row['probe_top1']:.2%}" for row in monitor_rows if "probe_top1" in row]
    words = [f"kNN top-1 {knn[0]} -> {knn[-1]}"] if knn else []
    words += [f"probe top-1 {newest}" for newest in probe[-1:]]
    if last is not None:
        nan = float("nan")
        loss, share, rank = (nan if last[key] is None else last[key] for key in ("loss", "chance_share", "rankme"))
        words.append(f"loss {loss:.3f} ({share:.0%} of chance), rankme {rank:.1f} at step {last['step']:,}")
    return ", ".join(words) or "unknown: metrics.jsonl has no rows"


def own_images(recipe: Pretrain, recipe_file: Path) -> list[str]:
    """After a run on images that come with the engine, what to do with others."""
    if not locate(each(recipe.data.root)[0], recipe_file).absolute().is_relative_to(FOLDER):
        return []
    run = "mocov3 run own_photos_small data.root=/path/to/images"
    return [f"          images of your own: {run}; the README's table has more"]
