"""What a run says about itself: metrics.jsonl and TensorBoard."""

import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """metrics.jsonl and tensorboard/ of a run directory. One rank writes; with enabled=False all calls do nothing.

    resume_step is the step of the checkpoint that the run goes on from: lines of later steps, and a last line that was
    torn by a crash, are dropped; all others stay byte for byte. A run that starts from nothing passes -1: none stays.

    No step gets a second loss row or a second monitor row. A run may stop between a checkpoint and the monitor row of
    its step: `has_monitor_row` tells the resumed run whether that row is still to be made. `sync` before a checkpoint
    is committed keeps the log from being behind it after a power failure.

    monitor: the key by which a row is known as the monitor's; a linear classifier's is not kNN's.
    """

    def __init__(self, run_dir: str | Path, resume_step: int, *, monitor: str = "knn_top1", enabled: bool = True):
        self.enabled, self.monitor = enabled, monitor
        self._directory = Path(run_dir)
        self._resume_step = resume_step
        self._values: dict[str, dict[int, float | None]] = {"loss": {}, "monitor": {}}  # by step
        if enabled:
            path = self._directory / "metrics.jsonl"
            self._directory.mkdir(parents=True, exist_ok=True)
            self._keep_lines(path)
            self._file = path.open("ab")

    def loss_row(self, step: int, values: dict[str, float | str]) -> None:
        """One line for a logged step, and `train/<key>` in TensorBoard. Nothing if the step has a loss row."""
        self._row("loss", "train", step, values)

    def monitor_row(self, step: int, values: dict[str, float | str]) -> None:
        """One line for the monitor's result; `evaluate/<key>` in TensorBoard. Nothing if the step has one."""
        if self.monitor not in values:
            raise ValueError(f"a row of the monitor needs {self.monitor}; it has {sorted(values)}")
        self._row("monitor", "evaluate", step, values)

    def has_monitor_row(self, step: int) -> bool:
        return step in self._values["monitor"]

    def best_step(self) -> int | None:
        """The step whose monitor row is highest, the first of equals; None before a row of a trained network."""
        known = {step: value for step, value in self._values["monitor"].items() if step > 0 and value is not None}
        return max(known, key=known.get, default=None)

    def images(self, tag: str, image: torch.Tensor, step: int) -> None:
        """One picture, uint8 [3, H, W], in TensorBoard."""
        if self.enabled:
            self._tensorboard.add_image(tag, image, step)
            self._tensorboard.flush()

    def sync(self) -> None:
        """Returns when the lines so far would survive a power failure."""
        if self.enabled:
            os.fsync(self._file.fileno())
            directory = os.open(self._directory, os.O_RDONLY)  # the file's name is an entry of its own
            os.fsync(directory)
            os.close(directory)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            if "_tensorboard" in self.__dict__:
                self._tensorboard.close()

    @cached_property
    def _tensorboard(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # takes seconds: at the first row, not at import

        return SummaryWriter(str(self._directory / "tensorboard"), purge_step=self._resume_step + 1)

    def _row(self, kind: str, prefix: str, step: int, values: dict[str, float | str]) -> None:
        if not self.enabled or step in self._values[kind]:
            return
        # JSON has no NaN: null is what a reader cannot take for a number
        row = {"step": step} | {key: value if _is_text_or_finite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._values[kind][step] = row.get(self.monitor)
        for key, value in values.items():
            if not isinstance(value, str):
                self._tensorboard.add_scalar(f"{prefix}/{key}", value, step)
        self._tensorboard.flush()

    def _keep_lines(self, path: Path) -> None:
        lines, kept = [], []
        if path.exists():
            with path.open("rb") as file:
                lines = file.readlines()
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            row = _parse(line, f"{path.name} line {number}")
            if row["step"] <= self._resume_step:
                kept.append(line)
                kind = "monitor" if self.monitor in row else "loss"
                self._values[kind][row["step"]] = row.get(self.monitor)
        if len(kept) < len(lines):
            _replace(path, b"".join(kept))


def _is_text_or_finite(value: float | str) -> bool:
    return isinstance(value, str) or math.isfinite(value)


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(
            f"{where} ({line[:40]!r}) must be a JSON object with a step; mend the line or move the file away"
        )
    return row


def _replace(path: Path, content: bytes) -> None:
    """The file has its old content or the new one, also after a power failure."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
