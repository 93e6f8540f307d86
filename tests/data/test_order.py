import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.data.order import REPEAT, Order

ANY = 4  # a batch, where its size does not matter


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000), images=st.integers(1, 300))
def test_an_epoch_visits_every_image_once(seed, epoch, images):
    assert sorted(Order(seed, images, ANY).epoch(epoch)) == list(range(images))


def test_an_order_longer_than_one_chunk_is_a_permutation():
    order = Order(3, 40_000, ANY).epoch(0)
    assert np.array_equal(np.sort(order), np.arange(40_000))


def test_orders_differ_by_seed_and_epoch_and_are_otherwise_the_same():
    order = Order(1, 1000, ANY)
    assert np.array_equal(order.epoch(2), Order(1, 1000, 2 * ANY).epoch(2))
    assert not np.array_equal(order.epoch(2), order.epoch(3))
    assert not np.array_equal(order.epoch(2), Order(2, 1000, ANY).epoch(2))


def test_an_order_is_not_sorted_even_in_part():
    order = Order(0, 10_001, ANY).epoch(0)
    assert abs((np.diff(order) > 0).sum() - 5000) < 150  # expected 5,000 with a standard deviation of 29
    assert abs(np.corrcoef(order, np.arange(10_001))[0, 1]) < 0.05  # expected 0 with 0.01


def test_the_last_partial_batch_is_dropped():
    assert [Order(0, images, 4).steps_per_epoch for images in (3, 4, 7, 8)] == [0, 1, 1, 2]


@given(world=st.sampled_from([1, 2, 4, 8]), share=st.integers(1, 5), extra=st.integers(0, 20))
def test_ranks_divide_the_global_batch_in_order(world, share, extra):
    batch = world * share
    order = Order(0, 2 * batch + extra, batch)
    parts = [samples for rank in range(world) for _, _, samples in order.share(range(1, 2), rank, world)]
    assert len(parts) == world
    assert all(len(part) == share for part in parts)
    assert np.array_equal(np.concatenate(parts), order.epoch(0)[batch : 2 * batch])


@given(first=st.integers(0, 12))
def test_starting_at_a_step_is_going_on(first):
    def rows(start):
        return [
            (step, epoch, samples.tolist()) for step, epoch, samples in Order(7, 11, 4).share(range(start, 13), 1, 2)
        ]

    assert rows(first) == rows(0)[first:]


def test_steps_run_through_the_epochs():
    order = Order(7, 11, 4)
    rows = list(order.share(range(5), 0, 1))
    assert [(step, epoch) for step, epoch, _ in rows] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert np.array_equal(np.concatenate([samples for _, epoch, samples in rows if epoch == 1]), order.epoch(1)[:8])


@given(images=st.integers(1, 40), batch=st.integers(1, 16), world=st.integers(1, 5))
def test_with_the_partial_batch_an_epoch_is_every_image_dealt_out_evenly(images, batch, world):
    order = Order(7, images, batch, keep_partial=True)
    ranks = [order.share(range(order.steps_per_epoch), rank, world) for rank in range(world)]
    seen = []
    for parts in zip(*ranks, strict=True):
        sizes = [len(samples) for _, _, samples in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {epoch for _, epoch, _ in parts} == {0}
        seen += [sample for _, _, samples in parts for sample in samples.tolist()]
    assert seen == order.epoch(0).tolist()


@given(images=st.integers(1, 50), repeats=st.integers(2, 6))
def test_repeats_come_in_a_row_and_the_epoch_stays_as_long(images, repeats):
    order = Order(7, images, ANY).epoch(0)
    identities = Order(7, images, ANY, repeats=repeats).epoch(0)
    assert len(identities) == images == len(set(identities.tolist()))
    assert (identities % REPEAT).tolist() == np.repeat(order, repeats)[:images].tolist()
    assert (identities // REPEAT).tolist() == (np.arange(images) % repeats).tolist()
