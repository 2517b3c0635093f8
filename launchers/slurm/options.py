"""hydra.launcher for SLURM: its schema, the checks of its values, and their translation into sbatch options."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from src.config.fields import check_value, number
from src.errors import ConfigError
from src.store.store import SHARED_ROLES

KINDS = (*SHARED_ROLES, "align", "sample", "aggregate")
SAME_JOB, OWN_JOB, AUTO = SAMPLING = ("same_job", "own_job", "auto")
UPLOAD = ("during", "after")
EARLY_S = 60  # seconds that SLURM may send a signal before it is due

# sbatch options that the launcher relies on, and the key that decides each.
_RESERVED_OPTIONS = {
    **dict.fromkeys(("requeue", "no-requeue", "output", "error", "open-mode", "chdir"), "the launcher"),
    "array": "hydra.launcher.array_parallelism",
    "dependency": "the plan",
    "kill-on-invalid-dep": "the plan",
    "job-name": "the sweep's name (sweep.name=NAME)",
    "signal": "hydra.launcher.signal_delay_s",
    "export": "hydra.launcher.environment",
    "ntasks": "hydra.launcher.nodes and gpus_per_node (one task per GPU)",
    "ntasks-per-node": "hydra.launcher.gpus_per_node (one task per GPU)",
    "nodes": "hydra.launcher.nodes",
    "gpus-per-node": "hydra.launcher.gpus_per_node",
    "cpus-per-task": "hydra.launcher.cpus_per_task",
    "mem": "hydra.launcher.mem_gb",
    "time": "hydra.launcher.timeout_min",
}


@dataclass
class JobResources:
    """The resources of one kind of job. In `kinds`, a missing value means: as for every job."""

    partition: str | None = MISSING
    account: str | None = MISSING
    qos: str | None = MISSING
    constraint: str | None = MISSING
    nodes: int = number(minimum=1, maximum=100_000)
    gpus_per_node: Any = MISSING  # 8, or with a type h100:8
    cpus_per_task: int = number(minimum=1, maximum=100_000)
    mem_gb: float | None = number(maximum=1e6)  # 0: all of the node
    timeout_min: int = number(minimum=1, maximum=10**7)
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = MISSING
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def num_processes(self) -> int:
        """Processes that compute a stage together: one per GPU of the job."""
        return self.nodes * self.tasks_per_node

    @property
    def cpus_per_slurm_task(self) -> int:
        return self.cpus_per_task

    @property
    def points_at_once(self) -> int:
        """Stages of different points that a job computes at once."""
        return 1

    def sbatch(self) -> dict[str, Any]:
        """Return options of sbatch by their long names; True for one without a value."""
        values: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("partition", "account", "qos", "constraint", "nodes")},
            "ntasks-per-node": self.tasks_per_node,
            "cpus-per-task": self.cpus_per_slurm_task,
            "mem": None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}M" if self.mem_gb else "0",
            "time": self.timeout_min,
            "gpus-per-node": self.gpus_per_node if self.gpus else None,
        }
        values |= {_option_name(key): value for key, value in self.additional_parameters.items()}
        return {key: value for key, value in values.items() if value is not None and value is not False}

    def shell(self) -> list[str]:
        """Return the lines of the batch script that run before the job's command."""
        exports = [f"export {name}={shlex.quote(str(value))}" for name, value in self.environment.items()]
        return [*exports, *self.setup]


@dataclass
class PoolResources(JobResources):
    """The resources of a job that computes several points: one task of SLURM, which starts worker processes."""

    gpus_per_point: int = 1
    points_per_job: int = 1

    @property
    def tasks_per_node(self) -> int:
        return 1

    @property
    def num_processes(self) -> int:
        return self.gpus_per_point

    @property
    def cpus_per_slurm_task(self) -> int:
        return self.cpus_per_task * max(1, self.gpus)

    @property
    def num_workers(self) -> int:
        """Groups of processes in a job, each of which computes a point on GPUs of its own, or on cores without GPUs."""
        return max(1, (self.gpus or self.cpus_per_task) // self.gpus_per_point)

    @property
    def points_at_once(self) -> int:
        return min(self.points_per_job, self.num_workers)


@dataclass
class SlurmOptions(JobResources):
    """The schema of conf/hydra/launcher/slurm.yaml, which has the values and their meaning."""

    _target_: str = "hydra_plugins.alignment_sweep.SlurmLauncher"
    _recursive_: bool = False  # Hydra passes `kinds` as it is, with missing values
    kinds: dict[str, JobResources] = field(default_factory=lambda: {kind: JobResources() for kind in KINDS})
    points_per_job: int = number(minimum=1, maximum=10_000)
    gpus_per_point: int = number(minimum=1, maximum=1024)
    sampling: str = MISSING
    array_parallelism: int | None = number(minimum=1, maximum=10**6)
    signal_delay_s: int = number(minimum=1, maximum=65535)
    retry_failed: bool = MISSING
    upload: str = MISSING
    wait: bool = MISSING


def schema() -> DictConfig:
    """Return SlurmOptions for Hydra; any key may be added to environment and additional_parameters."""
    node = OmegaConf.structured(SlurmOptions)
    for resources in (node, *node.kinds.values()):
        for name in ("additional_parameters", "environment"):
            OmegaConf.set_struct(resources[name], False)
    return node


def complete_options(values: dict[str, Any]) -> SlurmOptions:
    """Return the options with the values of every job filled in where a kind of job has none of its own.

    Raises ConfigError naming the key of the first bad value.
    """
    node: Any = OmegaConf.merge(OmegaConf.structured(SlurmOptions), values)
    for_every_job = {key.name: node[key.name] for key in fields(JobResources)}
    for kind in KINDS:
        defaults = for_every_job
        if kind == "sample":  # where jobs align, and with their software, on one GPU of the same type
            aligns = node.kinds["align"]
            own = {"nodes": 1, "gpus_per_node": _one_of(aligns["gpus_per_node"]), "mem_gb": node["mem_gb"]}
            defaults = {**{name: aligns[name] for name in for_every_job}, **own}
        node.kinds[kind] = OmegaConf.merge(OmegaConf.structured(JobResources), defaults, node.kinds[kind])
    options = OmegaConf.to_object(node)
    assert isinstance(options, SlurmOptions)
    for key in fields(SlurmOptions):
        check_value(f"hydra.launcher.{key.name}", key, getattr(options, key.name))
    _check_resources(options, "hydra.launcher")
    for kind, resources in options.kinds.items():
        _check_resources(resources, f"hydra.launcher.kinds.{kind}")
        if resources.timeout_min * 60 <= options.signal_delay_s + EARLY_S:
            raise ConfigError(
                f"hydra.launcher: timeout_min={resources.timeout_min} is too short for {kind} jobs: the stop signal"
                f" (signal_delay_s={options.signal_delay_s}) would arrive at job start"
            )
    for name, value, choices in (("upload", options.upload, UPLOAD), ("sampling", options.sampling, SAMPLING)):
        if value not in choices:
            raise ConfigError(f"hydra.launcher.{name}={value}: must be one of {', '.join(choices)}")
    if options.sampling == OWN_JOB and options.points_per_job > 1:
        raise ConfigError(
            f"hydra.launcher.sampling=own_job: is for jobs of one point, and points_per_job={options.points_per_job};"
            " set points_per_job=1, or sampling=same_job"
        )
    if options.points_per_job > 1:
        options.kinds["align"] = _pool_resources(options)
    elif options.gpus_per_point > 1:
        raise ConfigError(
            f"hydra.launcher.gpus_per_point={options.gpus_per_point}: is for jobs of several points"
            " (points_per_job=N); a job of one point uses all its GPUs (gpus_per_node)"
        )
    return options


def _one_of(gpus_per_node: object) -> object:
    """Return at most one GPU of the same type: h100:1 of h100:8. What is no such number is returned as it is."""
    kind, _, count = str(gpus_per_node).rpartition(":")
    if not count.isdecimal() or int(count) <= 1:
        return gpus_per_node
    return f"{kind}:1" if kind else 1


def _pool_resources(options: SlurmOptions) -> PoolResources:
    """Return the resources of jobs of several points. Raises ConfigError where they cannot be divided among points."""
    points, gpus_per_point = options.points_per_job, options.gpus_per_point
    align = options.kinds["align"]
    values = {key.name: getattr(align, key.name) for key in fields(JobResources)}
    pool = PoolResources(**values, gpus_per_point=gpus_per_point, points_per_job=points)
    where = f"hydra.launcher.points_per_job={points}"
    if pool.nodes > 1:
        raise ConfigError(
            f"{where}: a job of several points has one node, but align jobs have nodes={pool.nodes}; set"
            " hydra.launcher.kinds.align.nodes=1"
        )
    if (pool.gpus or gpus_per_point) % gpus_per_point:
        raise ConfigError(
            f"hydra.launcher.gpus_per_point={gpus_per_point}: must divide the {pool.gpus} GPUs of an align job"
            " (gpus_per_node)"
        )
    if points * gpus_per_point < pool.gpus:
        raise ConfigError(
            f"{where}: would leave {pool.gpus - points * gpus_per_point} of the {pool.gpus} GPUs of an align job"
            f" without work; at least {pool.num_workers}, or more gpus_per_point"
        )
    if options.array_parallelism is not None and options.array_parallelism < pool.points_at_once:
        raise ConfigError(
            f"hydra.launcher.array_parallelism={options.array_parallelism}: below the {pool.points_at_once} points"
            f" that one job runs at once ({where}, {pool.gpus} GPUs); set at least so many"
        )
    return pool


def _check_resources(resources: JobResources, where: str) -> None:
    """Raise ConfigError for a bad value. where: the config node of the resources, for messages."""
    for spec in fields(JobResources):
        check_value(f"{where}.{spec.name}", spec, getattr(resources, spec.name))
    if not re.fullmatch(r"([^:\s]+:)?\d{1,4}", str(resources.gpus_per_node), re.ASCII):
        raise ConfigError(f"{where}.gpus_per_node={resources.gpus_per_node}: must be a number, or TYPE:NUMBER")
    for name in resources.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise ConfigError(f"{where}.environment.{name}: not the name of an environment variable")
    for key in resources.additional_parameters:
        if _option_name(key) in _RESERVED_OPTIONS:
            raise ConfigError(f"{where}.additional_parameters.{key}: set by {_RESERVED_OPTIONS[_option_name(key)]}")


def _option_name(key: object) -> str:
    return str(key).lstrip("-").replace("_", "-")
