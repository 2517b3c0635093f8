"""What rules need of a point, read from the files of its stages: only points that are examined are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.errors import DamagedFile, warn
from src.store.files import read_json, read_jsonl
from src.store.integrity import STAGE_FILE, find_damage
from src.store.store import METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE
from sweeps.analysis.diagnosis.samples import repeated_share, sft_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sweeps.analysis.results import Results

OLD = "their results are of a version that did not keep log-probs"
NO_REFERENCE = "no point of a method with a reference has the same initial model and held-out pairs"
MAX_RESPONSES = 256  # of a point that are searched for repetition
KEYS = {VALIDATION_FILE: ("loss",), METRICS_FILE: (), SAMPLES_FILE: ("response", "finished")}  # what rows must have


class Measured:
    """The files of the points of some sweeps; a damaged one is warned of once, and counts as one that is missing."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._files: dict[Path, list[dict[str, Any]]] = {}  # the SFT's and the baseline's are those of many points
        self._references: dict[tuple[Any, ...], list[list[float]]] = {}

    def learn_references(self, identities: Sequence[str]) -> None:
        """Take the reference log-probs of these points for others of the same initial model and data."""
        for identity in identities:
            pairs = self._rows(identity, "align", VALIDATION_FILE)
            if pairs and "reference_logps" in pairs[0] and (key := self._start(identity)) is not None:
                self._references.setdefault(key, [row["reference_logps"] for row in pairs])

    def chosen_logps(self, identities: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return the (pairs,) log-probs of chosen responses under the initial and the trained model; None if unknown.

        identities: the seeds of a point, whose pairs follow each other. Those under the initial model are another
        point's where the method has no reference.
        """
        known = [logps for identity in identities if (logps := self._chosen_logps(identity)) is not None]
        return None if not known else (np.concatenate([k[0] for k in known]), np.concatenate([k[1] for k in known]))

    def _chosen_logps(self, identity: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        pairs = self._rows(identity, "align", VALIDATION_FILE)
        if not pairs or "logps" not in pairs[0]:
            return None
        if "reference_logps" in pairs[0]:
            initial = [row["reference_logps"] for row in pairs]
        else:
            initial = self._references.get(self._start(identity) or (), [])
        if len(initial) != len(pairs):
            return None
        return np.array(initial, float)[:, 0], np.array([row["logps"] for row in pairs], float)[:, 0]

    def why_unknown(self, identity: str) -> str:
        """Return why the log-probs of a point under the initial model are unknown; empty without held-out pairs."""
        pairs = self._rows(identity, "align", VALIDATION_FILE)
        if not pairs:
            return ""
        return OLD if "logps" not in pairs[0] else NO_REFERENCE

    def held_out_losses(self, identity: str) -> NDArray[np.float64]:
        return np.array([row["loss"] for row in self._rows(identity, "align", VALIDATION_FILE)], float)

    def training(self, identity: str, role: str = "align") -> tuple[NDArray[np.float64], float]:
        """Return the (steps,) losses of a stage's training and the median of its gradient norms, NaN without any."""
        steps = [row for row in self._rows(identity, role, METRICS_FILE) if "loss" in row]
        norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
        return np.array([row["loss"] for row in steps], float), float(np.median(norms)) if norms else float("nan")

    def sft_distance(self, identity: str) -> float:
        """Return the distance that SFT travelled, nats per token; NaN where alignment did not start from it."""
        losses, _ = self.training(identity, "sft")
        return sft_distance(losses) if len(losses) > 1 else float("nan")

    def repeated(self, identity: str, role: str = "generate") -> NDArray[np.float64] | None:
        """Return repeated_share of the first responses of the policy, or of the baseline; None without samples."""
        rows = self._rows(identity, role, SAMPLES_FILE)
        return np.array([repeated_share(row["response"]) for row in rows], float) if rows else None

    def baseline_unfinished(self, identity: str) -> float | None:
        """Return the share of the baseline's responses that do not end; None where it was not sampled here."""
        rows = self._rows(identity, "baseline", SAMPLES_FILE)
        return 1 - sum(bool(row["finished"]) for row in rows) / len(rows) if rows else None

    def _start(self, identity: str) -> tuple[Any, ...] | None:
        """Return what two points share whose initial model and held-out pairs are the same."""
        folder = self.results.artifacts(identity, "align")
        assert folder is not None
        try:
            stage = read_json(folder / STAGE_FILE)
            inputs = stage["inputs"]
            parts = (inputs["model"], inputs["data"], inputs["init"], stage["upstream"].get("init"))
        except (OSError, DamagedFile, KeyError, AttributeError):
            return None
        return tuple(repr(part) for part in parts)

    def _rows(self, identity: str, role: str, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file, of samples the first ones; none where it is missing or damaged."""
        folder = self.results.artifacts(identity, role)
        if folder is None:
            return []
        if folder / name not in self._files:
            self._files[folder / name] = _read(folder / name)
        return self._files[folder / name]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # What is as it was published has all the columns that its stage writes.
        if path.exists() and (damage := find_damage(path.parent, path.parent.name, names=(path.name,))):
            raise DamagedFile(damage)
        return list(islice(read_jsonl(path, KEYS[path.name]), MAX_RESPONSES if path.name == SAMPLES_FILE else None))
    except FileNotFoundError:
        return []
    except (DamagedFile, OSError) as error:
        warn(f"{error}; the diagnosis is without it")
        return []
