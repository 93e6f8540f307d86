"""Micro-batches make the step of the whole batch, with its gradient collectives and less memory."""

import pytest

from tests.distributed.launch import results


@pytest.mark.parametrize(("ranks", "pairs"), [pytest.param(1, 3, marks=pytest.mark.slow), (2, 3 + 3)])
def test_micro_batches_are_the_whole_batch(ranks, pairs):
    """Everything that six steps saw and left, in float64: under every sharding, in 1, 2 and 4 micro-batches."""
    found = results(ranks, "tests.distributed.micro_batches")
    assert len(found) == pairs
    for pair in found:
        assert pair["difference"] < 1e-9, pair
        assert pair["golden"] < 1e-6, pair
        assert pair["made"] == 2 * pair["pieces"]  # no micro-batch is augmented a third time
        ours, whole = pair["collectives"], pair["collectives_whole"]
        gathers = ours.pop("_allgather_base_", 0), whole.pop("_allgather_base_", 0)
        assert ours == whole  # gradients are sent once, whatever the number of micro-batches
        assert whole.get("_reduce_scatter_base_", 0) == (
            6 if ranks == 2 and pair["shard"] in ("full", "grad_op") else 0
        )
        if pair["shard"] == "grad_op":  # the momentum trunk's four units alone are gathered for every micro-batch
            assert gathers[0] - gathers[1] == 4 * (pair["pieces"] - 1)
    kept = [pair["kept"] for pair in found]
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]
    assert all(share < 0.4 for share in kept[2:])


@pytest.mark.slow
def test_compiled_micro_batches_are_the_whole_batch():
    (pair,) = results(2, "tests.distributed.micro_batches", "compile")
    assert pair["difference"] < 1e-9, pair
    assert pair["golden"] < 1e-6, pair
