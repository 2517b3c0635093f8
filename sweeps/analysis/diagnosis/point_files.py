"""What rules need of a point, read from the files of its stages: only points that are examined are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from src.errors import DamagedFile, warn
from src.store.files import read_bytes, read_json
from src.store.integrity import STAGE_FILE, find_damage
from src.store.store import METRICS_FILE, SAMPLES_FILE, VALIDATION_FILE
from sweeps.analysis.diagnosis.samples import repeated_share
from sweeps.analysis.diagnosis.training import sft_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sweeps.analysis.results import Results

OLD_VERSION = "their results are of a version that did not keep log-probs"
NO_REFERENCE = "no point of a method with a reference has the same initial model and held-out pairs"
MAX_RESPONSES = 256  # of a point that are searched for repetition
Columns = dict[str, "NDArray[np.float64]"]


class PointFiles:
    """The files of the points of some sweeps; a damaged one is warned of once, and counts as one that is missing."""

    def __init__(self, results: Results) -> None:
        self.results = results
        # Columns, not rows, which would be much larger in memory; SFT's are those of many points.
        self._files: dict[Path, Columns] = {}
        self._references: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def learn_references(self, identities: Sequence[str]) -> None:
        """Take the reference log-probs of these points for others of the same initial model and data."""
        for identity in identities:
            pairs = self._columns(identity, "align", VALIDATION_FILE)
            if "reference_logps" in pairs and (key := self._start(identity)) is not None:
                self._references.setdefault(key, pairs["reference_logps"])

    def chosen_logps(self, identities: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return the (pairs,) log-probs of chosen responses under the initial and the trained model; None if unknown.

        identities: the seeds of a point, which are averaged, since their pairs are the same. Those under the initial
        model are another point's where the method has no reference.
        """
        known = [logps for identity in identities if (logps := self._chosen_logps(identity)) is not None]
        if len({len(initial) for initial, _ in known}) != 1:
            return None
        initial, final = np.mean(known, axis=0)
        return initial, final

    def _chosen_logps(self, identity: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        pairs = self._columns(identity, "align", VALIDATION_FILE)
        if "logps" not in pairs:
            return None
        initial = pairs.get("reference_logps")
        if initial is None:
            initial = self._references.get(self._start(identity) or ())
        if initial is None or len(initial) != len(pairs["logps"]):
            return None
        return initial[:, 0], pairs["logps"][:, 0]

    def why_unknown(self, identity: str) -> str:
        """Return why the log-probs of a point under the initial model are unknown; empty without held-out pairs."""
        pairs = self._columns(identity, "align", VALIDATION_FILE)
        return "" if not pairs else OLD_VERSION if "logps" not in pairs else NO_REFERENCE

    def held_out_losses(self, identity: str) -> NDArray[np.float64]:
        return self._columns(identity, "align", VALIDATION_FILE).get("loss", np.empty(0))

    def training(self, identity: str, role: str = "align") -> tuple[NDArray[np.float64], float]:
        """Return the (steps,) losses of a stage's training and the median of its gradient norms, NaN without any."""
        steps = self._columns(identity, role, METRICS_FILE)
        norms = steps.get("grad_norm", np.empty(0))
        return steps.get("loss", np.empty(0)), float(np.median(norms)) if len(norms) else float("nan")

    def sft_distance(self, identity: str) -> float:
        """Return the distance that SFT travelled, nats per token; NaN where alignment did not start from it."""
        losses, _ = self.training(identity, "sft")
        return sft_distance(losses) if len(losses) > 1 else float("nan")

    def repeated(self, identity: str, role: str = "generate") -> NDArray[np.float64] | None:
        """Return repeated_share of the first responses of the policy, or of the baseline; None without samples."""
        return self._columns(identity, role, SAMPLES_FILE).get("repeated")

    def baseline_unfinished(self, identity: str) -> float | None:
        """Return the share of the baseline's responses that do not end; None where it was not sampled here."""
        finished = self._columns(identity, "baseline", SAMPLES_FILE).get("finished")
        return None if finished is None else 1 - float(finished.mean())

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

    def _columns(self, identity: str, role: str, name: str) -> Columns:
        """Return the columns of a file; none where it is missing or damaged."""
        folder = self.results.artifacts(identity, role)
        if folder is None:
            return {}
        if folder / name not in self._files:
            self._files[folder / name] = _read(folder / name)
        return self._files[folder / name]


def _read(path: Path) -> Columns:
    try:
        # What is as it was published has all the columns that its stage writes.
        if path.exists() and (damage := find_damage(path.parent, path.parent.name, names=(path.name,))):
            raise DamagedFile(damage)
        lines = read_bytes(path).splitlines()
        try:
            return _parse(path.name, lines)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DamagedFile(f"{path}: damaged, its lines are not what its stage writes") from None
    except FileNotFoundError:
        return {}
    except (DamagedFile, OSError) as error:
        warn(f"{error}; the diagnosis is without it")
        return {}


def _parse(name: str, lines: list[bytes]) -> Columns:
    """Return the columns that rules need of a file with this name; none without lines."""
    rows = [orjson.loads(line) for line in lines]
    if name == SAMPLES_FILE:
        repeated = np.array([repeated_share(row["response"]) for row in rows[:MAX_RESPONSES]], float)
        finished = np.array([row["finished"] for row in rows], float)
        return {"repeated": repeated, "finished": finished} if rows else {}
    if name == METRICS_FILE:  # where SFT is validated, it has lines of another kind
        rows = [row for row in rows if "loss" in row]
    names = ("loss", "grad_norm") if name == METRICS_FILE else ("loss", "logps", "reference_logps")
    return {key: np.array([row[key] for row in rows], float) for key in names if rows and key in rows[0]}
