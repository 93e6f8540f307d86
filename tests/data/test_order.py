import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.order import LAWS, PERMUTED, REPEAT, SORTED, Order

ANY = 4  # a batch, where its size does not matter
either = pytest.mark.parametrize("law", LAWS)


def whole(order: Order, epoch: int) -> np.ndarray:
    return order.samples(epoch, np.arange(order.images))


@either
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000), images=st.integers(1, 300))
def test_an_epoch_visits_every_image_once(law, seed, epoch, images):
    assert sorted(whole(Order(seed, images, ANY, law=law), epoch)) == list(range(images))


@either
def test_an_order_longer_than_one_chunk_is_a_permutation(law):
    order = whole(Order(3, 40_000, ANY, law=law), 0)
    assert np.array_equal(np.sort(order), np.arange(40_000))


@either
def test_orders_differ_by_seed_and_epoch_and_are_otherwise_the_same(law):
    order = Order(1, 1000, ANY, law=law)
    assert np.array_equal(whole(order, 2), whole(Order(1, 1000, 2 * ANY, law=law), 2))
    assert not np.array_equal(whole(order, 2), whole(order, 3))
    assert not np.array_equal(whole(order, 2), whole(Order(2, 1000, ANY, law=law), 2))


def test_each_law_says_what_it_always_said():
    """Else runs would go on with another order than that which they began with."""
    first = np.arange(8)
    assert Order(7, 1000, ANY, law=SORTED).samples(3, first).tolist() == [976, 693, 108, 487, 299, 331, 615, 761]
    assert Order(7, 1000, ANY).law == PERMUTED
    assert Order(7, 1000, ANY).samples(3, first).tolist() == [9, 491, 318, 641, 509, 520, 794, 580]


@either
def test_an_order_is_not_sorted_even_in_part(law):
    order = whole(Order(0, 10_001, ANY, law=law), 0)
    assert abs((np.diff(order) > 0).sum() - 5000) < 150  # expected 5,000 with a standard deviation of 29
    assert abs(np.corrcoef(order, np.arange(10_001))[0, 1]) < 0.05  # expected 0 with 0.01


def test_the_last_partial_batch_is_dropped():
    assert [Order(0, images, 4).steps_per_epoch for images in (3, 4, 7, 8)] == [0, 1, 1, 2]


@either
@given(world=st.sampled_from([1, 2, 4, 8]), share=st.integers(1, 5), extra=st.integers(0, 20))
def test_ranks_divide_the_global_batch_in_order(law, world, share, extra):
    batch = world * share
    order = Order(0, 2 * batch + extra, batch, law=law)
    parts = [order.share(1, rank, world)[1] for rank in range(world)]
    assert len(parts) == world
    assert all(len(part) == share for part in parts)
    assert np.array_equal(np.concatenate(parts), whole(order, 0)[batch : 2 * batch])


@either
@given(first=st.integers(0, 12))
def test_starting_at_a_step_is_going_on(law, first):
    def rows(start):
        order = Order(7, 11, 4, law=law)
        shares = [order.share(step, 1, 2) for step in range(start, 13)]
        return [(epoch, samples.tolist()) for epoch, samples in shares]

    assert rows(first) == rows(0)[first:]


def test_steps_run_through_the_epochs():
    order = Order(7, 11, 4)
    rows = [order.share(step, 0, 1) for step in range(5)]
    assert [epoch for epoch, _ in rows] == [0, 0, 1, 1, 2]
    assert np.array_equal(np.concatenate([samples for epoch, samples in rows if epoch == 1]), whole(order, 1)[:8])


@either
@given(images=st.integers(1, 40), batch=st.integers(1, 16), world=st.integers(1, 5))
def test_with_the_partial_batch_an_epoch_is_every_image_dealt_out_evenly(law, images, batch, world):
    order = Order(7, images, batch, keep_partial=True, law=law)
    seen = []
    for step in range(order.steps_per_epoch):
        parts = [order.share(step, rank, world) for rank in range(world)]
        sizes = [len(samples) for _, samples in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {epoch for epoch, _ in parts} == {0}
        seen += [sample for _, samples in parts for sample in samples.tolist()]
    assert seen == whole(order, 0).tolist()


@either
@given(images=st.integers(1, 50), repeats=st.integers(2, 6))
def test_repeats_come_in_a_row_and_the_epoch_stays_as_long(law, images, repeats):
    order = whole(Order(7, images, ANY, law=law), 0)
    identities = whole(Order(7, images, ANY, repeats=repeats, law=law), 0)
    assert len(identities) == images == len(set(identities.tolist()))
    assert (identities % REPEAT).tolist() == np.repeat(order, repeats)[:images].tolist()
    assert (identities // REPEAT).tolist() == (np.arange(images) % repeats).tolist()
