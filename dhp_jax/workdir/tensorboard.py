"""Numbers of a phase as TensorBoard shows them."""

from collections.abc import Mapping
import os
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar


class Events:
    """Writes the numbers of records to a folder, and not their vectors: `survivors`, `magnitudes`.

    The steps of one phase follow those of the phase before.
    """

    def __init__(self, folder: str | os.PathLike):
        # Not SummaryWriter: its thread dies of a full disk, and whoever writes then waits for ever.
        self.writer = EventsWriter(os.path.join(folder, "events"))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name not in ("phase", "step", "total_step") and not isinstance(value, list):
                event = Event(summary=scalar(name, value), step=record["total_step"])
                event.wall_time = time.time()
                self.writer.write_event(event)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
