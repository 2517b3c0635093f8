"""The study as a data set: Parquet files that `datasets.load_dataset` opens, one a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from src.errors import DamagedFile
from src.store.files import read_jsonl
from src.store.store import FURTHER_JUDGE, JUDGEMENTS_FILE, METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE, read_result
from sweeps.analysis.results import Results, read_quality
from sweeps.share.chosen import PublishedSweep

ROWS_PER_GROUP = 50_000  # of a Parquet file, which are in memory at once
_LOCAL = ["checkpoint", "error"]  # columns of points.csv that name files of this machine
# Columns are named as in the tables of a notebook: sweeps.notebook.KEYS, `prompt_index`.
_POINT = {
    "setup": pa.string(),
    "method": pa.string(),
    "init": pa.string(),
    "variant": pa.string(),
    "beta": pa.float64(),
    "lr": pa.float64(),
    "seed": pa.int64(),
    "identity": pa.string(),
}
_SAMPLE = {"prompt_index": pa.int64(), "sample": pa.int64(), "turn": pa.int64()}
_DETAILS = {"details": pa.string()}  # JSON: what a row has beyond the columns
SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "samples": {
        **_POINT,
        **_SAMPLE,
        "prompt": pa.string(),
        "response": pa.string(),
        "finished": pa.bool_(),
        "tokens": pa.int64(),
        **dict.fromkeys(("logp", "reference_logp", "kl"), pa.float64()),
        "source": pa.string(),
    },
    "judgements": {
        **_POINT,
        "judge": pa.string(),
        **_SAMPLE,
        "split": pa.string(),
        "verdict": pa.float64(),
        "reason": pa.string(),
        "baseline": pa.string(),
        **_DETAILS,
    },
    "metrics": {
        **_POINT,
        "step": pa.int64(),
        **dict.fromkeys(("loss", "grad_norm", "learning_rate"), pa.float64()),
        **dict.fromkeys((f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")), pa.float64()),
        **dict.fromkeys(("logps/chosen", "logps/rejected", "tokens_per_second"), pa.float64()),
        **_DETAILS,
    },
    "validation": {
        **_POINT,
        "pair": pa.int64(),
        "validation_prompt": pa.int64(),
        **dict.fromkeys(("loss", "margin", "correct"), pa.float64()),
        **dict.fromkeys(("logps", "reference_logps"), pa.list_(pa.float64())),
        "source": pa.string(),
    },
}


def write_data_set(folder: Path, study: PublishedSweep) -> dict[str, int]:
    """Write CONFIG.parquet for every config that has rows, and return config -> number of rows.

    Raises DamagedFile for a file of a point that cannot be read, and OSError.
    """
    folder.mkdir()
    results = study.results
    selected = {identity for identities in study.best.identities for identity in identities}
    points = results.points.drop(columns=_LOCAL)
    points["selected"] = points.identity.isin(selected)
    counts = {"points": _write_frame(folder, "points", points)}
    best = study.best.drop(columns=[*_LOCAL, "identity", "state", "candidate", "stop_fraction", "seed"])
    counts["best"] = _write_frame(folder, "best", best)
    readers: dict[str, Callable[[Results, str], Iterator[dict[str, Any]]]] = {
        "samples": _samples,
        "judgements": _judgements,
        "metrics": _metrics,
        "validation": _validation,
    }
    for name, read in readers.items():
        if count := _write_rows(folder / f"{name}.parquet", SCHEMAS[name], _of_all_points(results, read)):
            counts[name] = count
    return counts


def _of_all_points(
    results: Results, read: Callable[[Results, str], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for point in results.points[results.points.state == "done"].to_dict("records"):
        key = {name: point[name] for name in _POINT}
        for row in read(results, point["identity"]):
            yield {**key, **row}


def _samples(results: Results, result: str) -> Iterator[dict[str, Any]]:
    for row in _rows(results, result, "generate", SAMPLES_FILE, "index"):
        yield {"prompt_index": row.pop("index"), "sample": 0, "turn": 1, **row}


def _judgements(results: Results, result: str) -> Iterator[dict[str, Any]]:
    """Yield the verdicts of the judge that selects and of further ones, with the split that the prompt is in."""
    folder = results.artifacts(result, "evaluate")
    assert folder is not None
    quality = read_quality(folder)
    split = {
        prompt: "selection" if selects else "reporting"
        for prompt, selects in zip(quality["prompts"], quality["selection"], strict=True)
    }
    evaluation = read_result(folder)
    judges = {"evaluate": (evaluation.get("judge") or {}).get("name")}
    judges |= {FURTHER_JUDGE + name: name for name in evaluation.get("judges", {})}
    for role, judge in judges.items():
        for row in _rows(results, result, role, JUDGEMENTS_FILE, "index"):
            index = row.pop("index")
            yield {"judge": judge, "prompt_index": index, "sample": 0, "turn": 1, "split": split.get(index), **row}


def _metrics(results: Results, result: str) -> Iterator[dict[str, Any]]:
    return _rows(results, result, "align", METRICS_FILE)


def _validation(results: Results, result: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_rows(results, result, "align", VALIDATION_FILE, "prompt")):
        yield {"pair": number, "validation_prompt": row.pop("prompt"), **row}


def _rows(results: Results, result: str, role: str, file: str, *keys: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of a point, which have these keys; none where its stage has no such file."""
    folder = results.artifacts(result, role)
    if folder is not None and (folder / file).exists():
        yield from read_jsonl(folder / file, keys)


def _write_rows(path: Path, schema: Mapping[str, pa.DataType], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to a Parquet file and return their number; no file without any."""
    count, arrow_schema = 0, pa.schema(list(schema.items()))
    writer: parquet.ParquetWriter | None = None
    iterator = iter(rows)
    try:
        while batch := list(islice(iterator, ROWS_PER_GROUP)):
            if writer is None:
                writer = parquet.ParquetWriter(path, arrow_schema, compression="zstd")
            writer.write_table(_table(batch, arrow_schema, path))
            count += len(batch)
    finally:
        if writer is not None:
            writer.close()
    return count


def _table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> pa.Table:
    """Return rows as a table of the schema. Raises DamagedFile for a value of another type."""
    columns = {name: [_printable(row.get(name)) for row in rows] for name in schema.names if name != "details"}
    if "details" in schema.names:
        columns["details"] = [_details(row, schema) for row in rows]
    try:
        return pa.table(columns, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DamagedFile(f"{path.stem} of a point: damaged, {' '.join(str(error).split())}") from error


def _details(row: Mapping[str, Any], schema: pa.Schema) -> str | None:
    others = {name: value for name, value in row.items() if name not in schema.names}
    return json.dumps(others) if others else None


def _printable(value: Any) -> Any:
    """Return a text with a replacement for lone surrogates, which a file in UTF-8 cannot have."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _write_frame(folder: Path, name: str, frame: pd.DataFrame) -> int:
    """Write a table of few rows; a column without any value is one of texts, so that readers know its type."""
    empty = [column for column in frame.columns if frame[column].isna().all() and frame[column].dtype == object]
    table = pa.Table.from_pandas(frame.astype(dict.fromkeys(empty, "string")), preserve_index=False)
    parquet.write_table(table.replace_schema_metadata(None), folder / f"{name}.parquet", compression="zstd")
    return len(frame)
