import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.opening import align_labels, open_source
from engine.data.philox import AUGMENT, CROP, ORDER, SUBSET, random_bits
from engine.data.source import Root, Source
from engine.data.subset import Subset, take_labels, take_per_class
from tests.data.images import fill, shades


class Labelled(Source):
    """Images that are never read, of these labels."""

    def __init__(self, labels, classes: int):
        self.labels = np.array(labels, np.int64)
        self.classes = tuple(f"class {c}" for c in range(classes))
        self.fingerprint = f"{labels} {classes}"

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        raise NotImplementedError

    def name(self, i):
        return f"image {i}"


def chosen(source: Source) -> list[int]:
    """The numbers of a subset's images in the whole."""
    return [int(source.name(i).removeprefix("image ")) for i in range(len(source))]


def per_class(source: Source) -> list[int]:
    return np.bincount(source.labels, minlength=len(source.classes)).tolist()


EVEN = Labelled([i % 4 for i in range(400)], 4)
SEED = st.integers(-(2**63), 2**63 - 1)


def test_a_subset_follows_its_source(tmp_path):
    files = {f"{name}/{i}.png": 10 * c + i for c, name in enumerate("abc") for i in range(4)}
    whole = open_source(Root("folder", fill(tmp_path, files)), "train")
    subset = Subset(whole, np.array([1, 5, 6]))
    assert len(subset) == 3
    assert shades(subset) == [1, 11, 12]
    assert subset.labels.tolist() == [0, 1, 1]
    assert subset.labels.dtype == np.int64
    assert subset.classes == ("a", "b", "c")  # with images or not
    assert [subset.name(i) for i in range(3)] == ["a/1.png", "b/1.png", "b/2.png"]
    assert align_labels(subset, whole).labels.tolist() == whole.labels.tolist()
    inner = Subset(subset, np.array([2, 0]))
    assert shades(inner) == [12, 1]
    assert inner.labels.tolist() == [1, 0]


def test_fingerprints_are_of_source_and_choice():
    other = Labelled(EVEN.labels.tolist(), 5)
    sources = [EVEN, *(Subset(EVEN, np.array(c)) for c in ([1, 2], [2, 1], [1], [1, 3])), Subset(other, np.array([1]))]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert Subset(EVEN, np.array([1, 2])).fingerprint == Subset(EVEN, np.array([1, 2], np.int32)).fingerprint
    shares = [take_labels(EVEN, share, seed).fingerprint for share in (0.1, 0.5) for seed in (0, 1)]
    assert len(set(shares)) == 4


@pytest.mark.parametrize(("share", "each"), [(0.01, 1), (0.1, 10), (0.001, 1), (0.5, 50), (0.126, 13), (0.124, 12)])
def test_every_class_has_as_many(share, each):
    subset = take_labels(EVEN, share, 3)
    assert per_class(subset) == [each] * 4
    assert subset.classes == EVEN.classes
    assert chosen(subset) == sorted(set(chosen(subset)))
    assert subset.labels.tolist() == [i % 4 for i in chosen(subset)]


def test_a_small_class_gives_all_it_has_and_no_other_makes_up_for_it():
    uneven = Labelled([0] * 60 + [1] * 3 + [3] * 37, 4)  # none of class 2
    assert per_class(take_labels(uneven, 0.2, 0)) == [5, 3, 0, 5]
    assert per_class(take_labels(uneven, 0.01, 0)) == [1, 1, 0, 1]
    assert per_class(take_labels(uneven, 0.99, 0)) == [25, 3, 0, 25]


def test_a_number_per_class_is_the_share_that_is_as_many():
    for each, share in ((1, 0.01), (13, 0.13)):
        assert take_per_class(EVEN, each, 3).fingerprint == take_labels(EVEN, share, 3).fingerprint
    assert chosen(take_per_class(EVEN, 100, 0)) == chosen(take_per_class(EVEN, 999, 0)) == list(range(400))


def test_all_labels_are_the_source_itself():
    assert take_labels(EVEN, 1, 0) is EVEN is take_labels(EVEN, 1.0, 0)


def test_the_choice_is_of_seed_and_image_number_alone():
    """Another stream or order would be another data set under the same name."""
    draw = {i: random_bits(5, 0, torch.tensor([i]), 0, 3)[0].tolist()[:2] for i in range(400)}
    smallest = [sorted(range(c, 400, 4), key=draw.get)[:3] for c in range(4)]
    assert chosen(take_labels(EVEN, 0.03, 5)) == sorted(itertools.chain(*smallest))
    assert SUBSET not in (ORDER, CROP, AUGMENT)


def test_images_of_other_classes_change_nothing():
    longer = Labelled([*EVEN.labels.tolist(), *[0] * 4], 4)  # a share of it is as many, rounded
    of_others = [[i for i in chosen(take_labels(each, 0.1, 0)) if each.labels[i]] for each in (EVEN, longer)]
    assert of_others[0] == of_others[1]


@given(seeds=st.tuples(SEED, SEED).filter(lambda pair: pair[0] != pair[1]))
@settings(max_examples=25)
def test_another_seed_is_another_choice(seeds):
    first, second = (chosen(take_labels(EVEN, 0.1, seed)) for seed in seeds)
    assert first != second


def test_every_image_is_as_likely():
    counts = np.zeros(40)
    small = Labelled([i // 20 for i in range(40)], 2)
    for seed in range(400):
        counts[chosen(take_labels(small, 0.25, seed))] += 1
    assert counts.sum() == 400 * 10
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    shares=st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)),
    seed=SEED,
)
@settings(max_examples=100)
def test_a_smaller_share_lies_within_a_larger_one(labels, shares, seed):
    source = Labelled(labels, 5)
    small, large = (take_labels(source, share, seed) for share in sorted(shares))
    assert set(chosen(small)) <= set(chosen(large))
    for subset, share in ((small, min(shares)), (large, max(shares))):
        if share < 1:
            wanted = max(1, round(share * len(labels) / 5))
            assert per_class(subset) == [min(wanted, labels.count(c)) for c in range(5)]
