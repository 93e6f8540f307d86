"""Features that no picture can be made of."""

import pytest
import torch

from engine.errors import UserError
from engine.pictures.map import flat_map
from engine.pictures.neighbours import nearest


def test_diverged_features_are_refused():
    feature_ND = torch.ones(6, 3)
    feature_ND[4, 1] = torch.nan
    for look in (lambda: nearest(feature_ND, torch.tensor([0]), 2), lambda: flat_map(feature_ND, "pca")):
        with pytest.raises(UserError, match="CHECKPOINT must give finite features"):
            look()
