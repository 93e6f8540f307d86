"""The paper's linear classifier and its step: the golden trace."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.evaluation.linear import LinearClassifier, linear_step

GOLDEN = Path(__file__).parents[1] / "golden"


def test_golden_trace_through_the_real_step():
    with safe_open(GOLDEN / "H_linear_probe.safetensors", "pt") as file:
        golden, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    feature_ND, label_N = golden["features"], golden["labels"]
    steps = math.ceil(len(feature_ND) / config["batch"])
    classifier = LinearClassifier(
        feature_ND.shape[1],
        config["classes"],
        peak_lr=config["base_lr"] * config["batch"] / 256,
        epochs=config["epochs"],
        steps_per_epoch=steps,
        dtype=torch.float64,
    )
    classifier.weight_CD.data.copy_(golden["init.weight"])
    losses = []
    for epoch, order_N in enumerate(golden["order"]):
        assert classifier.learning_rate == pytest.approx(golden["lr"][epoch].item(), rel=1e-12)
        for b in order_N.split(config["batch"]):
            classifier.update.begin()
            losses.append(linear_step(classifier, feature_ND[b], label_N[b], len(b)).item())
    assert losses == pytest.approx(golden["loss"].tolist(), rel=1e-9)
    for ours, name in ((classifier.weight_CD, "final.weight"), (classifier.bias_C, "final.bias")):
        torch.testing.assert_close(ours.detach(), golden[name], rtol=1e-8, atol=1e-8)


def test_the_classifier_starts_from_the_papers_distribution():
    classifier = LinearClassifier(500, 400, peak_lr=1, epochs=1, steps_per_epoch=1, seed=3)
    assert classifier.weight_CD.std().item() == pytest.approx(0.01, rel=0.01)
    assert not classifier.bias_C.any()
    other = LinearClassifier(500, 400, peak_lr=1, epochs=1, steps_per_epoch=1, seed=4)
    assert not torch.equal(classifier.weight_CD, other.weight_CD)
