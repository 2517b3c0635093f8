"""Run one point, or with -m a sweep of them: `python -m src.train [-m] [GROUP=NAME ...] [key=value ...]`."""

from __future__ import annotations

import os
import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.config.command_line import check_command_line
from src.config.composition_errors import explain, explain_assertion, is_of_composition
from src.config.hydra_setup import register
from src.config.judge_rules import judged_in_part
from src.config.overrides import encode_keywords
from src.config.sampler import describe_choice
from src.config.schema import Point
from src.config.validation import build_point
from src.environment import read_integer
from src.errors import ConfigError, report_errors
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.judges.endpoint_check import check_judges
from src.planning.plan import Plan, make_plan, warn_of_other_versions, warn_of_removed_models
from src.preflight import check_cpu_threads, check_input_files, check_packages, check_programs
from src.progress import RunProgress
from src.store.attempt import Report
from src.store.retention import discard_finished_work, remove_models
from src.store.store import RESULT_FILE, Store, read_result
from src.tracking.sync_process import sync_run


def run_stages(plan: Plan, store: Store, report: Report) -> bool:
    """Run the stages of the plan that are not done, in this process; every rank calls this (torchrun).

    Returns True on rank 0.
    """
    from src.distributed import destroy_distributed, init_distributed
    from src.model.loading import set_cpu_threads
    from src.stages.runner import compute_or_wait

    ranks = init_distributed(plan.points[0].engine.strategy)
    set_cpu_threads(plan.points[0].engine.cpu_threads)
    needed = ranks.broadcast_object(plan.needed)  # because ranks may have read the store at different times
    for identity, stage in plan.stages.items():
        if identity in needed:
            compute_or_wait(stage, store, report)
    destroy_distributed()
    return ranks.is_main_process


def foresee(plan: Plan, store: Store, dry_run: bool) -> None:
    """Print, for a dry run, the plan and its memory and cost. Raises ConfigError when it does not fit its card."""
    num_processes = read_integer("WORLD_SIZE", 1, minimum=1)
    forecast = Forecast(plan, lambda stage: num_processes if stage.is_shared else 1, all_rehearsed=dry_run)
    if dry_run:
        print(*filter(None, (plan.text(), forecast.text(), Cost(plan, store, forecast).text())), sep="\n")
    forecast.check()


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def run(cfg: DictConfig) -> None:
    """Run a single point; with -m Hydra calls the sweeper instead."""
    with report_errors():
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        if launcher != "local":
            raise ConfigError(f"hydra/launcher={launcher} runs sweeps only: add -m (a sweep may have a single point)")
        point = build_point(cfg)
        if point.sweep.search != "grid":
            raise ConfigError(f"sweep.search={point.sweep.search} needs a sweep: add -m")
        if (key := judged_in_part(point)) is not None:
            raise ConfigError(f"{key}.reporting=selected selects among the points of a sweep: add -m, or use all")
        rank, _ = read_integer("RANK", 0), read_integer("WORLD_SIZE", 1, minimum=1)
        store = Store(point.output_dir)
        check_input_files([point])
        plan = make_plan([point], store)
        if rank == 0:
            warn_of_other_versions(plan, store)
            warn_of_removed_models(plan)
            if line := describe_choice([point]):
                print(line, flush=True)
            foresee(plan, store, point.dry_run)
        if point.dry_run:
            return
        if plan.needed or "WORLD_SIZE" in os.environ:
            for check in (check_packages, check_programs, check_cpu_threads):
                check([point])
            if rank == 0:  # which asks them
                check_judges(plan, store, runs_here=True)
            with sync_run(plan, store) as sync, RunProgress() as report:
                if rank == 0:
                    sync.start()
                if not run_stages(plan, store, report):
                    return
        discard_finished_work(store)
        if point.keep_checkpoints == "none":
            remove_models(store, plan.stages_by_role)
        folder = store.dir(plan.stages[plan.results[0]])
        print(result_text(point, read_result(folder)))
        print(f"result: {folder / RESULT_FILE}")


def result_text(point: Point, result: dict[str, Any]) -> str:
    """Return the summary of result.json that is printed after a run: values ± standard errors."""

    def value(entry: dict[str, float | None], form: str) -> str:
        if entry["value"] is None:
            return "-"
        error = "" if entry["se"] is None else f" ± {entry['se']:{form.lstrip('+')}}"
        return format(entry["value"], form) + error

    quality = result["quality"]
    several = f" prompts, {quality['samples_per_prompt']} samples of each" if "samples_per_prompt" in quality else ""
    capability = ""
    if (scores := result.get("capability")) is not None:
        change = f"{value(scores['change'], '+.3f')} from the SFT model's"
        capability = f"\n  capability {value(scores, '.3f')}, {change}: {', '.join(scores['tasks'])}"
    return (
        f"{point.setup.name}: {point.label}\n"
        f"  {quality['metric']} {value(quality, '.3f')} (n = {quality['n']}{several})\n"
        f"  KL {value(result['kl']['per_sequence'], '.2f')} nats per sequence,"
        f" {value(result['kl']['per_token'], '.4f')} per token: mean log-ratio\n"
        f"  KL {value(result['kl']['per_sequence_rb'], '.2f')} nats per sequence,"
        f" {value(result['kl']['per_token_rb'], '.4f')} per token: Rao-Blackwellized, never negative\n"
        f"  reward accuracy {value(result['reward_accuracy'], '.3f')}, margin {value(result['reward_margin'], '.3f')}"
        f" on {result['reward_accuracy']['n']} validation pairs\n"
        f"  response length {value(result['response_tokens'], '.1f')} tokens{capability}"
    )


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets exceptions reach report_errors, which prints one line
    with report_errors():
        register()
        arguments = sys.argv[1:]
        overrides = check_command_line(arguments)
        sys.argv[1:] = encode_keywords(arguments)
        try:
            run()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, overrides)) from None
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError) or not is_of_composition(error):
                raise
            raise ConfigError(explain_assertion(overrides)) from None


if __name__ == "__main__":
    main()
