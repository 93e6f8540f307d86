"""When things happen in a run."""

from engine.runs.task import Plan


def test_plan():
    plan = Plan(last_step=25, log_every=10, checkpoint_every=10, keep=2, evaluate_every=20)
    assert [s for s in range(1, 26) if plan.logs_after(s)] == [1, 10, 20, 25]
    assert [s for s in range(1, 26) if plan.saves_after(s)] == [10, 20, 25]
    assert [s for s in range(26) if plan.evaluates_after(s)] == [0, 20, 25]
    never = Plan(last_step=25, log_every=10, checkpoint_every=10, keep=2, evaluate_every=0)
    assert not any(never.evaluates_after(s) for s in range(26))
