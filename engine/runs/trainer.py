"""The loop: steps, and between them metrics, checkpoints and evaluation, each at its time.

What is trained is a `Task`'s business; when things happen is the trainer's.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from engine.distributed.agreement import agreement, broadcast
from engine.distributed.roll import wait_at_most
from engine.distributed.signals import StopSignal
from engine.distributed.world import TIMEOUT
from engine.errors import Interrupted, RunFailed, UserError
from engine.logger import say
from engine.runs.failures import kept
from engine.runs.log import MetricsLog, Row
from engine.runs.news import News
from engine.runs.saves import Saves
from engine.runs.spikes import SpikeAlarm
from engine.runs.task import Task
from engine.runs.watching import Watch

ASK_EVERY = 4  # batches of an evaluation; the ranks' answers travel during the next ones


class Trainer:
    """Drives a task through its plan, or until it is asked to stop.

    Checkpoints are the business of `saves`, metrics go to `log`.
    """

    def __init__(self, task: Task, log: MetricsLog, saves: Saves, stop: StopSignal):
        self.task, self.plan, self.world = task, task.plan(), task.world
        self.log, self.saves, self.stop = log, saves, stop
        self.seconds: Counter[str] = Counter()  # where the wall time went
        # How long ranks wait for each other; nobody is told yet. What torch gave the groups of a mesh is less on GPUs.
        self.patience = timedelta(0)
        self.unwritten: tuple[int, Row] | None = None  # the newest loss row, of which something is still computed
        watched = getattr(task.recipe.train, "on_spike", None) == "warn" and self.world.is_first
        self.watch = Watch(task, self.plan.last_step, log.recent[0] if log.recent else None)
        self.epochs_said = task.step // task.order.steps_per_epoch
        self.alarm = SpikeAlarm(log.recent) if watched else None  # of the rank that writes the log

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Interrupted: the run was asked to stop; the state is saved and the same command goes on.
            RunFailed: the task cannot go on, or is not saved.
        """
        with self._progress_bar() as self.bar, self._ends_in_order():
            news = News(self.task, self.stop)
            self.task.at_batch = self._stop_if_asked
            self._wait_at_most(TIMEOUT)
            if self.task.parallel is not None and self.task.parallel.compile and self.task.step < self.plan.last_step:
                say("compiling the network, which may take minutes: the first step is said when it is done")
            self._evaluate_if_due()  # compiles, too
            self._restart_clock()
            what = "first step"  # in which compiled blocks are compiled
            for batch in self._timed("data", self._batches()):
                self.task.bad_images.meet(batch.bad)
                # Of this step's messages. Alone, nobody can be lost.
                within = self.patience if self.world.size > 1 else timedelta.max
                with self._time(what):
                    output = self.task.train_step(batch)
                    self.stop.at_once = False
                    self._wait_at_most(timedelta(seconds=self.task.timeout))
                    self._log_if_due(output, batch, within)
                self._check_bad_images()
                what, word, step = "training", news.after_step(within), self.task.step
                # An evaluation takes minutes on large data, and a scheduler's grace is short: save before it.
                if word is not None or self.plan.saves_after(step) or self.plan.evaluates_after(step):
                    self._save(must=word is not None or step == self.plan.last_step)
                if word is not None and (step < self.plan.last_step or self.plan.evaluates_after(step)):
                    raise Interrupted(word, f"after step {step}, which is saved")
                self._evaluate_if_due()

    def _wait_at_most(self, timeout: timedelta) -> None:
        """Let ranks wait long where one may work alone: in compiling, evaluating and saving, to the next step's end."""
        if timeout != self.patience:
            self.patience = timeout
            wait_at_most(self.world, timeout)

    @contextmanager
    def _ends_in_order(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._write_row(must=True)
            self._wait_at_most(TIMEOUT)

    def _batches(self) -> Iterator[Any]:
        """The task's. Where none comes any more, the state is whole as long as no other rank is in the next step, which
        moves its momentum encoder before it waits for this one: on several ranks steps since the last save are lost."""
        try:
            yield from self.task.batches(self.plan.last_step)
        except (RunFailed, UserError) as failure:
            if self.world.size == 1 and self.task.step:
                self._write_row(must=True)
                self.saves.secure()
            words = f"{failure}; {kept(self.saves.checkpoints, self.task.step)}"
            raise (UserError(words) if isinstance(failure, UserError) else RunFailed(words, alone=True)) from failure

    def _log_if_due(self, output: Any, batch: Any, within: timedelta) -> None:
        step = self.task.step
        self.bar.update()
        self._write_row(must=self.plan.logs_after(step))
        if not self.plan.logs_after(step):
            return
        row = self.task.describe(output, within)
        now = time.perf_counter()
        row["images_per_second"] = (step - self.clock[0]) * self.task.order.batch / (now - self.clock[1])
        row |= self.watch.measure()
        self._restart_clock()
        if self.alarm is not None:
            self.alarm.judge(step, row["grad_norm"])
            row["spikes"] = self.alarm.count
        self.unwritten = step, row
        self._write_row(must=False)
        if step == 1:
            self.log.picture("views", self.task.picture(batch), step)

    def _write_row(self, *, must: bool) -> None:
        """Write the row that waits, if all of it is there. must: wait for the rest."""
        if self.unwritten is None:
            return
        step, row = self.unwritten
        late = {key: value for key, value in row.items() if isinstance(value, Future)}
        if not (must or all(value.done() for value in late.values())):
            return
        self.unwritten = None
        row |= {key: value.result() for key, value in late.items()}
        self.log.loss_row(step, row)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['images_per_second']:,.0f} images/s")
        line, ended = self.watch.line(step, row), step // self.task.order.steps_per_epoch
        if self.bar.disable or ended > self.epochs_said:  # beside a bar a line for each epoch is enough
            say(line)
            self.epochs_said = ended

    def _check_bad_images(self) -> None:
        """Where they are counted, which all ranks do together. Raises RunFailed; the state is saved."""
        step = self.task.step
        if self.plan.logs_after(step):
            excess = self.task.too_many_bad(self.task.bad_images.total, step)
            if excess is not None:
                self._save(must=True)
                raise RunFailed(f"{excess}; the run is saved after step {step:,}")

    def _evaluate_if_due(self) -> None:
        step = self.task.step
        if not self.plan.evaluates_after(step):
            return
        self._wait_at_most(TIMEOUT)
        # Only the rank that writes the log knows what is in it.
        if broadcast(self.log.has_monitor_row(step), self.world.host_group):
            return
        with self._time("evaluation"):
            try:
                row = self.task.evaluate()
            except Interrupted:  # saved here: in there, what refuses the save might pass for the evaluation's failure
                self.saves.secure()
                raise
        if row is not None:
            row = {"epoch": self.task.epoch} | row
            self.log.monitor_row(step, row)
            self.saves.settle()  # `best` names what is there
            with agreement(self.world.host_group):
                if self.world.is_first:
                    self._show_result(step)
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "epoch")
            say(f"step {step}: {numbers}")
        self._restart_clock()

    def _stop_if_asked(self, batch: int) -> None:
        """Between batches of an evaluation, on every rank. Raises Interrupted: a resumed run makes the row."""
        if batch % ASK_EVERY == 0 and (word := self.stop.agreed()) is not None:
            where = f"after step {self.task.step}, which is saved," if self.task.step else "before step 1,"
            raise Interrupted(word, f"{where} during its evaluation")

    def _show_result(self, step: int) -> None:
        """Let `best` name the best checkpoint, and show the evaluation if it counts."""
        self.saves.point_best()
        if self.task.reported(self.log.monitor_rows)["step"] == step:
            for name, content in self.task.shown().items():
                self.log.show(name, content, step)

    def _save(self, *, must: bool) -> None:
        self._write_row(must=True)
        self._wait_at_most(TIMEOUT)
        with self._time("checkpoints"):
            self.saves.make(must=must)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.clock = (self.task.step, time.perf_counter())

    @contextmanager
    def _time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    def _timed(self, what: str, items: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(items)
        while True:
            with self._time(what):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def _progress_bar(self) -> tqdm:
        # On a terminal a bar; in a log file the lines of _log_if_due.
        return tqdm(
            total=self.plan.last_step,
            initial=self.task.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.world.is_first and sys.stderr.isatty()),
        )
