"""When things happen in a run."""

from dataclasses import replace

from engine.runs.plan import Plan


def test_plan():
    plan = Plan(last_step=25, log_every=10, checkpoint_every=10, keep=2, evaluate_every=20)
    assert [s for s in range(1, 26) if plan.logs_after(s)] == [1, 10, 20, 25]
    assert [s for s in range(1, 26) if plan.saves_after(s)] == [10, 20, 25]
    assert [s for s in range(26) if plan.evaluates_after(s)] == [0, 20, 25]
    archives = replace(plan, archive_every=7)
    assert [s for s in range(1, 26) if archives.saves_after(s)] == [7, 10, 14, 20, 21, 25]
    assert [s for s in range(1, 26) if archives.archives(s)] == [7, 14, 21]
    assert [s for s in range(1, 26) if replace(plan, archive_every=7 / 2).archives(s)] == [4, 7, 11, 14, 18, 21, 25]
    assert not any(plan.archives(s) for s in range(26))
    never = Plan(last_step=25, log_every=10, checkpoint_every=10, keep=2, evaluate_every=0)
    assert not any(never.evaluates_after(s) for s in range(26))
