"""A real SLURM cluster on loopback, for trying things and for the tests: `make slurm-up`, `make slurm-down`.

munged, MariaDB, slurmdbd, slurmctld and NODES slurmd of CPUS fake CPUs and GPUS fake GPUs each, as root and without
systemd, from Debian's packages; state, logs and sockets below one folder. Partitions: `gpu` (the default), and
`preempt`, whose jobs are requeued when `gpu` needs their nodes. Imports nothing beyond the standard library, as it runs
before .venv exists.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.ports import free_port

PACKAGES = "slurmctld slurmd slurm-client slurmdbd munge mariadb-server slurm-wlm-basic-plugins slurm-wlm-mysql-plugin"
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db")

TEMPLATES = Path(__file__).resolve().parent / "slurm_conf"


def missing() -> str | None:
    """Return why no cluster can be started on this machine; None when it can."""
    if os.geteuid() != 0:
        return "starting SLURM daemons needs root"
    absent = [p for p in PROGRAMS if shutil.which(p) is None]
    return f"{', '.join(absent)} not installed: apt-get install --no-install-recommends {PACKAGES}" if absent else None


def install() -> None:
    """Install the Debian packages without letting them start any service."""
    policy = Path("/usr/sbin/policy-rc.d")
    if not policy.exists():
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
    arguments = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES.split()]
    subprocess.run(arguments, check=True, env=quiet, stdout=subprocess.DEVNULL)


class Cluster:
    """One cluster below `root`. After `up()`, commands run with `environment()` talk to it."""

    def __init__(self, root: Path, nodes: int = 4, cpus: int = 32, gpus: int = 8, max_array: int = 2001) -> None:
        self.root = root.absolute()
        self.nodes, self.cpus, self.gpus, self.max_array = nodes, cpus, gpus, max_array

    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> str:
        """Return the output of a SLURM command; without `check`, "" when it fails or a daemon does not answer."""
        try:
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            if check:
                raise
            return ""
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def up(self) -> None:
        if reason := missing():
            raise RuntimeError(reason)
        if any(_alive(pid) for _, pid in self._pids()):
            raise RuntimeError(f"{self.root}: a cluster is running there; make slurm-down stops it")
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("run", "log", "etc", "ctld", "mysql", "dev", "munge"):
            (self.root / name).mkdir(parents=True)
        try:
            self._configure()
            self._start_munge()
            self._start_mariadb()
            self._start_slurm()
        except BaseException:
            self.down()
            raise

    def _configure(self) -> None:
        # SLURM takes any character device for a GPU.
        for i in range(self.gpus):
            os.mknod(self.root / "dev" / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        ports = [free_port() for _ in range(self.nodes + 3)]
        self.db_port, host = ports[2], socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3 + i]} CPUs={self.cpus} Boards=1 "
            f"SocketsPerBoard=2 CoresPerSocket={self.cpus // 2} ThreadsPerCore=1 RealMemory=131072 "
            f"Gres=gpu:{self.gpus} State=UNKNOWN"
            for i in range(self.nodes)
        )
        values = {"root": self.root, "host": host, "nodes": nodes, "max_array": self.max_array}
        values |= {"ctld_port": ports[0], "dbd_port": ports[1], "db_port": ports[2]}
        etc = self.root / "etc"
        (etc / "slurm.conf").write_text((TEMPLATES / "slurm.conf").read_text().format(**values))
        (etc / "slurmdbd.conf").write_text((TEMPLATES / "slurmdbd.conf").read_text().format(**values))
        (etc / "slurmdbd.conf").chmod(0o600)
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu File={self.root}/dev/gpu[0-{self.gpus - 1}]\n"
        (etc / "gres.conf").write_text(gres)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.root / "env.sh").write_text(f"export SLURM_CONF={etc / 'slurm.conf'}\n")

    def _start_munge(self) -> None:
        key = self.root / "etc" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        run, log = self.root / "run", self.root / "log"
        # --force: a path below a world-writable folder is a warning, not an error.
        subprocess.run(
            [
                *("munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket"),
                *(
                    f"--pid-file={run}/munged.pid",
                    f"--log-file={log}/munged.log",
                    f"--seed-file={self.root}/munge/seed",
                ),
            ],
            check=True,
            stderr=(log / "munged.err").open("w"),
        )

    def _start_mariadb(self) -> None:
        run, log = self.root / "run", self.root / "log"
        # A server deletes the temporary tables in its tmpdir when it starts, also those of another cluster.
        (self.root / "tmp").mkdir(exist_ok=True)
        common = [
            *("--no-defaults", "--user=root", f"--datadir={self.root}/mysql", f"--tmpdir={self.root}/tmp"),
            "--innodb-log-file-size=16M",
        ]
        with (log / "mysql-install.log").open("w") as out:
            options = ["--auth-root-authentication-method=socket", "--skip-test-db"]
            subprocess.run(["mariadb-install-db", *common, *options], check=True, stdout=out, stderr=out)
        with (log / "mysqld.log").open("w") as out:
            subprocess.Popen(
                [
                    *("mariadbd", *common, f"--socket={run}/mysql.sock", f"--pid-file={run}/mysqld.pid"),
                    *("--bind-address=127.0.0.1", f"--port={self.db_port}", "--skip-name-resolve", "--skip-log-bin"),
                    *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
                    "--innodb-flush-log-at-trx-commit=0",
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        client = ["--no-defaults", "-S", f"{run}/mysql.sock"]
        self._wait("MariaDB", lambda: _succeeds(["mariadb-admin", *client, "ping"]))
        # slurmdbd connects to its database over TCP only.
        setup = (
            "CREATE DATABASE slurm_acct_db; CREATE USER slurm@127.0.0.1 IDENTIFIED BY 'slurm';"
            " GRANT ALL ON slurm_acct_db.* TO slurm@127.0.0.1;"
        )
        subprocess.run(["mariadb", *client, "-e", setup], check=True)

    def _start_slurm(self) -> None:
        self._daemon("slurmdbd")
        # Its first start creates the tables; sacctmgr answers when they exist.
        self._wait("slurmdbd", lambda: _succeeds(["sacctmgr", "-i", "show", "cluster"], self.environment()))
        self.run("sacctmgr", "-i", "add", "cluster", "loopback", check=False)
        self._daemon("slurmctld", "-c")
        self._wait("slurmctld", lambda: " UP" in self.run("scontrol", "ping", check=False))
        for i in range(self.nodes):
            (self.root / f"spool-n{i + 1}").mkdir()
            self.start_node(f"n{i + 1}")
        idle = ["sinfo", "-h", "-p", "gpu", "-t", "idle", "-o", "%D"]
        self._wait("slurmd", lambda: self.run(*idle, check=False).strip() == str(self.nodes))

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-N", name, log=name)

    def kill_node(self, name: str, jobs: bool = False) -> None:
        """Kill the node's slurmd while its jobs keep running, as when the daemon crashes.

        With `jobs`, kill everything on it, as when the node loses power: no process reports that a job has ended.
        """
        ids = self.run("squeue", "-h", "-w", name, "-o", "%A", check=False).split() if jobs else []
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int((self.root / "run" / f"slurmd-{name}.pid").read_text()), signal.SIGKILL)
        for text in (*(f"slurmstepd: [{i}." for i in ids), *(f"SLURM_JOB_ID={i}\0" for i in ids)):
            file = "cmdline" if text.startswith("slurmstepd") else "environ"
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if text.encode() in (process / file).read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)

    def down(self) -> None:
        if (self.root / "env.sh").exists():
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                self.run("scancel", "--full", "--user", str(os.geteuid()), check=False, timeout=10)
                for _ in range(50):
                    if not self.run("squeue", "-h", check=False, timeout=10).strip():
                        break
                    time.sleep(0.1)
        order = ("slurmd-", "slurmctld", "slurmdbd", "mysqld", "munged")
        for name, pid in sorted(self._pids(), key=lambda item: [item[0].startswith(o) for o in order], reverse=True):
            _stop(name, pid)

    def _pids(self) -> Iterator[tuple[str, int]]:
        for path in (self.root / "run").glob("*.pid"):
            with contextlib.suppress(ValueError, OSError):
                yield path.stem, int(path.read_text())

    def _daemon(self, program: str, *arguments: str, log: str = "") -> None:
        out = (self.root / "log" / f"{program}{log and '-' + log}.out").open("w")
        subprocess.run(
            [program, *arguments],
            check=True,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def _wait(self, name: str, ready: Callable[[], bool], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start within {timeout:g} s; see {self.root / 'log'}")
            time.sleep(0.1)


def _succeeds(command: list[str], environment: dict[str, str] | None = None) -> bool:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _stop(name: str, pid: int) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if not _alive(pid):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
        for _ in range(100):
            if not _alive(pid):
                return
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["install", "up", "down"])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2] / ".slurm")
    parser.add_argument("--nodes", type=int, default=4)
    arguments = parser.parse_args()
    cluster = Cluster(arguments.root, nodes=arguments.nodes)
    try:
        if arguments.action == "install":
            install()
        elif arguments.action == "down":
            cluster.down()
        else:
            started = time.monotonic()
            cluster.up()
            print(f"SLURM is up ({time.monotonic() - started:.0f} s). In this shell:  source {cluster.root}/env.sh")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
