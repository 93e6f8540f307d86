"""Parts are timed from outside, once each, and nothing of it is left."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.benchmarks import clock
from engine.benchmarks.parts import OTHER, Parts
from engine.benchmarks.step import Subject
from engine.distributed.world import process_group
from engine.recipe.load import load
from engine.training import step

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
CALLS = {"step": 1, "momentum_update": 1, "keys": 1, "queries_and_loss": 3, "backward": 1, "optimizer": 1}


def test_each_part_is_met_in_a_step_and_nothing_stays():
    recipe = load(QUICKSTART, ["train.global_batch_size=4", "parallel.compile=false", "parallel.precision=float32"])
    with process_group() as world:
        subject = Subject(recipe, world, 2)
        state, parts = subject.state, Parts(world.device)
        before = step.lerp_each_, step.contrastive_loss, torch.autograd.backward
        own = set(vars(state.moco)), set(vars(state.update))
        with parts.watching(state):
            parts.named("step", subject.step)()
            assert Counter(span.part for span in parts.spans) == CALLS
            assert {span.within for span in parts.spans} == {None, "step"}
            parts.end_step()
        assert before == (step.lerp_each_, step.contrastive_loss, torch.autograd.backward)
        assert own == (set(vars(state.moco)), set(vars(state.update)))
        subject.step()
    assert state.update.step == 2
    assert len(parts.steps) == 1
    assert not parts.spans


def test_parts_add_up_to_the_whole(monkeypatch):
    """On a clock of our own: in a step 2 ms pass beside its parts; one of them has another inside."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    parts = Parts(torch.device("cpu"))

    def spend(ms: float) -> None:
        now[0] += ms / 1e3

    def outer(ms: float) -> None:
        spend(4)
        parts.named("inner", spend)(ms)

    def whole(ms: float) -> None:
        for _ in range(2):
            parts.named("outer", outer)(ms)
        spend(2)

    for ms in (1, 5, 3):
        parts.named("step", whole)(ms)
        parts.end_step()
    assert parts.medians() == pytest.approx({"outer": 8, "inner": 6, OTHER: 2})


def test_sides_take_turns():
    met = []
    a, b = clock.alternate(lambda: met.append("a"), lambda: met.append("b"), 2, torch.device("cpu"))
    assert "".join(met) == "abbaabba"
    assert (len(a), len(b)) == (4, 4)
    assert clock.alternate(lambda: None, None, 2, torch.device("cpu"))[1] == []
    assert clock.median([clock.Seconds(1, 6), clock.Seconds(3, 4), clock.Seconds(2, 9)]) == (2, 6)
