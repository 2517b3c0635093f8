"""W&B as a sink: one W&B run per synced run, resumed by its id."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from src.tracking.sink import STEP, RunMetadata, RunWriter, Sink, lock_run
from src.tracking.wandb_login import WandbTarget, base_url

MAX_NAME, MAX_TAG = 128, 64  # characters
INIT_TIMEOUT, FINISH_TIMEOUT = 15.0, 60.0  # seconds for the server to answer


def wandb_sink(output_dir: Path, target: WandbTarget) -> Sink:
    online = target.mode == "online"  # an offline run is written once
    address = f"{base_url() or ''} {target}" if online else ""
    return Sink("wandb", "W&B", address, online, partial(WandbRun, output_dir, target))


class WandbRun(RunWriter):
    """Imports wandb when the first run is opened."""

    def __init__(self, output_dir: Path, target: WandbTarget, metadata: RunMetadata) -> None:
        self._lock = lock_run(output_dir / "tracking" / "wandb" / f"{metadata.id}.lock")
        os.environ.setdefault("WANDB_SILENT", "true")  # failures arrive as exceptions
        import wandb

        self._wandb, self._target = wandb, target
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # it would describe the process that syncs
            x_disable_stats=True,
            x_save_requirements=False,
        )
        options: dict[str, Any] = {**asdict(target), **asdict(metadata), "dir": str(output_dir), "settings": settings}
        # W&B refuses longer ones.
        options |= {"name": metadata.name[:MAX_NAME], "tags": [tag[:MAX_TAG] for tag in metadata.tags if tag]}
        self._run = wandb.init(**options, resume="allow", reinit="create_new")
        # Steps are a metric of their own: wandb's internal step neither repeats nor skips after a resume.
        self._run.define_metric(STEP)
        for metrics in ("train/*", "eval/*"):
            self._run.define_metric(metrics, step_metric=STEP)
        self.last_step, self.result = int(self._run.summary.get(STEP, -1)), self._run.summary.get("result")
        self._upstream_runs = metadata.config.get("upstream_runs", {})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({STEP: step, **metrics})

    def add_result(self, result: str, summary: dict[str, Any]) -> None:
        self._run.summary.update({**summary, "result": result})
        if self._run.url and self._upstream_runs:
            project = self._run.url.rpartition("/")[0]
            links = (f"[{role}]({project}/{run})" for role, run in self._upstream_runs.items())
            self._run.notes = "upstream runs: " + ", ".join(links)

    def add_config(self, config: dict[str, Any]) -> None:
        self._run.config.update(config, allow_val_change=True)

    def add_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=list(rows))})

    def add_media(self, name: str, file: Path) -> None:
        is_figure = file.suffix == ".png"
        self._run.log({name: self._wandb.Image(str(file)) if is_figure else self._wandb.Html(str(file), inject=False)})

    def add_files(self, files: Sequence[Path], root: Path) -> None:
        for file in files:
            self._run.save(file, base_path=root, policy="now")

    def add_artifact(self, name: str, paths: Sequence[Path]) -> None:
        artifact = self._wandb.Artifact(name, type="sweep")
        for path in paths:
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def finish(self, complete: bool) -> None:
        """Close the run; W&B shows an incomplete one as failed until it is resumed. Raises when uploads time out."""
        folder = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code=0 if complete else 1)
        finally:
            self._lock.close()
        if complete and self._target.mode == "online":
            shutil.rmtree(folder, ignore_errors=True)  # both W&B and the store have its content
