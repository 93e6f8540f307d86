"""RankMe of known spectra, and the same from a Gram matrix."""

import math

import pytest
import torch

from engine.evaluation.rankme import feature_gram, rankme_from_gram


def with_spectrum(spectrum: list[float], rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(spectrum), dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64, generator=generator)).Q
    return left * torch.tensor(spectrum, dtype=torch.float64) @ right


def by_definition(features: torch.Tensor) -> float:
    """The paper's equation 1, from the singular values themselves."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(1e-300) + 1e-7
    return math.exp(-(share * share.log()).sum())


def from_gram(features: torch.Tensor) -> float:
    return rankme_from_gram(feature_gram(features, None)).item()


@pytest.mark.parametrize("measure", [by_definition, from_gram])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("rank", [1, 7, 32])
def test_isotropic_features_of_rank_r_have_rankme_r(measure, scale, rank):
    features = with_spectrum([scale] * rank + [0.0] * (32 - rank), rows=100)
    assert measure(features) == pytest.approx(rank, rel=32 * 2e-6)


@pytest.mark.parametrize("measure", [by_definition, from_gram])
def test_uneven_spectrum_has_the_exponential_of_its_entropy(measure):
    spectrum = [8.0, 4.0, 2.0, 1.0, 1.0]
    entropy = -sum(value / 16 * math.log(value / 16) for value in spectrum)
    assert measure(with_spectrum(spectrum, rows=50)) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_gram_equals_direct():
    features = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 17)
    assert from_gram(features) == pytest.approx(by_definition(features), rel=1e-9)
    few = features[:6]
    assert by_definition(few) < from_gram(few) < by_definition(few) * (1 + 10 * 2e-6)
    assert by_definition(torch.eye(16)) == pytest.approx(16, rel=1e-4)


def test_gram_adds_up_over_parts():
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))
    parts = sum(feature_gram(part, None) for part in features.split(77))
    torch.testing.assert_close(parts, feature_gram(features, None), rtol=1e-12, atol=1e-12)
    assert parts.dtype == torch.float64


@pytest.mark.parametrize("measure", [by_definition, from_gram])
def test_collapsed_features_have_one_direction_and_broken_ones_none(measure):
    assert measure(torch.ones(40, 8)) == pytest.approx(1, rel=1e-4)
    assert measure(torch.zeros(40, 8)) == pytest.approx(1, rel=1e-4)
    assert math.isnan(measure(torch.full((40, 8), float("nan"))))
    assert math.isnan(measure(torch.full((40, 8), float("inf"))))


def test_eigenvalues_that_are_not_found_end_no_run(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("the algorithm did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert math.isnan(from_gram(torch.ones(3, 2)))
