"""What a run says about itself: metrics.jsonl, TensorBoard, and the files that show its newest evaluation."""

import io
import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.errors import reason
from engine.files import read_rows, replace_file
from engine.logger import warn
from engine.runs.board import Board
from engine.runs.growing import GrowingFile
from engine.runs.tail import RECENT, cut

Row = dict[str, Any]  # of metrics.jsonl


class MetricsLog:
    """metrics.jsonl and tensorboard/ of a run directory. One rank writes; with enabled=False all calls do nothing.

    resume_step is the step of the checkpoint that the run goes on from: lines of later steps, and a last line that was
    torn by a crash, are dropped; all others stay byte for byte. A run that starts from nothing passes -1.

    No step gets a second loss row or a second monitor row. A run may stop between a checkpoint and the monitor row of
    its step: `has_monitor_row` tells the resumed run whether that row is still to be made. `sync` before a checkpoint
    is committed keeps the log from being behind it after a power failure.

    Where the disk does not take a row, this is said and the run goes on: the row waits in memory. `sync` and `close`
    insist, and raise OSError.

    Of a long log a resume reads the end (runs/tail.py), and the monitor's rows. Raises UserError where one is damaged.

    monitor: the key by which a row is known as the monitor's; a linear classifier's is not kNN's.
    recent: the newest loss rows, oldest first.
    """

    def __init__(self, run_dir: str | Path, resume_step: int, *, monitor: str = "knn_top1", enabled: bool = True):
        self.enabled, self.monitor = enabled, monitor
        self.recent: deque[Row] = deque(maxlen=RECENT)
        self._directory, self._path = Path(run_dir), Path(run_dir) / "metrics.jsonl"
        self._resume_step = resume_step
        self._former_monitor_rows: list[Row] = []
        self._written: list[Row] = []  # the monitor's, by this process
        self._loss_step, self._monitor_step = -1, -1  # of the newest row of each kind
        self._rows = GrowingFile(self._path)
        self._board = Board(self._directory / "tensorboard", resume_step + 1)
        self._missed = 0
        if enabled:
            if self._path.exists():
                for row in cut(self._path, resume_step):
                    self._note(row)
                self._former_monitor_rows += read_rows(self._path, monitor)
            self._rows.sync()

    def loss_row(self, step: int, values: Row) -> None:
        """One line for a logged step, and `train/<key>` in TensorBoard. Nothing if the step has a loss row."""
        if self.enabled and step > self._loss_step:
            self._write("train", step, values)

    def monitor_row(self, step: int, values: Row) -> None:
        """One line for the monitor's result; `evaluate/<key>` in TensorBoard. Nothing if the step has one."""
        if self.monitor not in values:
            raise ValueError(f"a row of the monitor needs {self.monitor}; it has {sorted(values)}")
        if self.enabled and not self.has_monitor_row(step):
            self._write("evaluate", step, values)

    def has_monitor_row(self, step: int) -> bool:
        return step <= self._monitor_step

    @property
    def monitor_rows(self) -> list[Row]:
        """All of the run, oldest first."""
        return self._former_monitor_rows + self._written

    def best_step(self, counts: Callable[[int], bool]) -> int | None:
        """Of the steps that count, that whose monitor row is highest, the first of equals; None where there is none."""
        rows = [row for row in self.monitor_rows if row["step"] > 0 and counts(row["step"])]
        known = [row for row in rows if row[self.monitor] is not None]
        return max(known, key=lambda row: row[self.monitor])["step"] if known else None

    def picture(self, tag: str, image: torch.Tensor, step: int) -> None:
        """One picture, uint8 [3, H, W], in TensorBoard."""
        if self.enabled:
            self._board.picture(tag, image, step)

    def show(self, name: str, content: bytes, step: int) -> None:
        """A file in the run directory; a PNG is in TensorBoard too. The next evaluation makes up for one that fails."""
        if self.enabled:
            try:
                replace_file(self._directory / name, content)
            except OSError as error:
                self.count_failure(self._directory / name, error)
            if name.endswith(".png"):
                pixels_HW3 = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
                self.picture(Path(name).stem, torch.from_numpy(pixels_HW3.transpose(2, 0, 1)), step)

    def sync(self) -> None:
        """Returns when the lines so far would survive a power failure. Threads may call it. Raises OSError."""
        if self.enabled:
            self._rows.sync()
            self._board.sync()

    def close(self) -> None:
        if self.enabled:
            self._board.close()
            self._rows.close()

    def count_failure(self, path: Path, error: Exception) -> None:
        """Say and count that a file could not be written, which is tried again after the next evaluation."""
        self._missed += 1
        warn(f"{path} could not be written ({reason(error)}); training goes on, the next evaluation tries again")

    @property
    def failures(self) -> int:
        """Writes that failed so far."""
        return self._rows.failures + self._board.file.failures + self._missed

    def _write(self, prefix: str, step: int, values: Row) -> None:
        # JSON has no NaN: null is what a reader cannot take for a number
        row = {"step": step} | {key: value if _is_text_or_finite(value) else None for key, value in values.items()}
        self._rows.add(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._note(row)
        if self.monitor in row:
            self._written.append(row)
        self._board.scalars({f"{prefix}/{key}": v for key, v in values.items() if not isinstance(v, str)}, step)

    def _note(self, row: Row) -> None:
        if self.monitor in row:
            self._monitor_step = max(self._monitor_step, row["step"])
        else:
            self._loss_step = max(self._loss_step, row["step"])
            self.recent.append(row)


def _is_text_or_finite(value: float | str) -> bool:
    return isinstance(value, str) or math.isfinite(value)
