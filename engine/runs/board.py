"""What TensorBoard shows of a run: scalars and pictures, in its file of events."""

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.runs.growing import GrowingFile

# TensorBoard takes a while to load: at the first event, not at import.


class Board:
    """tensorboard/ of a run directory. Events of `begin` and later steps that an earlier launch left are not shown.

    torch's SummaryWriter would end the run where the disk is full.
    """

    def __init__(self, folder: Path, begin: int):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{begin}"
        self.file, self.begin, self.has_begun = GrowingFile(folder / name), begin, False

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(step, summary={"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]})

    def picture(self, tag: str, pixels_3HW: Tensor, step: int) -> None:
        """uint8."""
        from PIL import Image

        png, (_, height, width) = io.BytesIO(), pixels_3HW.shape
        Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy()).save(png, format="PNG")
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png.getvalue()}
        self._add(step, summary={"value": [{"tag": tag, "image": image}]})

    def sync(self) -> None:
        """Bring what was drawn to the disk; what it refuses waits in memory."""
        if self.has_begun:
            self.file.try_to(self.file.sync)

    def close(self) -> None:
        """What the disk refuses now is lost: it is for looking at, and metrics.jsonl has the numbers."""
        self.file.try_to(self.file.close)

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if not self.has_begun:
            self.has_begun = True
            self._add(0, file_version="brain.Event:2")
            self._add(self.begin, session_log={"status": SessionLog.START})
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self.file.add(record.getvalue())
