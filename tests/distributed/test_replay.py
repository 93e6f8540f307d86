"""The step reproduces the published reference, on any number of ranks and under every sharding."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.distributed.launch import results, torchrun
from tests.distributed.replays import GOLDEN, TRACES

TOLERANCE = {"float64": (1e-9, 1e-6), "float32": (1e-3, 0.1)}  # of losses; of parameters and buffers


def check(result: dict, precision: str) -> None:
    loss, tensors = TOLERANCE[precision]
    assert result["steps"] >= 5
    assert result["max_loss_rel"] < loss, result
    assert result["max_param_rel"] < tensors, result
    assert result["max_buffer_rel"] < tensors, result


@pytest.mark.parametrize(
    ("ranks", "which", "replays"),
    [
        (1, "some", 3 * 2 + 1),
        (2, "some", 4 + 1 + 1 + 2 + 2),
        pytest.param(2, "all", 3 * (4 + 1) + 2, marks=pytest.mark.slow),
        pytest.param(4, "some", 4 + 1 + 2, marks=pytest.mark.slow),
    ],
)
def test_traces_under_every_sharding(ranks, which, replays):
    found = results(ranks, "tests.distributed.replays", which)
    assert len(found) == replays
    for result in found:
        check(result, result["precision"])


def test_command_line_sees_a_wrong_trace(tmp_path):
    """One changed number in the trace shows in the printed differences."""
    with safe_open(GOLDEN / "A_vit_adamw.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["step.loss"][2] *= 1 + 1e-6
    probe = next(name for name in tensors if name.startswith("final.momentum.") and name.endswith(".value"))
    tensors[probe][0] += 1e-4
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    (result,) = results(1, "tests.replay", tmp_path / "wrong.safetensors")
    assert 9e-7 < result["max_loss_rel"] < 1.1e-6
    assert result["max_param_rel"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("trace", TRACES)
def test_compiled(trace, precision):
    assert torch.cuda.is_available() or shutil.which("c++"), "compiling for the CPU needs a C++ compiler"
    arguments = [GOLDEN / f"{trace}.safetensors", "--precision", precision, "--compile"]
    done = torchrun(2, "tests.replay", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    check(json.loads(done.stdout.splitlines()[-1]), precision)
