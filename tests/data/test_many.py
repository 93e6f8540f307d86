"""A thousand million images, of which an index says that they are there (tests/data/many.py)."""

import pickle

import numpy as np
import pytest

from engine.data.contents import SAMPLED, sample
from engine.data.decode import Crops
from engine.data.loader import train_batches
from engine.data.opening import open_source
from engine.data.order import Order
from engine.data.source import Root
from engine.data.workers import Workers
from tests.data.many import BEGINNINGS, CLASSES, NAME, first_images, make_up, measured
from tests.distributed.commands import ON_LINUX

IMAGES = 10**9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("d") / "tars"
    make_up(root, IMAGES)
    return root


def test_images_anywhere_among_them_are_read_with_their_labels(root):
    source = open_source(Root("shards", root), "train")
    assert len(source) == IMAGES
    assert source.labels.shape == (IMAGES,)
    chosen = first_images(IMAGES)
    assert np.ptp(chosen) > 0.99 * IMAGES
    for i in chosen[:: len(chosen) // 50]:
        assert source.read(i).getpixel((0, 0)) == (7, 0, 0)
        assert source.name(i) == f"x.tar:{NAME.decode()}"
        assert source.classes[source.labels[i]] == f"class {i % CLASSES}"
    assert len(sample(source)) == SAMPLED


def test_batches_come_from_the_beginnings_of_epochs(root):
    source, order = open_source(Root("shards", root), "train"), Order(0, IMAGES, 16)
    with Workers([source], 1) as workers:
        for epoch in range(BEGINNINGS):
            first = epoch * order.steps_per_epoch
            steps, crops = range(first, first + 1), Crops(8, 0.2)
            (batch,) = train_batches(source, order, crops, steps, rank=0, world_size=1, workers=workers)
            assert (batch.epoch, batch.bad) == (epoch, [])
            assert (batch.crops[:, :, 0] == 7).all()
            assert np.ptp(batch.sample_B.numpy()) > IMAGES / 4


@ON_LINUX
def test_a_rank_has_next_to_no_memory_for_them(root):
    """Neither the one that opens them nor one that is given its copy, over the beginnings of epochs."""
    assert BEGINNINGS > 1
    first = measured(open_source, Root("shards", root), "train")
    other = measured(pickle.loads, first["copy"])
    assert first["mb"] < 20
    assert other["mb"] < 20
