"""Activation checkpoints change neither what a run sees and leaves, nor what its ranks send."""

import pytest

from tests.distributed.launch import results
from tests.distributed.replays import TRACES


@pytest.mark.parametrize(
    ("ranks", "traces", "pairs"),
    [(1, (TRACES[0], TRACES[2]), 2 * 2 + 2), pytest.param(2, (), 2 * 2 + 1 + 2, marks=pytest.mark.slow)],
)
def test_steps_are_those_without_checkpoints(ranks, traces, pairs):
    """Golden traces in float64, buffers and optimizer too: to the bit, but for micro-batches' order of sums. A ResNet's
    are slow; test_activation_checkpoint has a step of one."""
    found = results(ranks, "tests.distributed.activation_checkpoints", *traces)
    assert len(found) == pairs
    for pair in found:
        check(pair)
        assert pair["difference"] < (1e-12 if pair["pieces"] is None else 1e-9), pair
        ours, plain = pair["collectives"], pair["collectives_none"]
        if pair["pieces"] is not None:  # its gathers are shown elsewhere
            ours.pop("_allgather_base_", 0), plain.pop("_allgather_base_", 0)
        assert ours == plain
        assert pair["kept"] < 0.75, pair


@pytest.mark.slow
def test_compiled_blocks_with_batch_norm_send_and_move_what_they_did():
    """As compiled code divides them into forward and backward pass."""
    (pair,) = results(2, "tests.distributed.activation_checkpoints", "partition", "B_resnet_lars")
    check(pair)
    assert pair["difference"] < 1e-12, pair
    assert pair["kept"] < 0.9, pair


@pytest.mark.slow
@pytest.mark.parametrize("trace", TRACES)
def test_compiled_steps_are_those_without_checkpoints(trace):
    for pair in results(2, "tests.distributed.activation_checkpoints", "compile", trace):
        check(pair)
        assert pair["difference"] < 1e-9, pair


def check(pair: dict) -> None:
    assert pair["golden"]["max_param_rel"] < 1e-6, pair
    assert pair["golden"]["max_buffer_rel"] < 1e-6, pair
    if pair["pieces"] is None:
        assert pair["sent"] == 0, pair
