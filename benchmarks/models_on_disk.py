"""Models on disk with keep_checkpoints=best: how many while a sweep runs, and that no kill costs one that is selected.

    python -m benchmarks.models_on_disk most [OVERRIDES]      the demo's 48 points
    python -m benchmarks.models_on_disk kills [--kills 20] [--seed 0]

`most` counts the aligned models several times a second, with those that running alignments have not published yet.
`kills` computes twelve points undisturbed, with all models kept, and then for each rule of sweep.select with
keep_checkpoints=best, while launcher and workers are killed (-9) at random moments and the same command is started
again: results, best.yaml and the selected models must be those of the undisturbed sweep, and no selected model may have
been removed meanwhile. Exit code 1 when they are not, or when there were more models than methods and workers.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from src.store.files import find
from src.store.integrity import DONE, WEIGHTS_REMOVED
from src.store.store import StageName
from src.store.sweep_folder import SweepFolder
from tests.support.artifacts import results
from tests.support.commands import ROOT, command, environment

MODEL = "model.safetensors"
NUM_WORKERS = 2
SAMPLE_SECONDS = 0.25
NUM_METHODS = 3  # of the twelve points
RULES = ("best", "lowest_kl_in_shortlist")
DEMO = ["-m", "+sweep=demo", "tracking=none", "keep_checkpoints=best", f"hydra.launcher.workers={NUM_WORKERS}"]
# The larger learning rate spoils its models, so that some points can soon be ruled out by either rule.
TWELVE = [
    *("-m", "method=dpo,ipo,simpo", "beta=0.1,1", "lr=3e-4,2e-2", "tracking=none"),
    *("trainer.sft.max_steps=20", "trainer.align.max_steps=8", "evaluation.generation.max_new_tokens=24"),
    *("trainer.checkpoint_minutes=0", f"hydra.launcher.workers={NUM_WORKERS}"),
]


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `python -m src.train ARGUMENTS` in a process group of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(log: Path, *arguments: str) -> None:
    """Run the command to its end. Raises RuntimeError with its output when it fails."""
    if start(log, *arguments).wait() != 0:
        raise RuntimeError(log.read_text(encoding="utf-8"))


def most_on_disk(folder: Path, overrides: list[str]) -> bool:
    """Count the models of the demo while it runs, print the largest numbers, and return whether they are bounded."""
    started, log = time.monotonic(), folder / "log"
    launcher = start(log, *DEMO, f"output_dir={folder}", *overrides)
    published, all_models, samples = 0, 0, 0
    while launcher.poll() is None:
        time.sleep(SAMPLE_SECONDS)
        now = len(find(folder, f"store/align/*/{MODEL}"))
        unpublished = len(find(folder, f"store/align/.work/*/attempt-*/{MODEL}"))
        published, all_models, samples = max(published, now), max(all_models, now + unpublished), samples + 1
    if launcher.returncode != 0:
        raise RuntimeError(log.read_text(encoding="utf-8"))
    sweep = SweepFolder(folder / "sweeps" / "demo")
    points = sweep.read()["points"]
    num_methods = len({point["method"] for point in points})
    left = {path.parent.name for path in find(folder, f"store/align/*/{MODEL}")}
    is_bounded = all_models <= num_methods + NUM_WORKERS and left == models_of_best(sweep)
    print(f"{len(points)} points, {num_methods} methods, {NUM_WORKERS} workers: {time.monotonic() - started:.0f} s")
    print(f"aligned models on disk, {samples} samples: at most {all_models}, {published} of them published")
    print(f"at the end: {len(left)}, those of best.yaml: {'yes' if left == models_of_best(sweep) else 'NO'}")
    return is_bounded


def best_of(sweep: SweepFolder) -> dict[str, dict[str, Any]]:
    """Return the entries of best.yaml by setup and method, without the path of the checkpoint."""
    table = yaml.safe_load(sweep.best_yaml.read_text(encoding="utf-8"))
    return {
        f"{setup} {method}": {name: value for name, value in entry.items() if name != "checkpoint"}
        for setup, methods in table.items()
        for method, entry in methods.items()
    }


def models_of_best(sweep: SweepFolder) -> set[str]:
    """Return the identities of the models of best.yaml."""
    selected = {identity for entry in best_of(sweep).values() for identity in entry["identities"]}
    return {point["stages"]["align"] for point in sweep.read()["points"] if point["identity"] in selected}


def copy_shared_stages(sweep: SweepFolder, output_dir: Path) -> None:
    """Copy what all points share, so that kills hit points."""
    shared = {(role, identity) for point in sweep.read()["points"] for role, identity in point["stages"].items()}
    for role, identity in shared:
        if role in ("sft", "reference", "baseline"):
            stage = StageName("generate" if role == "baseline" else role, identity)
            source = sweep.store.dir(stage)
            shutil.copytree(source, output_dir / source.relative_to(sweep.output_dir))


class KilledSweep:
    """The twelve points in an output_dir of their own, killed until the sweep has ended."""

    def __init__(self, undisturbed: SweepFolder, output_dir: Path, rule: str, rng: random.Random) -> None:
        self.undisturbed, self.store, self.random = undisturbed, output_dir / "store", rng
        self.sweep, self.log = SweepFolder(output_dir / "sweeps" / rule), output_dir / "log"
        self.arguments = [*arguments_of(rule, output_dir), "keep_checkpoints=best"]
        self.kills: Counter[str] = Counter()
        self.removed: set[str] = set()  # models that were seen to be marked as removed, at any time
        self.most = 0  # published models on disk
        self.limit = NUM_METHODS + NUM_WORKERS if rule == "best" else len(undisturbed.read()["points"])
        output_dir.mkdir()
        copy_shared_stages(undisturbed, output_dir)

    def run_and_kill(self) -> bool:
        """Start the command and kill it at a random moment; return False when it has ended before."""
        moments: dict[str, Callable[[], object]] = {
            "after some seconds": lambda: time.monotonic() > deadline,
            "when a result is published": lambda: self._count(f"evaluate/*/{DONE}") > num_results,
            "when a model is removed": lambda: self._count(f"align/*/{WEIGHTS_REMOVED}") > num_removed,
        }
        name = self.random.choice(list(moments))
        deadline = time.monotonic() + self.random.uniform(3, 15)
        num_results, num_removed = self._count(f"evaluate/*/{DONE}"), self._count(f"align/*/{WEIGHTS_REMOVED}")
        launcher = start(self.log, *self.arguments)
        while launcher.poll() is None and not moments[name]():
            time.sleep(0.005)
            self._look()
        time.sleep(self.random.uniform(0, 0.03))
        is_killed = launcher.poll() is None
        if is_killed:
            os.killpg(launcher.pid, signal.SIGKILL)
            self.kills[name] += 1
        launcher.wait()
        self._look()
        return is_killed

    def violations(self) -> list[str]:
        """Run the sweep to its end and return what differs from the undisturbed one."""
        finish(self.log, *self.arguments)
        expected, actual = results(self.undisturbed.output_dir), results(self.sweep.output_dir)
        selected = models_of_best(self.undisturbed)
        found = [f"differs: {key}" for key in actual if key in expected and actual[key] != expected[key]]
        found += [f"missing: {key}" for key in expected if key not in actual and not key.endswith(f"/{MODEL}")]
        found += [f"lost: the selected model {model}" for model in selected if f"align/{model}/{MODEL}" not in actual]
        found += [f"removed at some time: the selected model {model}" for model in selected & self.removed]
        if best_of(self.sweep) != best_of(self.undisturbed):
            found.append("best.yaml differs")
        if self.most > self.limit:
            found.append(f"{self.most} models at once")
        return found

    def _count(self, pattern: str) -> int:
        return len(find(self.store, pattern))

    def _look(self) -> None:
        self.removed |= {path.parent.name for path in find(self.store, f"align/*/{WEIGHTS_REMOVED}")}
        self.most = max(self.most, self._count(f"align/*/{MODEL}"))


def arguments_of(rule: str, output_dir: Path) -> list[str]:
    return [*TWELVE, f"sweep.select={rule}", f"sweep.name={rule}", f"output_dir={output_dir}"]


def kill(folder: Path, num_kills: int, seed: int) -> bool:
    """Kill sweeps of either rule that often, print what happened, and return whether all is as undisturbed."""
    is_equal = True
    for rule in RULES:
        finish(folder / "log", *arguments_of(rule, folder / "undisturbed"), "keep_checkpoints=all")
        undisturbed = SweepFolder(folder / "undisturbed" / "sweeps" / rule)
        rng, kills, sweeps, num_removed, most = random.Random(seed), Counter[str](), 0, 0, 0
        while kills.total() < num_kills:
            killed = KilledSweep(undisturbed, folder / f"{rule}-{sweeps}", rule, rng)
            while kills.total() + killed.kills.total() < num_kills and killed.run_and_kill():
                pass
            num_removed, most = num_removed + len(killed.removed), max(most, killed.most)
            violations = killed.violations()
            is_equal &= not violations
            kills, sweeps = kills + killed.kills, sweeps + 1
            print(*violations, sep="\n", end="\n" if violations else "", flush=True)
        print(f"sweep.select={rule}: {kills.total()} kills of {sweeps} sweeps:", dict(kills))
        print(
            f"  {num_removed} models removed before a sweep's last start, at most {most} of 12 on disk while they ran;"
        )
        print(f"  results, best.yaml and selected models as undisturbed: {'yes' if is_equal else 'NO'}", flush=True)
    return is_equal


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models_on_disk", description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    most = parts.add_parser("most", help="how many models the demo has on disk at most")
    most.add_argument("overrides", nargs="*", help="of the demo")
    kills = parts.add_parser("kills", help="kill sweeps at random moments")
    kills.add_argument("--kills", type=int, default=20, help="for each rule")
    kills.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="models-on-disk-") as folder:
        if arguments.part == "most":
            return 0 if most_on_disk(Path(folder), arguments.overrides) else 1
        return 0 if kill(Path(folder), arguments.kills, arguments.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
