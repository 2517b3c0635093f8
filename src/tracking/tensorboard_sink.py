"""TensorBoard as a sink: event files below OUTPUT_DIR/tensorboard, one folder per run."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.tracking.sink import RunMetadata, RunWriter, lock_run

FLUSH_SECONDS = 2  # so often a reader sees new events
RESULT_TAG = "result"  # text: the identity of the result whose values were written


class TensorboardSink:
    """Imports tensorboard (but neither TensorFlow nor torch) when the first run is opened."""

    name, title, target, resumable = "tensorboard", "TensorBoard", "", True

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def open(self, run: RunMetadata) -> RunWriter:
        return _EventFiles(self, run)


class _EventFiles(RunWriter):
    """A resumed run gets another event file in the same folder; TensorBoard shows them as one run."""

    def __init__(self, sink: TensorboardSink, metadata: RunMetadata) -> None:
        self._lock = lock_run(sink.output_dir / "tracking" / sink.name / f"{metadata.id}.lock")
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        name = re.sub(r"[^\w.=+-]+", "_", metadata.name)
        folder = sink.output_dir / "tensorboard" / (metadata.group or "") / f"{name}-{metadata.id[-8:]}"
        self._event, self._summary, self._metadata = event_pb2.Event, summary_pb2.Summary, metadata
        self._results: set[str] = set()
        for event in _events(folder):
            for value in event.summary.value:
                if value.tag.startswith("train/"):
                    self.last_step = max(self.last_step, event.step)
                elif value.tag == RESULT_TAG:
                    self._results.add(value.tensor.string_val[0].decode())
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        if self.last_step < 0:
            self._add_text("config", f"```json\n{json.dumps(metadata.config, indent=1)}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.last_step = step
        self._add(*(self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()))

    def has_result(self, result: str) -> bool:
        return result in self._results

    def add_result(self, result: str, summary: dict[str, Any]) -> None:
        """Write numbers as scalars at the last step; they are also the metrics of the HPARAMS tab."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
        self._add(*(self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()))
        config = self._metadata.config
        hparams: dict[str, Any] = {name: config[name] for name in ("setup", "beta", "lr", "seed") if name in config}
        hparams |= {name: config[name]["name"] for name in ("method", "init") if name in config}
        if hparams:
            session = hparams_pb(hparams, trial_id=self._metadata.id)
            self._writer.add_event(self._event(wall_time=time.time(), summary=session))
        self._add_text(RESULT_TAG, result)

    def add_figure(self, name: str, png: Path) -> None:
        data = png.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of the IHDR chunk
        image = self._summary.Image(encoded_image_string=data, width=width, height=height, colorspace=4)
        self._add(self._summary.Value(tag=name, image=image))

    def finish(self, complete: bool) -> None:
        self._writer.close()
        self._lock.close()

    def _add_text(self, tag: str, text: str) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        self._add(self._summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text])))

    def _add(self, *values: Any) -> None:
        event = self._event(wall_time=time.time(), step=max(self.last_step, 0), summary=self._summary(value=values))
        self._writer.add_event(event)


def _events(folder: Path) -> Iterator[Any]:
    """Yield the events that a folder has, up to the last complete one of each file."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in sorted(folder.glob("events.out.tfevents.*")):
        yield from LegacyEventFileLoader(str(file)).Load()
