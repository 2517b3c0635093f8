"""A sweep whose stages are written, not computed, in any order."""

from __future__ import annotations

from itertools import product

import yaml

from src.stages.averages import mean_and_error
from src.store.files import with_checksum, write_json
from src.store.integrity import DONE, STAGE_FILE, WEIGHTS_REMOVED, describe_files
from src.store.retention import remove_models
from src.store.store import QUALITY_FILE, RESULT_FILE, RESULT_SCHEMA, StageName, Store
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.results import collect
from sweeps.analysis.selection import average_seeds, select_points

NUM_PROMPTS = 40
METHODS = ("dpo", "ipo")


class FakeSweep:
    """Two methods over betas, two learning rates, seeds and variants, in an output_dir."""

    def __init__(
        self, output_dir, rng, *, name="fake", rule="best", seeds=1, keep="best", betas=(0.1, 1.0, 3.0), variants=("",)
    ):
        self.store, self.rng, self.rule = Store(output_dir), rng, rule
        self.folder = SweepFolder(self.store.sweeps / name)
        self.points = [self._point(*values) for values in product(METHODS, betas, (1e-6, 1e-5), range(seeds), variants)]
        self.difficulty = [rng.random() for _ in range(NUM_PROMPTS)]
        self.record = {"name": name, "command": "fake", "store": str(self.store.root), "keep_checkpoints": keep}
        self.record |= {"tracking": {}, "search": None, "finished": None, "state": "running", "select": rule}
        self.record |= {"studies": [], "points": self.points}
        self.folder.write(self.record)

    def _point(self, method, beta, lr, seed, variant):
        name = f"{method}-{beta:g}-{lr:g}-{seed}{variant}"
        point = {
            "setup": "s",
            "method": method,
            "init": "sft",
            "variant": variant,
            "beta": beta,
            "lr": lr,
            "seed": seed,
        }
        point |= {"stop_fraction": 1.0, "label": name}
        point |= {"state": "to do", "error": None, "job": None, "identity": name}
        return point | {"stages": {"align": f"a-{name}", "generate": f"g-{name}", "evaluate": name}}

    def align(self, point):
        stage = self.store.dir(StageName("align", point["stages"]["align"]))
        if not self.store.has_weights(StageName("align", stage.name)):
            stage.mkdir(parents=True, exist_ok=True)
            (stage / "model.safetensors").write_text("weights")
            (stage / WEIGHTS_REMOVED).unlink(missing_ok=True)
            write_json(stage / DONE, {})

    def evaluate(self, point):
        stage = self.store.dir(StageName("evaluate", point["identity"]))
        stage.mkdir(parents=True)
        ability = self.rng.choice([0.5, 0.6, 0.6, 0.7])
        values = [float(d < ability) for d in self.difficulty]
        measurement = {"value": self.rng.random(), "se": 0.1, "n": NUM_PROMPTS}
        result = {"schema": RESULT_SCHEMA, "quality": {"metric": "win_rate", **mean_and_error(values)}}
        result |= {"splits": dict.fromkeys(("selection", "reporting"), mean_and_error(values))}
        result |= {"kl": {"per_sequence": measurement, "per_token": measurement}, "stages": []}
        result |= dict.fromkeys(("reward_accuracy", "reward_margin", "response_tokens"), measurement)
        write_json(stage / RESULT_FILE, result)
        quality = {"prompts": list(range(NUM_PROMPTS)), "values": values, "selection": [True] * NUM_PROMPTS}
        write_json(stage / QUALITY_FILE, {"schema": RESULT_SCHEMA, **quality})
        write_json(stage / STAGE_FILE, {"upstream": {"align": point["stages"]["align"]}})
        write_json(stage / DONE, with_checksum({"identity": stage.name, "files": describe_files(stage)}))

    def selected(self):
        """Return the selected results."""
        return {identity for row in self.best().itertuples() for identity in row.identities}

    def best(self):
        results = collect([self.folder])
        averages = average_seeds(results.points[results.points.candidate])
        return select_points(averages, self.rule, results.prompts)

    def finalize(self):
        """Do what `sweeps.aggregate.finalize` does, without tables and figures; return the selected results."""
        best, selected = self.best(), self.selected()
        entries = {row.method: {"identities": list(row.identities)} for row in best.itertuples()}  # one a method
        self.folder.best_yaml.write_text(yaml.safe_dump({"s": entries}))
        self.record["selected"] = sorted(selected)
        self.folder.write(self.record)
        remove_models(self.store, [point["stages"] for point in self.points], settled=self.folder)
        return selected

    def models(self):
        """Return the points whose models are on disk, whole."""
        names = {path.parent.name for path in self.store.root.glob("align/*/model.safetensors")}
        whole = {name for name in names if self.store.has_weights(StageName("align", name))}
        return {point["identity"] for point in self.points if point["stages"]["align"] in whole}
