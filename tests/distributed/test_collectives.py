"""A step sends what it must (tests/distributed/collectives.py)."""

from tests.distributed.launch import results


def test_a_step_sends_the_least_messages_and_hardly_more_bytes():
    """Of a ViT and of one with BatchNorm in its trunk, under every sharding."""
    found = results(2, "tests.distributed.collectives")
    assert len(found) == 2 * 4
    for step in found:
        assert [(kind, count) for kind, (count, _) in step["health"].items()] == [("all_reduce", 1)]
        sent, least = step["sent"], step["least"]
        assert {kind: count for kind, (count, _) in sent.items()} == {kind: n for kind, (n, _) in least.items()}, step
        total, minimum = (sum(sent_bytes for _, sent_bytes in each.values()) for each in (sent, least))
        assert minimum <= total < 1.02 * minimum, step
    # Three blocks forward, with the heads behind the second one's message; full: and backward.
    orders = {step["shard"]: step["gathers"] for step in found if not step["conv_stem"]}
    forward = "BBPB" + "BBPRB"
    assert orders == {"full": forward + "BBB", "grad_op": forward, "hybrid": "", "replicate": ""}
