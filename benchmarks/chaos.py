"""A sweep on a loopback SLURM cluster under random blows: does it end, and with the undisturbed run's results?

    python -m benchmarks.chaos [--seed 0] [--blows 24]        as root, with Debian's SLURM packages

Twelve points of the embedded setup are computed twice: undisturbed by the local launcher, and as SLURM jobs of a
preemptible partition while blows fall at random moments. Every artifact of the two stores is then compared byte for
byte (timings left out). Exit code 1 when a point is missing or differs.
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

ROOT = Path(__file__).resolve().parent.parent
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
        self.blows: dict[str, Callable[[], bool]] = {
            "step killed (scancel --signal=KILL)": self.kill_step,
            "requeued (scontrol requeue)": self.requeue,
            "preempted by a higher partition": self.preempt,
            "told that the time limit is near (USR2)": self.usr2,
            "slurmd killed and restarted": self.kill_slurmd,
            "node lost: its processes killed, then down": self.lose_node,
            "newest checkpoint damaged": self.damage,
            "driver killed": self.kill_driver,
        }

    def driver(self) -> subprocess.Popen[str]:
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
        driver = self.driver()
        output, _ = driver.communicate(timeout=120)
        if driver.returncode not in (0, 1):
            raise RuntimeError(output)

    def running(self) -> list[tuple[str, str]]:
        """(job, node) of what runs."""
        lines = self.cluster.run("squeue", "-h", "-r", "-t", "R", "-o", "%i %N", check=False).splitlines()
        jobs = [line.split() for line in lines]
        return [(parts[0], parts[1]) for parts in jobs if len(parts) == 2]

    def victim(self) -> tuple[str, str] | None:
        running = self.running()
        return self.random.choice(running) if running else None

    def kill_step(self) -> bool:
        # Of the job as a whole SLURM would take it for a cancellation.
        return self._on_job("scancel", "--signal=KILL", "{}.0")

    def requeue(self) -> bool:
        return self._on_job("scontrol", "requeue", "{}")

    def usr2(self) -> bool:
        return self._on_job("scancel", "--signal=USR2", "{}")

    def _on_job(self, *command: str) -> bool:
        if (victim := self.victim()) is None:
            return False
        # scancel waits for a node that does not answer longer than a blow may take.
        self.cluster.run(*(word.format(victim[0]) for word in command), check=False, timeout=10)
        return True

    def preempt(self) -> bool:
        if (victim := self.victim()) is None:
            return False
        wants = ["-p", "gpu", "-w", victim[1], "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1"]
        self.cluster.run("sbatch", *wants)
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
        except OSError:  # gone meanwhile
            return False
        return True

    def kill_driver(self) -> bool:
        """Between writing down that something is submitted and SLURM's answer, when it has something to submit."""
        driver = self.driver()
        end = time.monotonic() + 3
        while time.monotonic() < end and driver.poll() is None:
            if any(s.state == "preparing" for s in submissions(SweepFolder(self.sweep))):
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
        return True

    def strike(self) -> None:
        name = self.random.choice(list(self.blows))
        if self.blows[name]():
            self.count[name] += 1
            print(f"  {sum(self.count.values()):3}  {name}", flush=True)

    def quiet(self) -> bool:
        return not self.cluster.run("squeue", "-h", check=False).strip()

    def done(self) -> int:
        return len(list((self.folder / "store").glob("evaluate/*/DONE")))

    def run(self, blows: int, seconds_between: float) -> int:
        """Strike until there were enough blows and all is done; how many times the command had to be given."""
        for _ in range(3):  # the first submission is where a driver has most to lose
            self.kill_driver()
            self.count["driver killed"] += 1
        self.submit()
        submissions = 1
        while sum(self.count.values()) < blows or self.done() < POINTS:
            time.sleep(self.random.expovariate(1 / seconds_between))
            if sum(self.count.values()) < blows:
                self.strike()
            if self.quiet():
                if self.done() == POINTS:
                    break
                self.submit()
                submissions += 1
        while not self.quiet():
            time.sleep(0.5)
        return submissions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blows", type=int, default=24, help="at least so many, unless the sweep ends before")
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between blows")
    parser.add_argument("--folder", type=Path, help="where the stores and the cluster go; default: a temporary folder")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = arguments.folder or Path(temporary)
        calm = folder / "calm"
        print("undisturbed, on this machine", flush=True)
        started = time.monotonic()
        local = [sys.executable, "-m", "src.train", *SWEEP, f"output_dir={calm}"]
        subprocess.run(local, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        calm_seconds = time.monotonic() - started
        cluster = Cluster(folder / "slurm")
        cluster.up()
        try:
            print(f"on SLURM, seed {arguments.seed}", flush=True)
            chaos = Chaos(cluster, folder / "chaos", arguments.seed)
            started = time.monotonic()
            given = chaos.run(arguments.blows, arguments.every)
            seconds = time.monotonic() - started
        finally:
            cluster.down()
        return report(chaos, calm, given, calm_seconds, seconds)


def report(chaos: Chaos, calm: Path, given: int, calm_seconds: float, seconds: float) -> int:
    expected, found = results(calm), results(chaos.folder)
    differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    starts = [
        submission.status(index).get("starts", 0)
        for submission in submissions(SweepFolder(chaos.sweep))
        for index in range(len(submission.tasks))
    ]
    record = read_json(chaos.sweep / "sweep.json")
    print("\n| blow | times |\n|---|---:|")
    for name, times in sorted(chaos.count.items()):
        print(f"| {name} | {times} |")
    print(f"| all | {sum(chaos.count.values())} |\n")
    print(f"points done: {chaos.done()} of {POINTS}; sweep.json says {record['state']}")
    print(f"artifacts compared: {len(expected)}; different: {len(differing)}")
    for key in differing[:10]:
        print(f"  {key}")
    print(f"starts of jobs: {sum(starts)} for {len(starts)} jobs; the command was given {given} times to its end")
    print(f"seconds: {seconds:.0f} under blows, {calm_seconds:.0f} undisturbed (two warm processes, no SLURM)")
    return 1 if differing or chaos.done() != POINTS or record["state"] != "done" else 0


if __name__ == "__main__":
    sys.exit(main())
