import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.permutation import permuted

# What the function said when it was made: (seed, epoch, count), and the first eight of the permutation.
GOLDEN = {
    (0, 0, 1): [0],
    (0, 0, 2): [1, 0],
    (0, 0, 10): [8, 3, 1, 5, 0, 6, 2, 9],
    (7, 3, 1000): [9, 491, 318, 641, 509, 520, 794, 580],
    (2**64 - 1, 2**32 - 1, 60_000): [20048, 28649, 47202, 3867, 37893, 13935, 1745, 26916],
    (1, 0, 1_281_167): [1264910, 364207, 413272, 465254, 1054665, 668072, 328528, 307344],
    (1, 1, 1_281_167): [421230, 1143790, 683934, 6215, 1269403, 1041952, 1083999, 1007603],
    (3, 90, 10**9): [278082985, 262879205, 251826499, 312293857, 373413092, 277002133, 626481820, 587668873],
}


def whole(seed: int, epoch: int, count: int) -> np.ndarray:
    return permuted(seed, epoch, count, np.arange(count))


@pytest.mark.parametrize(("address", "first"), GOLDEN.items())
def test_it_says_what_it_always_said(address, first):
    """Else runs would go on with another order than that which they began with."""
    assert permuted(*address, np.arange(min(8, address[2]))).tolist() == first


def test_it_is_a_permutation_of_any_number():
    """Of each that is small, and of those on both sides of each square of an even number, which is shuffled whole."""
    squares = [side**2 + by for side in range(16, 46, 2) for by in (-1, 0, 1)]
    for count in (*range(1, 255), *squares, 65_535, 65_536, 65_537, 10**6 + 3):
        assert np.array_equal(np.sort(whole(count, 1, count)), np.arange(count)), count


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    count=st.integers(1, 2**40),
    place=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
)
def test_a_place_is_computed_by_itself_and_no_two_hold_the_same(seed, epoch, count, place):
    place_P = np.array(place) % count
    found_P = permuted(seed, epoch, count, place_P)
    assert [permuted(seed, epoch, count, place_P[i : i + 1])[0] for i in range(len(place))] == found_P.tolist()
    assert found_P.min() >= 0
    assert found_P.max() < count
    assert len(np.unique(found_P)) == len(np.unique(place_P))


def test_all_permutations_of_a_few_are_equally_likely():
    for count, orders in ((3, 6), (4, 24)):
        seen = [tuple(whole(seed, epoch, count)) for seed in range(20) for epoch in range(30)]
        _, counts = np.unique(seen, axis=0, return_counts=True)
        expected = len(seen) / orders
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) == orders
        assert abs(chi_squared - (orders - 1)) < 5 * (2 * (orders - 1)) ** 0.5


@pytest.mark.parametrize("count", [10_000, 10_007, 50_000, 10**9])
def test_there_is_no_structure_to_see(count):
    """Of the first 10,000 places of several seeds and epochs; each bound is five standard deviations."""
    place_P = np.arange(10_000)
    orders = {at: permuted(*at, count, place_P) / count for at in itertools.product((0, 1, 2**32, 2**63), (0, 1, 2))}
    for u in orders.values():
        bins = np.histogram(u, 50, (0, 1))[0]
        assert ((bins - 200) ** 2 / 200).sum() < 49 + 5 * 98**0.5
        steps = np.diff(u)
        assert abs((steps > 0).mean() - 0.5) < 5 * (1 / 12 / 10_000) ** 0.5  # so often it goes up
        assert abs(np.abs(steps).mean() - 1 / 3) < 5 * (1 / 15 / 10_000) ** 0.5
        assert (np.abs(steps) <= 1 / 1000).sum() < 20 + 5 * 20**0.5
        for lag in (1, 2, 3, 10, 100, 101, 1000):
            assert abs(np.corrcoef(u[lag:], u[:-lag])[0, 1]) < 5 * (10_000 - lag) ** -0.5
        assert abs(np.corrcoef(u, place_P)[0, 1]) < 5 / 100
    for one, other in itertools.combinations(orders.values(), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 100
        assert (one == other).sum() <= 8  # by chance once where 10,000 are all there are


def test_an_image_lands_anywhere():
    """Over epochs the place of each image is uniform, and the mean way from its place is a third of all."""
    places = np.stack([whole(5, epoch, 100) for epoch in range(500)])
    for column in (0, 1, 50, 99):
        bins = np.bincount(places[:, column], minlength=100)
        assert ((bins - 5) ** 2 / 5).sum() < 99 + 5 * 198**0.5
    assert abs(np.abs(places - np.arange(100)).mean() / 100 - 1 / 3) < 0.01


def test_a_thousand_million_images_take_no_memory():
    place_P = np.arange(10**9 - 4096, 10**9)
    tracemalloc.start()
    permuted(1, 2, 10**9, place_P)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 2**20
