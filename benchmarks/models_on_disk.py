"""Models on disk with keep_checkpoints=best: how many while a sweep runs, and that no kill costs one that is selected.

    python -m benchmarks.models_on_disk most [OVERRIDES]      the demo's 48 points
    python -m benchmarks.models_on_disk kills [--kills 20] [--seed 0]

`most` counts the aligned models several times a second, with those that running alignments have not published yet.
`kills` computes twelve small points undisturbed, with all models kept, and then for each rule of sweep.select with
keep_checkpoints=best, while launcher and workers are killed (-9) at random moments and the same command is started
again: results, best.yaml and the selected models must be those of the undisturbed sweep, and no selected model may have
been removed meanwhile. Commands are forks of a process that has imported everything. Exit code 1 when they are not, or
when there were more models than methods and workers.
"""

from __future__ import annotations

import argparse
import contextlib
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
from tests.fuzz.sandbox import Sandbox, preload
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
    *("dataset.sft_size=128", "dataset.train_size=128", "dataset.validation_size=16", "evaluation.num_prompts=32"),
    *("evaluation.generation.max_new_tokens=16", "trainer.align.batch_size=16", "trainer.sft.batch_size=32"),
    *("trainer.checkpoint_minutes=0", f"hydra.launcher.workers={NUM_WORKERS}"),
]
TIMEOUT_S = 900.0


def most_on_disk(folder: Path, overrides: list[str]) -> bool:
    """Count the models of the demo while it runs, print the largest numbers, and return whether they are bounded."""
    started, log = time.monotonic(), folder / "log"
    with log.open("wb") as output:
        arguments = command(*DEMO, f"output_dir={folder}", *overrides)
        launcher = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
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
    """The twelve points in a folder of their own, killed until the sweep has ended."""

    def __init__(self, undisturbed: SweepFolder, folder: Path, rule: str, rng: random.Random) -> None:
        self.undisturbed, self.sandbox, self.random = undisturbed, Sandbox(folder), rng
        self.store, self.sweep = self.sandbox.out / "store", SweepFolder(self.sandbox.out / "sweeps" / rule)
        self.arguments = [*arguments_of(rule), "keep_checkpoints=best"]
        self.kills: Counter[str] = Counter()
        self.removed: set[str] = set()  # models that were seen to be marked as removed, at any time
        self.most = 0  # published models on disk
        self.limit = NUM_METHODS + NUM_WORKERS if rule == "best" else len(undisturbed.read()["points"])
        copy_shared_stages(undisturbed, self.sandbox.out)

    def run_and_kill(self) -> bool:
        """Start the command and kill it at a random moment; return False when it has ended before."""
        moments: dict[str, Callable[[], object]] = {
            "after some seconds": lambda: time.monotonic() > deadline,
            "when a result is published": lambda: self._count(f"evaluate/*/{DONE}") > num_results,
            "when a model is removed": lambda: self._count(f"align/*/{WEIGHTS_REMOVED}") > num_removed,
        }
        name = self.random.choice(list(moments))
        deadline = time.monotonic() + self.random.uniform(1, 15)
        num_results, num_removed = self._count(f"evaluate/*/{DONE}"), self._count(f"align/*/{WEIGHTS_REMOVED}")
        pid = self.sandbox.start(*self.arguments, timeout=TIMEOUT_S)
        has_ended = False
        while not moments[name]() and not has_ended:
            time.sleep(0.005)
            self._look()
            has_ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        if not has_ended:
            time.sleep(self.random.uniform(0, 0.03))
            with contextlib.suppress(ProcessLookupError):  # the command has ended meanwhile
                os.killpg(pid, signal.SIGKILL)
            self.kills[name] += 1
            os.waitpid(pid, 0)
        self._look()
        return not has_ended

    def violations(self) -> list[str]:
        """Run the sweep to its end and return what differs from the undisturbed one."""
        finish(self.sandbox, *self.arguments)
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


def arguments_of(rule: str) -> list[str]:
    return [*TWELVE, f"sweep.select={rule}", f"sweep.name={rule}", "output_dir=out"]


def finish(sandbox: Sandbox, *arguments: str) -> None:
    """Run the command to its end. Raises RuntimeError with its output when it fails."""
    done = sandbox.run(*arguments, timeout=TIMEOUT_S)
    if done.code != 0:
        raise RuntimeError(done.stdout + done.stderr)


def kill(folder: Path, num_kills: int, seed: int) -> bool:
    """Kill sweeps of either rule that often, print what happened, and return whether all is as undisturbed."""
    preload()
    is_equal, sandbox = True, Sandbox(folder / "undisturbed")
    for rule in RULES:
        finish(sandbox, *arguments_of(rule), "keep_checkpoints=all")
        undisturbed = SweepFolder(sandbox.out / "sweeps" / rule)
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
