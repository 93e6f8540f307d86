"""Features are dealt out to ranks like cards, and extraction leaves the network as it was."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.evaluation.features import extract, rank_slice
from engine.evaluation.subject import Subject
from tests.evaluation.batches import batches_of, padded_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_trunk() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)
    )


def subject(trunk: nn.Module) -> Subject:
    return Subject(trunk, 8, MEAN, STD, crop_fraction=1)


@given(count=st.integers(0, 200), world=st.integers(1, 9), batch_size=st.integers(1, 40))
def test_rank_slices_are_the_batches_of_one_process(count, world, batch_size):
    everything = torch.arange(count).split(batch_size) if count else []
    dealt, passes = {}, set()
    for rank in range(world):
        ids, batches = rank_slice(count, rank, world, batch_size)
        passes.add(batches)
        parts = ids.split(batch_size) if len(ids) else []
        assert len(parts) <= batches
        dealt.update({rank + world * j: part.tolist() for j, part in enumerate(parts)})
    assert len(passes) == 1
    assert passes.pop() == math.ceil(len(everything) / world)
    assert [dealt[j] for j in sorted(dealt)] == [part.tolist() for part in everything]


def test_extraction_is_eval_mode_of_normalised_pixels_and_restores_the_trunk():
    images = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(11) % 3
    trunk = small_trunk().train()
    trunk[1].eval()
    modes = [part.training for part in trunk.modules()]
    state = {name: value.clone() for name, value in trunk.state_dict().items()}

    parts = [extract(subject(trunk), batches_of(images, labels, rank, 2, 4), "cpu") for rank in range(2)]

    assert [part.training for part in trunk.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())
    assert [part[1].tolist() for part in parts] == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7]]
    assert all(torch.equal(part[2], labels[part[1]]) for part in parts)
    whole = trunk.eval()((images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).detach()
    for features, ids, _ in parts:
        assert not features.requires_grad
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, whole[ids], rtol=1e-5, atol=1e-6)


def test_modes_are_restored_after_a_failure():
    trunk = small_trunk().train()
    narrow = padded_batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.arange(2), torch.arange(2), 2)
    with pytest.raises(RuntimeError):
        extract(subject(trunk), [narrow], "cpu")
    assert all(part.training for part in trunk.modules())
    with pytest.raises(ValueError, match="at least one batch"):
        extract(subject(trunk), [], "cpu")
