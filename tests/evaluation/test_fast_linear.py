"""Many linear classifiers at once: each is the one that would be trained alone, as good as scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from engine.evaluation import fast_linear
from engine.evaluation.features import Features


def clusters(train: int, val: int) -> tuple[Features, Features]:
    """So many rows of six classes, standardised."""
    centre_CD = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))

    def draw(rows: int, seed: int) -> Features:
        generator = torch.Generator().manual_seed(seed)
        label_N = torch.randint(6, (rows,), generator=generator)
        row_ND = centre_CD[label_N] + 1.2 * torch.randn(rows, 12, generator=generator)
        return Features(row_ND, torch.arange(rows), label_N)

    drawn = draw(train, 1), draw(val, 2)
    standard = fast_linear.standardise(drawn[0].feature_ND, drawn[1].feature_ND)
    return drawn[0]._replace(feature_ND=standard[0]), drawn[1]._replace(feature_ND=standard[1])


def test_the_gradient_of_all_candidates_is_autograds_of_each():
    feature_BE, label_B = torch.randn(9, 4), torch.randint(3, (9,))
    weight_LCE = torch.randn(5, 3, 4, requires_grad=True)
    losses = [nn.functional.cross_entropy(feature_BE @ weight_CE.T, label_B) for weight_CE in weight_LCE]
    (expected,) = torch.autograd.grad(sum(losses), weight_LCE)
    torch.testing.assert_close(fast_linear.gradient(weight_LCE.detach(), feature_BE, label_B), expected)


def test_candidates_trained_together_are_those_trained_alone():
    train, val = clusters(700, 300)
    group = fast_linear.groups_of_rank(1, 3)[0]
    options = {"classes": 6, "epochs": 20}
    scores = fast_linear.train_group(group, train, val, **options)
    assert len({score.top1 for score in scores}) > 1
    for score in scores[::3]:
        (alone,) = fast_linear.train_group([score.candidate], train, val, **options)
        assert alone.top1 == pytest.approx(score.top1, abs=1.5 / 300)
        assert alone.candidate == score.candidate


def test_fast_is_as_good_as_scikit_learn():
    train, val = clusters(700, 600)
    group = [fast_linear.Candidate(0.3, 1e-3)]
    (ours,) = fast_linear.train_group(group, train, val, classes=6)
    regression = LogisticRegression(C=1 / (1e-3 * 700), max_iter=2000).fit(train.feature_ND, train.label_N)
    theirs = regression.score(val.feature_ND, val.label_N)
    assert ours.top1 == pytest.approx(theirs, abs=0.01)
    assert theirs > 0.6


def test_ranks_share_all_candidates_in_groups_of_one_size():
    for world in (1, 2, 3, 7):
        groups = [group for rank in range(world) for group in fast_linear.groups_of_rank(rank, world)]
        assert {len(group) for group in groups} == {fast_linear.GROUP}
        assert sorted(c for group in groups for c in group) == sorted(fast_linear.candidates())


def test_constant_columns_become_zero_and_divergence_scores_nothing():
    train_ND = torch.cat([torch.randn(50, 2), torch.full((50, 1), 3.0)], 1)
    standard_ND, _ = fast_linear.standardise(train_ND, train_ND)
    assert not standard_ND[:, 2].any()
    assert standard_ND[:, :2].std(0, correction=0).tolist() == pytest.approx([1, 1])
    rows = Features(standard_ND, torch.arange(50), torch.arange(50) % 2)
    wild = [fast_linear.Candidate(1e30, 1.0)]
    (score,) = fast_linear.train_group(wild, rows, rows, classes=2, epochs=9)
    assert (score.top1, score.top5) == (0, 0)
