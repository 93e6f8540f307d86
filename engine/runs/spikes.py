"""An alarm for instability: gradients that leave the scale of those before (paper section 4: gradients spike, and the
accuracy dips a few dozen steps later)."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from engine.logger import warn
from engine.runs.log import Row
from engine.runs.tail import RECENT

FACTOR = 10.0  # times the median of the last RECENT logged steps
AT_LEAST = 20  # logged steps, before which there is no scale to leave


class SpikeAlarm:
    """Says and counts logged steps at which the norm of the gradients spikes; changes nothing in the run.

    rows: the newest loss rows so far, oldest first, so that a resumed run judges as an unbroken one.
    count: such steps of the run. Of those in a row the first is said.
    """

    def __init__(self, rows: Iterable[Row]):
        rows = list(rows)
        self.norms = deque((_finite(row.get("grad_norm")) for row in rows), maxlen=RECENT)
        counts = [count for row in rows if type(count := row.get("spikes")) is int]
        self.count = counts[-1] if counts else 0
        self.goes_on = len(counts) > 1 and counts[-1] > counts[-2]

    def judge(self, step: int, grad_norm: float) -> None:
        """Take in a logged step. A norm that is not finite is of a skipped one, which is counted elsewhere."""
        known = [norm for norm in self.norms if norm is not None]
        self.norms.append(_finite(grad_norm))
        usual = median(known) if len(known) >= AT_LEAST else math.inf
        has_spike = FACTOR * usual < grad_norm < math.inf
        self.count += has_spike
        if has_spike and not self.goes_on:
            warn(
                f"step {step}: the norm of the gradients ({grad_norm:.3g}) is more than {FACTOR:g} times the median of "
                f"the last {len(known)} logged steps ({usual:.3g}): spike {self.count} of this run; if more come and "
                "accuracy dips, start anew with a lower optimizer.base_lr in another run.dir"
            )
        self.goes_on = has_spike


def _finite(number: Any) -> float | None:
    return number if isinstance(number, int | float) and math.isfinite(number) else None
