"""What the tests of exports share: a trained run, its features, checkpoints of other trunks."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import on_ranks
from tests.weights.exports import NO_SHAPE, fresh_checkpoint
from tests.weights.files import trunk_of

# The checkpoint holds the online probe as well, which is no part of the networks.
FEW_STEPS = ["train.max_steps=3", "evaluate.knn_every_epochs=0", "evaluate.online_probe=true", "data.workers=0"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The quickstart after three steps on two ranks: its checkpoint lies in two shards."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    on_ranks(2, "engine.run", "recipes/quickstart.yaml", f"run.dir={folder}", *FEW_STEPS)
    assert len(list((folder / "checkpoints" / "step_0000003").glob("*.distcp"))) == 2
    return folder


@pytest.fixture(scope="session")
def features(trained):
    """Of both encoders, on fixed images, by our own networks."""
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return images, {name: trunk_of(trained, name)(images) for name in ("base", "momentum")}


@pytest.fixture(scope="session")
def other_runs(tmp_path_factory):
    """Checkpoints of trunks by their model.name."""
    made = {}

    def get(name: str, size: int) -> Path:
        if name not in made:
            overrides = [f"model.name={name}", f"model.image_size={size}", "model.freeze_patch_projection=false"]
            made[name] = fresh_checkpoint(tmp_path_factory.mktemp("run"), *overrides, *NO_SHAPE)
        return made[name]

    return get
