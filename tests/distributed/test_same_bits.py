"""Two processes that run the same command write the same bits, and so do a first half and a second one."""

from tests.distributed.launch import ROOT
from tests.distributed.same_bits import digest, digests

SMALL = {
    "model.dim": 32,
    "model.projector_hidden_dim": 64,
    "model.output_dim": 32,
    "train.global_batch_size": 32,
    "data.workers": 1,
    "checkpoint.every_steps": 10,
    "evaluate.knn_every_epochs": 0,
    "parallel.precision": "bf16",
    "parallel.deterministic": "true",
}


def test_the_same_command_gives_the_same_bits(tmp_path):
    found = digests(tmp_path, ROOT / "recipes/quickstart.yaml", *(f"{key}={value}" for key, value in SMALL.items()))
    assert found == dict.fromkeys(("once", "again", "halves"), found["once"])
    assert digest(tmp_path / "once/checkpoints/step_0000010") == digest(tmp_path / "halves/checkpoints/step_0000010")
    assert digest(tmp_path / "once/checkpoints/step_0000010") != found["once"]
