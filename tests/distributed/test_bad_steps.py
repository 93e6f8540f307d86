"""Steps whose gradients are not finite end a run after the stated number, whatever is logged and on any ranks."""

import pytest

from engine.runs.task import SKIPS_IN_A_ROW
from tests.distributed.bad_steps import FROM
from tests.distributed.launch import results


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_steps_end_every_task_in_time(tmp_path, ranks):
    words = {each["task"]: each["words"] for each in results(ranks, "tests.distributed.bad_steps", tmp_path)}
    in_a_row = f"the last {SKIPS_IN_A_ROW} steps up to {FROM + SKIPS_IN_A_ROW} had gradients that are not finite"
    assert words["pretrain"].startswith(in_a_row)
    assert words["finetune"].startswith(in_a_row)
    assert words["linear"].startswith(f"the loss of a step up to {FROM + 1} is not finite")
