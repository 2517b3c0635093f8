"""TensorBoard as a sink: event files below OUTPUT_DIR/tensorboard, one folder per run."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from src.tracking.sink import RunMetadata, RunWriter, Sink, lock_run

MAX_NAME = 200  # bytes of the name of a folder
FLUSH_SECONDS = 2  # so often a reader sees new events


def tensorboard_sink(output_dir: Path) -> Sink:
    return Sink("tensorboard", "TensorBoard", "", True, partial(EventFiles, output_dir))


class EventFiles(RunWriter):
    """A resumed run gets another event file in the same folder; TensorBoard shows them as one run."""

    def __init__(self, output_dir: Path, metadata: RunMetadata) -> None:
        self._lock = lock_run(output_dir / "tracking" / "tensorboard" / f"{metadata.id}.lock")
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        name = re.sub(r"[^\w.=+-]+", "_", metadata.name).encode()[:MAX_NAME].decode(errors="ignore")
        folder = output_dir / "tensorboard" / (metadata.group or "") / f"{name}-{metadata.id[-8:]}"
        self._config = metadata.config
        self._writer: Any = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)
        events = EventAccumulator(str(folder), {SCALARS: 1}).Reload()  # keeps the last event of every tag
        curves = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "eval/"))]
        self.last_step = max((events.Scalars(tag)[-1].step for tag in curves), default=-1)
        if self.last_step < 0:
            self._writer.add_text("config", f"```json\n{json.dumps(metadata.config, indent=1)}\n```")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.last_step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def add_result(self, result: str, summary: dict[str, Any]) -> None:
        """Write numbers as scalars at the last step; they are also the metrics of the HPARAMS tab."""
        from torch.utils.tensorboard.summary import hparams

        numbers = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, max(self.last_step, 0))
        names = ("setup", "method", "init", "beta", "lr", "seed")
        values = {name: self._config[name] for name in names if name in self._config}
        options = {name: value["name"] if isinstance(value, dict) else value for name, value in values.items()}
        if options:
            for event in hparams(options, numbers):  # add_hparams would write them into a folder of their own
                self._writer.file_writer.add_summary(event)

    def add_media(self, name: str, file: Path) -> None:
        if file.suffix == ".png":
            from matplotlib.image import imread

            self._writer.add_image(name, imread(file), dataformats="HWC")

    def finish(self, complete: bool) -> None:
        self._writer.close()
        self._lock.close()
