"""hydra.launcher for SLURM: its schema, the checks of its values, and their translation into sbatch options."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from src.errors import ConfigError

KINDS = ("sft", "reference", "baseline", "align", "aggregate")
UPLOAD = ("during", "after")

# sbatch options that the launcher relies on, and the key that decides each.
_RESERVED_OPTIONS = {
    "array": "hydra.launcher.array_parallelism",
    "dependency": "the plan",
    "kill-on-invalid-dep": "the plan",
    "job-name": "the sweep's name (sweep.name=NAME)",
    "requeue": "the launcher",
    "no-requeue": "the launcher",
    "signal": "hydra.launcher.signal_delay_s",
    "output": "the launcher",
    "error": "the launcher",
    "open-mode": "the launcher",
    "export": "hydra.launcher.environment",
    "chdir": "the launcher",
    "ntasks": "hydra.launcher.nodes and gpus_per_node (one task per GPU)",
    "ntasks-per-node": "hydra.launcher.gpus_per_node (one task per GPU)",
    "nodes": "hydra.launcher.nodes",
    "gpus-per-node": "hydra.launcher.gpus_per_node",
    "cpus-per-task": "hydra.launcher.cpus_per_task",
    "mem": "hydra.launcher.mem_gb",
    "time": "hydra.launcher.timeout_min",
}


@dataclass
class KindOptions:
    """The options of one kind of job (None: as for every job), and of every job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int | None = None
    gpus_per_node: Any = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout_min: int | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Kinds:
    sft: KindOptions = field(default_factory=KindOptions)
    reference: KindOptions = field(default_factory=KindOptions)
    baseline: KindOptions = field(default_factory=KindOptions)
    align: KindOptions = field(default_factory=KindOptions)
    aggregate: KindOptions = field(default_factory=KindOptions)


@dataclass
class SlurmOptions(KindOptions):
    """The schema of conf/hydra/launcher/slurm.yaml, which has the values and their meaning."""

    _target_: str = "hydra_plugins.alignment_sweep.SlurmLauncher"
    kinds: Kinds = field(default_factory=Kinds)
    array_parallelism: int | None = MISSING
    signal_delay_s: int = MISSING
    retry_failed: bool = MISSING
    upload: str = MISSING
    wait: bool = MISSING


def schema() -> DictConfig:
    """Return SlurmOptions for Hydra; any key may be added to environment and additional_parameters."""
    node = OmegaConf.structured(SlurmOptions)
    for options in (node, *node.kinds.values()):
        for name in ("additional_parameters", "environment"):
            OmegaConf.set_struct(options[name], False)
    return node


@dataclass(frozen=True)
class JobResources:
    """The resources of one kind of job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int | str = 1  # 8, or with a type h100:8
    cpus_per_task: int = 8
    mem_gb: float | None = None
    timeout_min: int = 1440
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def tasks(self) -> int:
        """Processes of a job: one per GPU."""
        return self.nodes * self.tasks_per_node

    def sbatch(self) -> dict[str, Any]:
        """Return options of sbatch by their long names; True for one without a value."""
        values: dict[str, Any] = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "cpus-per-task": self.cpus_per_task,
            "mem": None if self.mem_gb is None else f"{round(self.mem_gb * 1024)}M",
            "time": self.timeout_min,
            "gpus-per-node": self.gpus_per_node if self.gpus else None,
        }
        values |= {_option_name(key): value for key, value in self.additional_parameters.items()}
        return {key: value for key, value in values.items() if value is not None and value is not False}

    def shell(self) -> list[str]:
        """Return the lines of the batch script that run before the job's command."""
        exports = [f"export {name}={shlex.quote(str(value))}" for name, value in self.environment.items()]
        return [*exports, *self.setup]


def job_resources(common: dict[str, Any], kinds: dict[str, dict[str, Any] | None]) -> dict[str, JobResources]:
    """Return the resources of each kind of job. Raises ConfigError naming the key of the first bad value."""
    default = _merge(JobResources(), common, "hydra.launcher")
    return {kind: _merge(default, kinds.get(kind) or {}, f"hydra.launcher.kinds.{kind}") for kind in KINDS}


def _merge(base: JobResources, values: dict[str, Any], where: str) -> JobResources:
    """Return `base` with `values`, checked. where: the config node of the values, for messages."""
    values = {key: value for key, value in values.items() if value is not None}
    for key in ("additional_parameters", "environment"):  # added to those of every job
        values = {**values, key: {**getattr(base, key), **(values.get(key) or {})}}
    resources = replace(base, **values)
    for key, lowest in (("nodes", 1), ("cpus_per_task", 1), ("timeout_min", 1)):
        value = getattr(resources, key)
        if value < lowest:
            raise ConfigError(f"{where}.{key}={value}: must be >= {lowest}")
    if not re.fullmatch(r"([^:\s]+:)?\d+", str(resources.gpus_per_node)):
        raise ConfigError(f"{where}.gpus_per_node={resources.gpus_per_node}: must be a number, or TYPE:NUMBER")
    if resources.mem_gb is not None and resources.mem_gb <= 0:
        raise ConfigError(f"{where}.mem_gb={resources.mem_gb}: must be > 0, or null for the site's default")
    for key in resources.additional_parameters:
        name = _option_name(key)
        if name in _RESERVED_OPTIONS:
            raise ConfigError(f"{where}.additional_parameters.{key}: set by {_RESERVED_OPTIONS[name]}")
    for name in resources.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name)):
            raise ConfigError(f"{where}.environment.{name}: not a valid name of an environment variable")
    return resources


def _option_name(key: object) -> str:
    return str(key).lstrip("-").replace("_", "-")
