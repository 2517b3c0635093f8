"""Run one point, or with -m a sweep of them: `python -m src.train [-m] [GROUP=NAME ...] [key=value ...]`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.checks import check_key, check_packages, check_programs, point_from
from src.composition import register
from src.config import USER_ERRORS, ConfigError, Point, one_line
from src.cost import Cost
from src.failure import EXPECTED, one_line_failure
from src.overrides import GRID_WORDS, as_sweeps
from src.plan import Plan, make_plan
from src.progress import RunProgress
from src.retention import tidy
from src.store import RESULT_FILE, Report, Store, read_json
from src.tracking.following import Following


def run_stages(plan: Plan, store: Store, report: Report) -> bool:
    """sft -> reference -> align -> generate -> evaluate: what is done is reused, the rest runs here.

    Of several processes (torchrun) all take part; returns whether this is the one that speaks for them.
    """
    from src.distributed import join, leave
    from src.models import use_threads
    from src.stages import ensure

    here = join(plan.points[0].engine.parallel)
    use_threads(plan.points[0].engine)
    needed = here.tell(plan.needed)  # a later look at the store may have seen more
    for identity, stage in plan.stages.items():
        if identity in needed:
            ensure(stage, store, report)
    leave()
    return here.leads


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def run(cfg: DictConfig) -> None:
    """The single run; with -m Hydra calls the sweeper instead."""
    with answering():
        launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
        if launcher != "local":
            raise ConfigError(f"hydra/launcher={launcher} runs sweeps: add -m (a sweep may be of one point)")
        point = point_from(cfg)
        if point.sweep.search != "grid":
            raise ConfigError(f"sweep.search={point.sweep.search} searches among points: add -m")
        store = Store(point.output_dir)
        plan = make_plan([point], store)
        if point.dry_run:
            print(plan.text(), Cost(plan, store).text(), sep="\n")
            return
        if plan.needed or "WORLD_SIZE" in os.environ:
            for check in (check_packages, check_key, check_programs):
                check([point])
            log_file = store.output_dir / "wandb" / "follower.log"
            with Following(store, log_file, store.output_dir) as wandb, RunProgress() as report:
                if int(os.environ.get("RANK", "0")) == 0:
                    wandb.points([point])
                if not run_stages(plan, store, report):
                    return
        tidy(store, plan, point.keep, set(plan.results))
        path = store.artefacts(plan.stages[plan.results[0]]) / RESULT_FILE
        print(result_text(point, read_json(path)))
        print(f"result: {path}")


@contextmanager
def answering(arguments: list[str] | None = None) -> Iterator[None]:
    """Turn an exception into one line and an exit code: 1 a run failed, 2 the request was wrong, 130 interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command again continues where this one was", file=sys.stderr)
        raise SystemExit(130) from None
    except USER_ERRORS as error:
        print(f"error: {_explained(error, arguments or [])}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exc()
        print(f"failed: {one_line_failure(error)}", file=sys.stderr)
        raise SystemExit(1) from error


def result_text(point: Point, result: dict[str, Any]) -> str:
    def value(entry: dict[str, float | None], form: str) -> str:
        if entry["value"] is None:
            return "-"
        return format(entry["value"], form) + ("" if entry["se"] is None else f" ± {format(entry['se'], form)}")

    quality = result["quality"]
    return (
        f"{point.setup.name}: {point.label}\n"
        f"  {quality['metric']} {value(quality, '.3f')} (n = {quality['n']})\n"
        f"  KL {value(result['kl']['per_sequence'], '.2f')} nats a sequence,"
        f" {value(result['kl']['per_token'], '.4f')} a token\n"
        f"  reward accuracy {value(result['reward_accuracy'], '.3f')}, margin {value(result['reward_margin'], '.3f')}"
        f" on {result['reward_accuracy']['n']} validation pairs\n"
        f"  response length {value(result['response_tokens'], '.1f')} tokens"
    )


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, and a user gets one line instead of a traceback
    register()
    arguments = sys.argv[1:]
    sys.argv[1:] = as_sweeps(arguments)
    with answering(arguments):
        try:
            run()
        except OSError as error:  # before any stage: Hydra's own folder, or the sweep's
            if error.filename is None:
                raise
            raise ConfigError(f"output_dir: cannot write {error.filename} ({error.strerror})") from error


def _explained(error: Exception, arguments: list[str]) -> str:
    words = [a for a in arguments if a in GRID_WORDS]
    if words and not isinstance(error, ConfigError) and not {"-m", "--multirun"} & set(arguments):
        return f"{words[0]} names several points: add -m to sweep over them"
    return one_line(error)


if __name__ == "__main__":
    main()
