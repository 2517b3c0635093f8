"""Fault injection: a sweep on a loopback SLURM cluster whose jobs, nodes and submitters are killed at random.

    python -m benchmarks.chaos [--seed 0] [--faults 24]        as root, with Debian's SLURM packages

Twelve points of the embedded setup are computed twice: by the local launcher without faults, and as SLURM jobs of a
preemptible partition while faults are injected. Every artifact of the two stores is then compared byte for byte, except
timings. Exit code 1 when a point is missing or differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launchers.slurm.job_records import submissions
from src.store.sweep_folder import SweepFolder
from tests.support.artifacts import results
from tests.support.commands import ROOT
from tests.support.slurm_cluster import Cluster, missing

SWEEP = [
    *("-m", "method=dpo,ipo,simpo", "beta=0.03,0.1,0.3,1", "lr=1e-3", "sweep.name=chaos", "tracking=none"),
    *("trainer.align.epochs=4", "trainer.checkpoint_minutes=0.01"),
]
SLURM = [
    *("hydra/launcher=slurm", "hydra.launcher.partition=preempt", "hydra.launcher.array_parallelism=4"),
    *("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"),
]
NUM_POINTS = 12
SUBMITTER_KILLED = "submitter killed"


class FaultInjector:
    """Runs the sweep in an output_dir and injects random faults; each fault returns False when it has no target."""

    def __init__(self, cluster: Cluster, output_dir: Path, seed: int) -> None:
        self.cluster, self.output_dir, self.random = cluster, output_dir, random.Random(seed)
        self.sweep = SweepFolder(output_dir / "sweeps" / "chaos")
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, Callable[[], bool]] = {
            "step killed (scancel --signal=KILL)": self.kill_step,
            "requeued (scontrol requeue)": self.requeue,
            "preempted by a higher partition": self.preempt,
            "signaled that the time limit is near (USR2)": self.usr2,
            "slurmd killed and restarted": self.kill_slurmd,
            "node lost: its processes killed, then set down": self.lose_node,
            "newest checkpoint corrupted": self.corrupt_checkpoint,
            SUBMITTER_KILLED: self.kill_submitter,
        }

    def start_submitter(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "src.train", *SWEEP, *SLURM, f"output_dir={self.output_dir}"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.cluster.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def submit(self) -> None:
        submitter = self.start_submitter()
        output, _ = submitter.communicate(timeout=120)
        if submitter.returncode not in (0, 1):
            raise RuntimeError(output)

    def random_job(self) -> tuple[str, str] | None:
        """Return (id, node) of a running job; None when nothing runs."""
        lines = self.cluster.run("squeue", "-h", "-r", "-t", "R", "-o", "%i %N", check=False).splitlines()
        jobs = [(parts[0], parts[1]) for parts in map(str.split, lines) if len(parts) == 2]
        return self.random.choice(jobs) if jobs else None

    def kill_step(self) -> bool:
        # SLURM would treat a KILL of the whole job as a cancellation.
        return self._on_job("scancel", "--signal=KILL", "{}.0")

    def requeue(self) -> bool:
        return self._on_job("scontrol", "requeue", "{}")

    def usr2(self) -> bool:
        return self._on_job("scancel", "--signal=USR2", "{}")

    def _on_job(self, *command: str) -> bool:
        if (job := self.random_job()) is None:
            return False
        # scancel waits long for a node that does not answer.
        self.cluster.run(*(word.format(job[0]) for word in command), check=False, timeout=10)
        return True

    def preempt(self) -> bool:
        if (job := self.random_job()) is None:
            return False
        options = ["-p", "gpu", "-w", job[1], "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1"]
        self.cluster.run("sbatch", *options)
        return True

    def kill_slurmd(self) -> bool:
        if (job := self.random_job()) is None:
            return False
        self.cluster.kill_node(job[1])
        time.sleep(1)
        self.cluster.start_node(job[1])
        return True

    def lose_node(self) -> bool:
        if (job := self.random_job()) is None:
            return False
        node = job[1]
        self.cluster.kill_node(node, jobs=True)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
        time.sleep(1)
        self.cluster.start_node(node)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return True

    def corrupt_checkpoint(self) -> bool:
        folders = {path.parent for path in (self.output_dir / "store").glob("align/.work/*/checkpoints/*/step-*")}
        if not folders:
            return False
        newest = max(self.random.choice(sorted(folders)).glob("step-*"), default=None)
        try:
            with (newest or self.output_dir).joinpath("__0_0.distcp").open("r+b") as handle:
                handle.seek(self.random.randrange(1000, 100_000))
                handle.write(b"\xff" * 64)
        except OSError:  # deleted meanwhile
            return False
        return True

    def kill_submitter(self) -> bool:
        """Kill a submitter before it records the ids of its jobs, if it has anything to submit."""
        submitter = self.start_submitter()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and submitter.poll() is None:
            if any(submission.state == "preparing" for submission in submissions(self.sweep)):
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(submitter.pid, signal.SIGKILL)
        submitter.communicate()
        return True

    def inject_random_fault(self) -> None:
        name = self.random.choice(list(self.faults))
        if self.faults[name]():
            self.counts[name] += 1
            print(f"  {self.counts.total():3}  {name}", flush=True)

    def is_idle(self) -> bool:
        return not self.cluster.run("squeue", "-h", check=False).strip()

    def num_done(self) -> int:
        return len(list((self.output_dir / "store").glob("evaluate/*/DONE")))

    def run(self, num_faults: int, mean_seconds: float) -> int:
        """Inject faults until there were enough and all points are done; return how often the sweep was submitted."""
        for _ in range(3):  # the first submission has most jobs to lose
            self.kill_submitter()
            self.counts[SUBMITTER_KILLED] += 1
        self.submit()
        num_submissions = 1
        while self.counts.total() < num_faults or self.num_done() < NUM_POINTS:
            time.sleep(self.random.expovariate(1 / mean_seconds))
            if self.counts.total() < num_faults:
                self.inject_random_fault()
            if self.is_idle():
                if self.num_done() == NUM_POINTS:
                    break
                self.submit()
                num_submissions += 1
        while not self.is_idle():
            time.sleep(0.5)
        return num_submissions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=24, help="number of faults, fewer if the sweep ends before")
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between faults")
    parser.add_argument("--folder", type=Path, help="folder of the stores and the cluster; default: a temporary one")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = arguments.folder or Path(temporary)
        expected_dir = folder / "without-faults"
        print("without faults, on this machine", flush=True)
        started = time.monotonic()
        local = [sys.executable, "-m", "src.train", *SWEEP, f"output_dir={expected_dir}"]
        subprocess.run(local, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        local_seconds = time.monotonic() - started
        cluster = Cluster(folder / "slurm")
        cluster.up()
        try:
            print(f"on SLURM, seed {arguments.seed}", flush=True)
            injector = FaultInjector(cluster, folder / "chaos", arguments.seed)
            started = time.monotonic()
            num_submissions = injector.run(arguments.faults, arguments.every)
            seconds = time.monotonic() - started
        finally:
            cluster.down()
        return report(injector, expected_dir, num_submissions, local_seconds, seconds)


def report(
    injector: FaultInjector, expected_dir: Path, num_submissions: int, local_seconds: float, seconds: float
) -> int:
    """Print what was injected and whether the results are equal; return the exit code."""
    expected, actual = results(expected_dir), results(injector.output_dir)
    differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    tasks = [task for submission in submissions(injector.sweep) for task in submission.tasks]
    starts = [task.status().get("starts", 0) for task in tasks]
    state = injector.sweep.read()["state"]
    print("\n| injected fault | times |\n|---|---:|")
    for name, times in sorted(injector.counts.items()):
        print(f"| {name} | {times} |")
    print(f"| all | {injector.counts.total()} |\n")
    print(f"points done: {injector.num_done()} of {NUM_POINTS}; state of the sweep: {state}")
    print(f"artifacts compared: {len(expected)}; different: {len(differing)}")
    for key in differing[:10]:
        print(f"  {key}")
    print(f"starts of jobs: {sum(starts)} for {len(starts)} jobs; submissions of the sweep: {num_submissions}")
    print(f"seconds: {seconds:.0f} with faults on SLURM, {local_seconds:.0f} without (local launcher)")
    return 1 if differing or injector.num_done() != NUM_POINTS or state != "done" else 0


if __name__ == "__main__":
    sys.exit(main())
