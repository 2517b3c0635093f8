"""A sweep on a loopback SLURM cluster with injected faults: does it end with the results of an undisturbed run?

    python -m benchmarks.chaos [--seed 0] [--faults 24]        as root, with Debian's SLURM packages

Twelve points of the embedded setup are computed twice: undisturbed by the local launcher, and as SLURM jobs of a
preemptible partition while faults are injected at random moments. Every artifact of the two stores is then compared
byte for byte (timings left out). Exit code 1 when a point is missing or differs.
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
from src.store.files import read_json
from src.store.sweep_folder import SweepFolder
from tests.support.artifacts import results
from tests.support.slurm_cluster import Cluster, missing

ROOT = Path(__file__).resolve().parents[1]
SWEEP = [
    *("-m", "method=dpo,ipo,simpo", "beta=0.03,0.1,0.3,1", "lr=1e-3", "sweep.name=chaos", "tracking=none"),
    *("trainer.align.epochs=4", "trainer.save_steps=10"),
]
ON_SLURM = [
    *("hydra/launcher=slurm", "hydra.launcher.partition=preempt", "hydra.launcher.array_parallelism=4"),
    *("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"),
]
POINTS = 12


class Chaos:
    def __init__(self, cluster: Cluster, folder: Path, seed: int) -> None:
        self.cluster, self.folder, self.random = cluster, folder, random.Random(seed)
        self.sweep = folder / "sweeps" / "chaos"
        self.count: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, Callable[[], bool]] = {
            "step killed (scancel --signal=KILL)": self.kill_step,
            "requeued (scontrol requeue)": self.requeue,
            "preempted by a higher partition": self.preempt,
            "signaled that the time limit is near (USR2)": self.usr2,
            "slurmd killed and restarted": self.kill_slurmd,
            "node lost: its processes killed, then down": self.lose_node,
            "newest checkpoint damaged": self.damage,
            "submitting command killed": self.kill_submitter,
        }

    def start_command(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "src.train", *SWEEP, *ON_SLURM, f"output_dir={self.folder}"]
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
        process = self.start_command()
        output, _ = process.communicate(timeout=120)
        if process.returncode not in (0, 1):
            raise RuntimeError(output)

    def running(self) -> list[tuple[str, str]]:
        """Return (job, node) of every running job."""
        lines = self.cluster.run("squeue", "-h", "-r", "-t", "R", "-o", "%i %N", check=False).splitlines()
        jobs = [line.split() for line in lines]
        return [(parts[0], parts[1]) for parts in jobs if len(parts) == 2]

    def victim(self) -> tuple[str, str] | None:
        running = self.running()
        return self.random.choice(running) if running else None

    def kill_step(self) -> bool:
        # Killing the whole job would be a cancellation for SLURM.
        return self._on_job("scancel", "--signal=KILL", "{}.0")

    def requeue(self) -> bool:
        return self._on_job("scontrol", "requeue", "{}")

    def usr2(self) -> bool:
        return self._on_job("scancel", "--signal=USR2", "{}")

    def _on_job(self, *command: str) -> bool:
        if (victim := self.victim()) is None:
            return False
        # scancel waits longer for a node that does not answer than a fault may take.
        self.cluster.run(*(word.format(victim[0]) for word in command), check=False, timeout=10)
        return True

    def preempt(self) -> bool:
        if (victim := self.victim()) is None:
            return False
        options = ["-p", "gpu", "-w", victim[1], "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1"]
        self.cluster.run("sbatch", *options)
        return True

    def kill_slurmd(self) -> bool:
        if (victim := self.victim()) is None:
            return False
        self.cluster.kill_node(victim[1])
        time.sleep(1)
        self.cluster.start_node(victim[1])
        return True

    def lose_node(self) -> bool:
        if (victim := self.victim()) is None:
            return False
        node = victim[1]
        self.cluster.kill_node(node, jobs=True)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
        time.sleep(1)
        self.cluster.start_node(node)
        self.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return True

    def damage(self) -> bool:
        folders = {path.parent for path in (self.folder / "store").glob("align/.work/*/checkpoints/*/step-*")}
        if not folders:
            return False
        newest = max(self.random.choice(sorted(folders)).glob("step-*"), default=None)
        try:
            with (newest or self.folder).joinpath("model.safetensors").open("r+b") as handle:
                handle.seek(self.random.randrange(1000, 100_000))
                handle.write(b"\xff" * 64)
        except OSError:  # deleted meanwhile
            return False
        return True

    def kill_submitter(self) -> bool:
        """Kill the command between recording a submission and SLURM's answer, when it has something to submit."""
        process = self.start_command()
        end = time.monotonic() + 3
        while time.monotonic() < end and process.poll() is None:
            if any(s.state == "preparing" for s in submissions(SweepFolder(self.sweep))):
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True

    def inject(self) -> None:
        name = self.random.choice(list(self.faults))
        if self.faults[name]():
            self.count[name] += 1
            print(f"  {sum(self.count.values()):3}  {name}", flush=True)

    def queue_is_empty(self) -> bool:
        return not self.cluster.run("squeue", "-h", check=False).strip()

    def num_done(self) -> int:
        return len(list((self.folder / "store").glob("evaluate/*/DONE")))

    def run(self, num_faults: int, seconds_between: float) -> int:
        """Inject faults until there were enough and all is done; return how often the command had to be run."""
        for _ in range(3):  # the first submission has the most to lose
            self.kill_submitter()
            self.count["submitting command killed"] += 1
        self.submit()
        submissions = 1
        while sum(self.count.values()) < num_faults or self.num_done() < POINTS:
            time.sleep(self.random.expovariate(1 / seconds_between))
            if sum(self.count.values()) < num_faults:
                self.inject()
            if self.queue_is_empty():
                if self.num_done() == POINTS:
                    break
                self.submit()
                submissions += 1
        while not self.queue_is_empty():
            time.sleep(0.5)
        return submissions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=24, help="at least this many, unless the sweep ends before")
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between faults")
    parser.add_argument("--folder", type=Path, help="folder of the stores and the cluster; default: a temporary folder")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = arguments.folder or Path(temporary)
        undisturbed = folder / "undisturbed"
        print("undisturbed, on this machine", flush=True)
        started = time.monotonic()
        local = [sys.executable, "-m", "src.train", *SWEEP, f"output_dir={undisturbed}"]
        subprocess.run(local, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        undisturbed_seconds = time.monotonic() - started
        cluster = Cluster(folder / "slurm")
        cluster.up()
        try:
            print(f"on SLURM, seed {arguments.seed}", flush=True)
            chaos = Chaos(cluster, folder / "chaos", arguments.seed)
            started = time.monotonic()
            num_submissions = chaos.run(arguments.faults, arguments.every)
            seconds = time.monotonic() - started
        finally:
            cluster.down()
        return report(chaos, undisturbed, num_submissions, undisturbed_seconds, seconds)


def report(chaos: Chaos, undisturbed: Path, num_submissions: int, undisturbed_seconds: float, seconds: float) -> int:
    expected, actual = results(undisturbed), results(chaos.folder)
    differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    starts = [
        submission.status(index).get("starts", 0)
        for submission in submissions(SweepFolder(chaos.sweep))
        for index in range(len(submission.tasks))
    ]
    record = read_json(chaos.sweep / "sweep.json")
    print("\n| fault | times |\n|---|---:|")
    for name, times in sorted(chaos.count.items()):
        print(f"| {name} | {times} |")
    print(f"| all | {sum(chaos.count.values())} |\n")
    print(f"points done: {chaos.num_done()} of {POINTS}; sweep.json says {record['state']}")
    print(f"artifacts compared: {len(expected)}; different: {len(differing)}")
    for key in differing[:10]:
        print(f"  {key}")
    print(f"starts of jobs: {sum(starts)} for {len(starts)} jobs; commands that were not killed: {num_submissions}")
    print(f"seconds: {seconds:.0f} with faults, {undisturbed_seconds:.0f} undisturbed (two warm processes, no SLURM)")
    return 1 if differing or chaos.num_done() != POINTS or record["state"] != "done" else 0


if __name__ == "__main__":
    sys.exit(main())
