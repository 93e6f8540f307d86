"""The kNN classifier against scikit-learn and against plain Python, for any tiles; what it refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from engine.errors import UserError
from engine.evaluation.features import Features, extract
from engine.evaluation.knn import accuracy, check_k, classify
from engine.evaluation.subject import Subject
from tests.evaluation.batches import batches_of

CLASSES = 12


def random_bank(
    seed: int, clustered: bool, rows: int = 900, queries: int = 150, dim: int = 24
) -> tuple[Features, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bank_label = torch.randint(CLASSES, (rows,), generator=generator)
    query_label = torch.randint(CLASSES, (queries,), generator=generator)
    centres = torch.randn(CLASSES, dim, generator=generator) * clustered
    bank = centres[bank_label] + torch.randn(rows, dim, generator=generator)
    query = centres[query_label] + torch.randn(queries, dim, generator=generator)
    return Features(bank, torch.arange(rows), bank_label), query


def by_definition(bank, labels, ids, query, k, temperature=0.07):
    """Plain Python: up to five classes per query, by (votes descending, class), of neighbours by (similarity, id)."""
    bank, query = nn.functional.normalize(bank.double()), nn.functional.normalize(query.double())
    rows = []
    for similarities in (query @ bank.T).mul(1e6).round().tolist():  # equal where they are equal in exact arithmetic
        order = sorted(range(len(bank)), key=lambda row: (-similarities[row], int(ids[row])))
        votes: dict[int, Fraction] = {}
        for row in order[:k]:
            weight = Fraction(math.exp(similarities[row] / 1e6 / temperature))
            votes[int(labels[row])] = votes.get(int(labels[row]), 0) + weight
        rows.append(sorted(votes, key=lambda label: (-votes[label], label))[:5])
    return torch.tensor([row + [-1] * (5 - len(row)) for row in rows])


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_scikit_learn(clustered, temperature):
    bank, query = random_bank(3, clustered)
    ks = (1, 20, 100)
    ours = classify(bank, query, classes=CLASSES, ks=ks, temperature=temperature)
    for k in ks:
        theirs = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(bank.feature_ND.double(), bank.label_N)
        assert ours[k][:, 0].tolist() == theirs.predict(query.double()).tolist()
        votes = torch.tensor(theirs.predict_proba(query.double()))
        ranked = votes.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ours[k], ranked.indices[:, :5].where(ranked.values[:, :5] > 0, -1))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    k=st.integers(1, 30),
    tile=st.integers(1, 70),
    chunk=st.integers(1, 12),
)
def test_ties_go_by_id_and_by_class_for_any_tiles(seed, rows, k, tile, chunk):
    """Few distinct features, many equal similarities: every tie rule is used, and no chunking shows."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (rows, 3), generator=generator).float()
    query = torch.randint(-1, 2, (9, 3), generator=generator).float()
    labels = torch.randint(7, (rows,), generator=generator)
    ids = torch.randperm(rows, generator=generator) * 5
    k = min(k, rows)
    found = classify(Features(bank, ids, labels), query, classes=7, ks=(k,), tile=tile, chunk=chunk)[k]
    assert torch.equal(found, by_definition(bank, labels, ids, query, k))


def test_neither_scale_nor_tiles_nor_order_change_predictions():
    bank, query = random_bank(5, clustered=False, dim=33)
    expected = classify(bank, query, classes=CLASSES, ks=(20, 1))
    shuffled = torch.randperm(len(bank.id_N), generator=torch.Generator().manual_seed(0))
    other = Features(bank.feature_ND[shuffled] * 8, bank.id_N[shuffled], bank.label_N[shuffled])
    for tile, chunk in ((1, 150), (64, 7), (899, 149), (2**16, 1)):
        again = classify(other, query / 8, classes=CLASSES, ks=(1, 20), tile=tile, chunk=chunk)
        assert all(torch.equal(again[k], expected[k]) for k in (1, 20))


def test_similarities_are_exact_up_to_the_largest_tile():
    """Opposite and equal vectors reach the ends of the key's range."""
    bank = torch.eye(4).repeat(2**14, 1)
    bank[1::2] *= -1
    ids = torch.arange(2**16)
    found = classify(Features(bank, ids, ids % 4), torch.eye(4), classes=4, ks=(2**15,), tile=2**16)[2**15]
    assert found[:, 0].tolist() == [0, 0, 2, 0]  # rows 1 and 3 are only found negated: all the rest is equal


def test_zero_features_are_similar_to_nothing():
    bank = Features(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), torch.arange(3), torch.arange(3))
    found = classify(bank, torch.tensor([[2.0, 0.0], [0.0, 0.0]]), classes=3, ks=(3,))[3]
    assert found.tolist() == [[1, 0, 2, -1, -1], [0, 1, 2, -1, -1]]


def test_refuses_bad_features_labels_and_k():
    bank, query = random_bank(1, clustered=False, rows=30, queries=4)
    broken = bank.feature_ND.clone()
    broken[7, 2], broken[9, 0] = float("nan"), float("inf")
    with pytest.raises(FloatingPointError, match="2 of 30 training images and of 0 of 4"):
        classify(bank._replace(feature_ND=broken), query, classes=CLASSES)
    with pytest.raises(FloatingPointError, match="0 of 30 training images and of 4 of 4"):
        classify(bank, query * float("inf"), classes=CLASSES)
    unlabelled = bank._replace(label_N=bank.label_N.index_fill(0, torch.tensor([3]), -1))
    with pytest.raises(ValueError, match="of 30 for training, 1 have no class"):
        classify(unlabelled, query, classes=CLASSES)
    with pytest.raises(ValueError, match="tile"):
        classify(bank, query, classes=CLASSES, tile=2**16 + 1)
    with pytest.raises(UserError, match=r"^k \(31\) must be at most 30, .*; "):
        classify(bank, query, classes=CLASSES, ks=(1, 31))
    with pytest.raises(UserError, match=r"^k \(0\) must be at least 1; "):
        check_k(0, 30)


def test_accuracy_counts_first_and_any_and_refuses_unlabelled_images():
    predictions = torch.tensor([[3, 1, -1, -1, -1], [1, 3, 2, 0, 4], [2, -1, -1, -1, -1], [0, 1, 2, 3, 4]])
    assert accuracy(predictions, torch.tensor([3, 4, 0, 1])) == {"top1": 0.25, "top5": 0.75}
    with pytest.raises(ValueError, match="of 4, 1 have no label"):
        accuracy(predictions, torch.tensor([3, -1, 0, 1]))
    with pytest.raises(ValueError, match="of 0"):
        accuracy(predictions[:0], torch.tensor([], dtype=torch.int64))


def test_finds_what_pixels_tell():
    """Classes are colours: a trunk of pooled pixels gets all right, and with the labels exchanged all wrong."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % 4
    colours = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 20]])
    noise = torch.randint(40, (60, 3, 8, 8), generator=generator)
    images = (colours[labels][:, :, None, None] + noise).to(torch.uint8)
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    subject = Subject(trunk, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_fraction=1)

    def run(train_labels, k=5):
        train, val = batches_of(images[:40], train_labels, 0, 1, 16), batches_of(images[40:], labels[40:], 0, 1, 16)
        bank, query = (extract(subject, batches, "cpu") for batches in (train, val))
        return accuracy(classify(bank, query.feature_ND, classes=4, ks=(k,))[k], query.label_N)

    assert run(labels[:40]) == {"top1": 1.0, "top5": 1.0}
    assert run(labels[:40].roll(1))["top1"] == 0.0
    assert run(labels[:40].roll(1), k=40)["top5"] == 1.0
    with pytest.raises(UserError, match=r"^k \(41\) must be at most 40"):
        run(labels[:40], k=41)
    with pytest.raises(ValueError, match="of 40 for training, 40 have no class"):
        run(torch.full((40,), -1))
