"""Which numbers of a ViT its features are, against its tokens."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import UserError
from engine.evaluation.readout import readout
from engine.evaluation.subject import open_subject

CHECKPOINT = Path(__file__).parents[1] / "golden/I_vit_small_shape.pth.tar"


def test_feature_choices_of_a_vit():
    subject = open_subject(str(CHECKPOINT), "cpu")
    trunk, images = subject.network, torch.rand(2, 3, subject.image_size, subject.image_size)
    tokens = trunk.forward_features(images)
    cls, mean, last = (readout(trunk, choice)(images) for choice in ("cls", "mean", "last2"))
    assert torch.equal(cls, trunk(images))
    assert readout(trunk, "own") is trunk
    torch.testing.assert_close(mean, tokens[:, 1:].mean(1))
    assert last.shape == (2, 2 * cls.shape[1])
    torch.testing.assert_close(last[:, cls.shape[1] :], cls)
    for choice, words in (("last99", "at most last"), ("middle", "must be own, cls, mean"), ("last0", "must be own")):
        with pytest.raises(UserError, match=words):
            readout(trunk, choice)
    with pytest.raises(UserError, match="must be own for a Flatten"):
        readout(nn.Flatten(), "cls")
