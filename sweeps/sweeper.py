"""The sweeper: Hydra's override syntax, plus `beta=grid`, `lr=grid` and `method=all`. Validates all points first."""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from launchers.protocol import PlanLauncher
from src.config.composition_errors import explain, explain_assertion
from src.config.fields import shortened
from src.config.overrides import decode_keywords, parse_overrides
from src.config.sampler import describe_choice
from src.config.schema import Point
from src.config.validation import ANY_METHOD, build_point, check_grid
from src.errors import CONFIG_ERRORS, ConfigError, one_line
from src.methods import COMPARED
from src.planning.content import digest
from src.planning.plan import make_plan, warn_of_other_versions, warn_of_removed_models
from src.preflight import check_input_files
from src.store.store import Store
from sweeps.analysis.power import power_report
from sweeps.search.search import Search
from sweeps.search.variants import check_sweep_wide_settings, keys_without_effect, name_variants

GRIDS = {"beta": "beta_grid", "lr": "lr_grid"}
ALL_METHODS = "method=all"  # the methods of src.methods.COMPARED that the chosen beta_grid lists
MAX_POINTS = 10_000  # each takes some milliseconds to check; the paper's largest sweep has 200
MAX_COMPOSITIONS = 2_000  # choices of groups, each of which takes tenths of a second to compose


class GridSweeper(Sweeper):
    """Expands, composes and validates all points, then runs their search on the launcher."""

    def __init__(self, params: DictConfig | None = None, parts: ListConfig | None = None) -> None:
        """Keep the overrides of a named sweep, by key. A sweep is the union of its parts.

        params: overrides of every part; parts: additional overrides of each part.
        """
        self.named = params, parts  # checked in `setup`: Hydra wraps what is raised here

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        params, parts = self.named
        self.params = _overrides_by_key("hydra.sweeper.params", params)
        if parts is not None and not (isinstance(parts, ListConfig) and parts):
            raise ConfigError(f"hydra.sweeper.parts={parts}: must be null or a list of mappings, key: sweep expression")
        self.parts = [_overrides_by_key("hydra.sweeper.parts", part) for part in ([{}] if parts is None else parts)]
        self.config = config
        self.loader = hydra_context.config_loader
        try:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )
        except InstantiationException as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise

    def sweep(self, arguments: list[str]) -> None:
        if not isinstance(self.launcher, PlanLauncher):
            kind = type(self.launcher).__name__
            raise ConfigError(f"hydra/launcher: {kind} cannot run planned stages; use hydra/launcher=local or slurm")
        overrides = self._merged(arguments)
        expanded = (point for part in overrides for point in expand(part, self.config, self.loader))
        points = list({repr(point): point for point in expanded}.values())
        check_sweep_wide_settings(points)
        store = Store(points[0].output_dir)
        check_input_files(points)
        plan = make_plan(points, store)
        if len(set(plan.results)) < len(points):
            # Points that differ only in what no result depends on (engine.cpu_threads, say) are one point.
            if keys := keys_without_effect(points):
                print(f"note: no result depends on {', '.join(keys)}: points that differ only there are run once")
            plan = make_plan([plan.points[plan.results.index(r)] for r in dict.fromkeys(plan.results)], store)
        warn_of_other_versions(plan, store)
        warn_of_removed_models(plan)
        if line := describe_choice(plan.points):
            print(line, flush=True)
        points = plan.points
        name = points[0].sweep.name or f"{points[0].setup.name}-{_digest_of(overrides)}"
        name_variants(points)
        for point in points:
            point.sweep.name = name  # trackers group by it; no stage depends on it
        self._use(Search(plan, store))

    def _use(self, search: Search) -> None:
        """Run the search, or print what it would run."""
        first = search.full_plan.points[0]
        if first.dry_run:
            search.dry_run(self.launcher)
            return
        command = shlex.join(["python", "-m", "src.train", *decode_keywords(sys.argv[1:])])
        search.run(self.launcher, str(first.sweep.name), command)

    def _merged(self, arguments: list[str]) -> list[list[str]]:
        """Return the overrides of each part: those of +sweep=NAME, replaced by those of the command line."""
        replaced = {override.key_or_group for override in parse_overrides(arguments, self.loader)}
        return [
            [f"{key}={value}" for key, value in (self.params | part).items() if key.lstrip("+~") not in replaced]
            + arguments
            for part in self.parts
        ]


class PowerSweeper(GridSweeper):
    """Prints which differences a sweep could show, and runs nothing: what `python -m sweeps.power` chooses."""

    def __init__(
        self,
        params: DictConfig | None = None,
        parts: ListConfig | None = None,
        folder: str | None = None,
        standard_deviation: float | None = None,
    ) -> None:
        super().__init__(params, parts)
        self.folder, self.standard_deviation = folder, standard_deviation

    def _use(self, search: Search) -> None:
        print(power_report(search.full_plan.points, search.store, self.launcher, self.folder, self.standard_deviation))


def _overrides_by_key(name: str, mapping: Any) -> dict[str, Any]:
    if mapping is not None and not isinstance(mapping, dict | DictConfig):
        raise ConfigError(f"{name}: {mapping!r} must be a mapping, key: sweep expression")
    return {str(key): value for key, value in (mapping or {}).items()}


def _digest_of(overrides: list[list[str]]) -> str:
    parts = [sorted(decode_keywords(part)) for part in overrides]
    return digest(parts[0] if len(parts) == 1 else parts)[:8]


def expand(arguments: list[str], master: DictConfig, loader: Any) -> list[Point]:
    """Return the points of a sweep in the order of Hydra's product (last override varies fastest), without duplicates.

    Each choice of groups is composed once; swept values are then set on the composition and type-checked by the schema.
    Raises ConfigError naming the overrides of the first invalid point.
    """
    axes: list[list[str]] = []  # per override: its values, as override strings
    implied: set[str] = set()  # methods that only `method=all` names
    simple: set[str] = set()  # keys whose values can be set on one composition, one after the other
    for override in parse_overrides(arguments, loader):
        strings = _strings(override)
        if ALL_METHODS in strings:
            every = [f"method={m}" for m in COMPARED]
            implied = set(every) - set(strings)
            strings = list(dict.fromkeys(m for s in strings for m in (every if s == ALL_METHODS else [s])))
        axes.append(strings)
        if _is_simple(override, strings, loader):
            simple.add(override.key_or_group)
    simple |= {k for k in GRIDS if any(s == f"{k}=grid" for axis in axes for s in axis)}

    _check_size(axes, simple)
    composed: dict[tuple[str, ...], DictConfig] = {}
    points: dict[str, Point] = {}
    num_points = 0  # with those that turn out to be equal
    for combination in itertools.product(*axes):
        values = [s for s in combination if s.partition("=")[0] in simple]
        groups = tuple(s for s in combination if s not in values)
        if groups not in composed:
            composed[groups] = _compose(groups, master, loader)
        if not implied.isdisjoint(groups) and composed[groups].method.name not in composed[groups].beta_grid:
            continue  # method=all means the methods of the beta grid
        assigned = [_grid_values(v, composed[groups]) for v in values]
        num_points += math.prod(map(len, assigned))
        if num_points > MAX_POINTS:
            raise ConfigError(f"{_sweeping(axes)}: more than {MAX_POINTS:,} points; sweep over fewer values")
        for assignment in itertools.product(*assigned):
            point = _set(composed[groups], assignment, combination)
            points.setdefault(repr(point), point)
    if not points:
        raise ConfigError("the sweep has no points")
    return list(points.values())


def _check_size(axes: list[list[str]], simple: set[str]) -> None:
    """Raise ConfigError, before anything is composed, for a sweep that would take hours to plan."""
    count = math.prod(map(len, axes))
    if count > MAX_POINTS:
        raise ConfigError(f"{_sweeping(axes)}: {count:,} points, more than {MAX_POINTS:,}; sweep over fewer values")
    groups = math.prod(len(axis) for axis in axes if axis[0].partition("=")[0] not in simple)
    if groups > MAX_COMPOSITIONS:
        raise ConfigError(
            f"{_sweeping(axes)}: {groups:,} configs to compose, more than {MAX_COMPOSITIONS:,}; choose fewer options"
        )


def _sweeping(axes: list[list[str]]) -> str:
    """Return in words which keys a sweep varies, and over how many values each."""
    return " ".join(f"{axis[0].partition('=')[0]}=({len(axis):,} values)" for axis in axes if len(axis) > 1)


def _is_simple(override: Override, strings: list[str], loader: Any) -> bool:
    """Return whether the override sweeps over plain values.

    Not plain are groups, dicts (which would be merged into each other), and the grids, which the composition reads.
    """
    key = override.key_or_group
    plain = override.type == OverrideType.CHANGE and override.package is None and len(strings) > 1
    grid = key.partition(".")[0] in GRIDS.values()
    return plain and not grid and not loader.get_group_options(key) and not any("{" in s for s in strings)


def _strings(override: Override) -> list[str]:
    key = override.get_key_element()
    if override.is_delete():
        return [override.input_line or key]
    is_sweep = override.is_sweep_override()
    values = override.sweep_string_iterator() if is_sweep else [override.get_value_element_as_str()]
    strings = list(dict.fromkeys(f"{key}={value}" for value in values))
    if not strings:
        raise ConfigError(f"{override.input_line}: expands to no values")
    return strings


def _compose(groups: tuple[str, ...], master: DictConfig, loader: Any) -> DictConfig:
    try:
        cfg = loader.load_sweep_config(master, list(groups))
    except CONFIG_ERRORS as error:
        message, names = explain(error, groups), " ".join(map(shortened, groups))
        raise ConfigError(message if message.startswith(groups) else f"{names}: {message}") from error
    except (AssertionError, AttributeError, TypeError, ValueError):
        raise ConfigError(explain_assertion(groups)) from None
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _grid_values(string: str, cfg: DictConfig) -> list[str]:
    key, _, value = string.partition("=")
    if key not in GRIDS or value != "grid":
        return [string]
    name, method = GRIDS[key], cfg.method.name
    grid = cfg[name].get(method, cfg[name].get(ANY_METHOD))
    if grid is None:
        raise ConfigError(
            f"{key}=grid: {name} has no list for method={method}; set {name}.{method}=[...] or {key}=VALUE"
        )
    check_grid(name, {method: list(grid)})
    return [f"{key}={v!r}" for v in grid]


def _set(cfg: DictConfig, assignment: tuple[str, ...], strings: tuple[str, ...]) -> Point:
    try:
        for override in parse_overrides(list(assignment)):
            try:
                OmegaConf.update(cfg, override.key_or_group, override.value())
            except (AssertionError, AttributeError, TypeError) as error:
                raise ConfigError(explain_assertion([str(override.input_line)])) from error
        return build_point(cfg)
    except CONFIG_ERRORS as error:
        message, assigned = one_line(error), {a.partition("=")[0]: a for a in assignment}
        overrides = {s.partition("=")[0]: assigned.get(s.partition("=")[0], s) for s in strings}
        if message.partition("=")[0] in overrides:  # it names the override that is wrong
            raise ConfigError(message) from error
        raise ConfigError(f"{' '.join(map(shortened, overrides.values()))}: {message}") from error
