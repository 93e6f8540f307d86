"""The online probe: it learns whatever the features' scale, waits for nothing, and bad features leave it as it was."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.evaluation.online_probe import PEAK_LR, OnlineProbe
from engine.training.schedule import Schedule

CLASSES, IMAGES, BATCH, STEPS = 6, 240, 40, 30
SCHEDULE = Schedule(peak_lr=BATCH / 256, epochs=5, warmup_epochs=1, steps_per_epoch=IMAGES // BATCH)
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # what asks the device for an answer


def labels() -> np.ndarray:
    return np.arange(IMAGES) % CLASSES


def make(world, width: int, dtype: torch.dtype = torch.float32) -> OnlineProbe:
    options = {"seed": 0, "device": torch.device("cpu"), "dtype": dtype, "group": world.group}
    return OnlineProbe(width, labels(), CLASSES, SCHEDULE, **options)


def features_of(shown_B: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    """Classes lie around points of their own, far from zero: nine tenths of a row are common to all."""
    centres_CD = torch.eye(CLASSES, width)[torch.from_numpy(labels())[shown_B]]
    return 3 + centres_CD + 0.1 * torch.randn(len(shown_B), width, generator=generator)


def train(probe: OnlineProbe, width: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, steps: int = STEPS):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        shown_B = (torch.arange(BATCH) + step * BATCH) % IMAGES
        both = [features_of(shown_B, width, generator) for _ in range(2)]
        probe.learn((torch.cat(both) * scale).to(dtype), shown_B)
    return probe


@settings(max_examples=15)
@given(st.integers(CLASSES, 300), st.floats(-8, 8), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@example(20, -8.0, torch.float32)
@example(20, 8.0, torch.float32)
def test_it_learns_features_of_any_width_scale_and_type(world, width, exponent, dtype):
    scale = 10**exponent
    probe = train(make(world, width), width, scale, dtype)
    query_Q = torch.arange(IMAGES)
    query_QD = features_of(query_Q, width, torch.Generator().manual_seed(2)) * scale
    found = probe.accuracy(query_QD, torch.from_numpy(labels()))
    assert found["probe_top1"] > 0.95
    assert found["probe_top5"] >= found["probe_top1"]
    assert probe.describe()["probe_loss"] < np.log(CLASSES) / 2
    exchanged = probe.accuracy(query_QD, torch.from_numpy((labels() + 1) % CLASSES))
    assert exchanged["probe_top1"] < 0.05


def test_its_rate_follows_the_run_and_is_stable_for_the_hardest_features(world):
    """All variance in one direction, which is where a rate that is too high diverges first."""
    probe = make(world, 2)
    for step in range(SCHEDULE.total_steps):
        shown_B = torch.arange(BATCH)
        sign_B = torch.from_numpy(labels())[shown_B] % 2 * 2.0 - 1
        assert 0 < probe.classifier.learning_rate <= PEAK_LR
        probe.learn(torch.stack((torch.ones(BATCH), sign_B), dim=1).repeat(2, 1), shown_B)
        assert probe.describe()["probe_loss"] < 2 * np.log(CLASSES), step
    assert probe.classifier.learning_rate == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_change_nothing_but_the_count(world, bad):
    probe = train(make(world, 8), 8, steps=3)
    before = {name: tensor.clone() for name, tensor in probe.tensors().items()}
    features = features_of(torch.arange(BATCH), 8, torch.Generator().manual_seed(3)).repeat(2, 1)
    features[5, 3] = bad
    probe.learn(features, torch.arange(BATCH))
    assert not probe.describe()["probe_loss"].isfinite()
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.tensors().items())
    assert probe.classifier.update.step == 4
    train(probe, 8, steps=1)
    moved = [name for name, tensor in probe.tensors().items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)
    assert all(tensor.isfinite().all() for tensor in probe.tensors().values())


def test_a_step_asks_the_device_for_nothing(world):
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            asked.append(function.overloadpacket.__name__)
            return function(*arguments, **(keywords or {}))

    probe = make(world, 8)
    with Watch():
        train(probe, 8, steps=1)
        assert "mm" in asked or "addmm" in asked, asked
        assert not WAITING & set(asked)
        probe.describe()["probe_loss"].item()
    assert "_local_scalar_dense" in asked
