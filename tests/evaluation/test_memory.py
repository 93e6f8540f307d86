"""What linear classification is counted to take is what it takes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from engine.data.loader import Batch
from engine.data.splits import open_labelled_splits
from engine.evaluation.memory import memory_of_linear
from engine.evaluation.subject import Subject
from engine.runs.linear import LinearClassification
from engine.training.memory import GIB
from engine.weights.weights import IMAGENET
from models.architecture import Architecture, resnet, vit
from tests.alive import most_alive
from tests.runs.small import linear_recipe

SIZE = 32
VIT = vit(SIZE, 8, 384, 3, 4, conv_stem=False)


def classification(world, directory: Path, architecture: Architecture, batch: int) -> LinearClassification:
    recipe = linear_recipe(directory, f"train.global_batch_size={batch}")
    splits = open_labelled_splits(recipe.data, world, seed=0)
    network = architecture.build().module.eval().requires_grad_(False)
    subject = Subject(network, SIZE, *IMAGENET, crop_fraction=1.0)
    return LinearClassification(recipe, world, splits, subject, {})


@pytest.mark.parametrize(
    ("architecture", "batch"),
    [(VIT, 128), (vit(SIZE, 8, 64, 2, 4, conv_stem=True), 256), (resnet([1, 1, 1, 1], 64), 256)],
    ids=["vit", "conv stem", "resnet"],
)
def test_a_rank_takes_what_is_counted(world, tmp_path, architecture, batch):
    task = classification(world, tmp_path, architecture, batch)
    sample_B = torch.arange(batch)
    step = Batch(0, 0, torch.zeros(1, batch, 3, SIZE, SIZE, dtype=torch.uint8), sample_B, sample_B, [])
    network = task.subject.network
    beside = [*network.parameters(), *network.buffers(), *task.tensors().values(), step.crops]
    own = {tensor.data_ptr(): tensor.nbytes for tensor in beside}
    taken = sum(own.values()) + most_alive(partial(task.train_step, step), own)
    counted = memory_of_linear(task.recipe, architecture, SIZE, len(task.classes), 1).gib * GIB
    assert 0.9 * counted < taken < counted


def test_validation_is_counted_where_it_takes_more(tmp_path):
    recipe = linear_recipe(tmp_path, "train.global_batch_size=256")
    by_gpus = [memory_of_linear(recipe, VIT, SIZE, 10, gpus).gib for gpus in (1, 2, 4)]
    assert by_gpus[0] > 1.3 * by_gpus[1]
    assert by_gpus[1] == by_gpus[2]
