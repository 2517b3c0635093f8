"""Results of sweeps -> points.csv, best.yaml, tables, figures, report.html: `python -m sweeps.aggregate DIR ...`.

A sweep is given by its folder, or where its store is not available by its group in W&B,
`wandb://ENTITY/PROJECT/GROUP`, which is downloaded into outputs/wandb/ENTITY/PROJECT first, or as a study.zip of
`sweeps.pack`, beside which the results are then written.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.config.fields import choices_of
from src.config.schema import Sweep
from src.config.validation import check_folder
from src.errors import ConfigError, PointFailure, StageError, SweepFailed, report_errors
from src.store.files import atomic_write
from src.store.retention import discard_finished_work, remove_models
from src.store.store import StageName
from src.store.sweep_folder import SweepFolder
from src.tracking.sync_process import sync_sweep
from sweeps.analysis import judges, reporting_split
from sweeps.analysis.capability import capability_changes
from sweeps.analysis.diagnosis.diagnose import diagnose
from sweeps.analysis.results import Results, collect
from sweeps.analysis.significance import pairwise_against_pointwise
from sweeps.arguments import ArgumentParser
from sweeps.report import figures
from sweeps.report.escapes import csv_text
from sweeps.report.paper_tables import paper_tables
from sweeps.report.published import published_points
from sweeps.report.report import cost_table, write_report
from sweeps.report.table_files import write_formats, write_tables
from sweeps.report.tables import (
    benchmark_table,
    best_table,
    print_best,
    sft_table,
    sources_table,
    verdict_table,
)
from sweeps.search.record import recorded_failures, write_states
from sweeps.study.archive import SUFFIX
from sweeps.study.opening import open_sweep
from sweeps.wandb.from_wandb import SCHEME

COST_ENTRIES = ("stage", "computed", "hours", "waiting", "tokens")  # of a row of the report's Cost, in sweep.json
BEST_YAML_KEYS = (
    *("lr", "beta", "init", "variant", "metric"),
    *("quality_reporting", "quality_reporting_se", "quality_reporting_low", "quality_reporting_high"),
    *("shortlist", "top3_reporting", "seeds", "identities", "checkpoint"),
)


def aggregate(
    folders: Sequence[SweepFolder], out: Path | None = None, quiet: bool = False, select: str | None = None
) -> pd.DataFrame:
    """Select the best points of the sweeps, write all results into `out`, and return the selected points.

    out: by default the folder of the first sweep. select: as in write_results.
    """
    return write_results(collect(folders), SweepFolder(out or folders[0].path), quiet, select)


def write_results(
    results: Results, target: SweepFolder, quiet: bool = False, select: str | None = None
) -> pd.DataFrame:
    """Select the best points, write all results into the target folder, and return the selected points.

    select: how a point of each method is selected, by default `sweep.select` of the first sweep.
    """
    prompts = results.prompts
    rule = select or results.sweeps[0]["select"]
    averages, best = reporting_split.selected_points(results, rule)
    differences = reporting_split.differences(best, prompts)
    by_judge = judges.read_verdicts(results)
    verdicts = judges.with_outcomes(reporting_split.verdicts(best, prompts), by_judge, best)
    tables = {
        "best": best_table(best, differences),
        "verdicts": verdict_table(verdicts),
        "pairwise_pointwise": pairwise_against_pointwise(reporting_split.reported(best)),
        "differences": differences,
        "gains": reporting_split.gains(averages, best, prompts),
        "pareto": reporting_split.pareto_fronts(averages),
        "benchmark": benchmark_table(best, results.scores),
        "capability": capability_changes(best, results),
        "judges": judges.leanings(by_judge, results),
        "judge_agreement": judges.agreement(by_judge),
        "judge_rankings": judges.rankings(by_judge, best),
        "judge_disagreements": judges.disagreements(by_judge, best),
        "diagnosis": diagnose(results, averages, best, differences, by_judge),
        "sources": sources_table(best, results.sources),
        "sft": sft_table(results),
    }
    of_paper = paper_tables(results, best)

    target.figures.mkdir(parents=True, exist_ok=True)
    atomic_write(target.points_csv, csv_text(results.without_temporary(results.points)))
    atomic_write(target.best_yaml, best_yaml(results.without_temporary(best), results.settings))
    write_tables(target.tables, tables)
    write_formats(target.tables, {name: table.formats() for name, table in of_paper.items()})
    published = published_points(results, best)
    graphics = [drawing.save(target.figures) for drawing in figures.draw(averages, best, verdicts, published)]
    write_report(target.report, results, rule, best, tables, of_paper, graphics)
    if not quiet:
        print_best(results, target.path, tables)
    return best


def finalize(path: Path, failures: dict[str, PointFailure]) -> None:
    """Write the final state of every point, select the best, and remove the models that need not be kept.

    Between rungs of a search only the states are written. path: the sweep's folder. failures: identity of a point's
    result -> why it is missing. Raises SweepFailed when there are any.
    """
    folder = SweepFolder(path)
    record, store = folder.read(), folder.store
    search, points = record["search"], record["points"]
    failures = recorded_failures(record, store) | {
        result: failure for result, failure in failures.items() if not store.is_done(StageName("evaluate", result))
    }
    if search is not None and (rung := search["rung"]) < len(search["rungs"]):
        write_states(folder, record, "failed" if failures else "done", failures)
        print(f"{folder.name}: rung {rung} is done; rerun the same command to start rung {rung + 1}", flush=True)
        if failures:
            raise SweepFailed(
                f"{len(failures)} of {len(points)} points failed; rerun the same command to retry them first, or with "
                "hydra.launcher.retry_failed=false to continue without them"
            )
        return
    write_states(folder, record, "aggregating", failures)
    results = collect([folder])
    failures |= {result: PointFailure("failed", reason) for result, reason in results.damaged.items()}
    best = write_results(results, folder)
    # Of every init and variant, of which best.yaml names one: these models are kept, here and by other sweeps.
    chosen = {identity for seeds in best.identities for identity in seeds}
    record["selected"] = sorted(chosen | {p["identity"] for p in points if p.get("reporting") in chosen})
    write_states(folder, record, "aggregating", failures)
    discard_finished_work(store)
    if record["keep_checkpoints"] != "all":
        remove_models(store, [point["stages"] for point in points], settled=folder)
    record["cost"] = [{name: row[name] for name in COST_ENTRIES} for row in cost_table(results)]
    # The final state last, so that waiters find complete results.
    write_states(folder, record, "failed" if failures else "done", failures)
    if waiting := sum("reporting" in point and point["identity"] in chosen for point in points):
        print(f"{folder.name}: rerun the same command to judge {waiting} selected points on the reporting prompts")
    if failures:
        raise SweepFailed(f"{len(failures)} of {len(points)} points failed; rerun the same command to retry only those")


def best_yaml(best: pd.DataFrame, settings: Mapping[str, dict[str, Any]]) -> str:
    """Return setup -> method -> {lr, beta, ...}; a run with `best_from=FILE` takes its beta and lr from it.

    settings: identity of a result -> the settings that its variant is made of, which such a run must have as well.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    # One entry per method: of several inits and variants the one that is best on the selection split.
    rows = best.sort_values("quality_selection", ascending=False, kind="stable").astype(object)
    for row in rows.where(rows.notna(), None).to_dict("records"):  # a missing value is null in YAML
        entry = {name: row[name] for name in BEST_YAML_KEYS}
        if (tuned_with := settings.get(row["identities"][0])) is not None:
            entry["settings"] = tuned_with
        table.setdefault(row["setup"], {}).setdefault(row["method"], entry)
    header = "# Best hyper-parameters, selected on the selection split; quality on the reporting split.\n"
    header += "# python -m src.train method=NAME best_from=THIS_FILE\n"
    return header + yaml.safe_dump(table, sort_keys=False)


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.aggregate", description=__doc__)
    parser.add_argument(
        "dir", nargs="+", help="a sweep's folder, such as outputs/sweeps/demo, a study.zip, or wandb://E/P/GROUP"
    )
    parser.add_argument(
        "--select", choices=choices_of(Sweep, "select"), help="how one point of each method is selected"
    )
    parser.add_argument(
        "--out", type=Path, help="output folder; default for several sweeps A and B: A+B beside A; of study.zip: study"
    )
    arguments = parser.parse_args()
    with report_errors(), tempfile.TemporaryDirectory(prefix="study-") as unpacked:
        names: list[str] = list(dict.fromkeys(arguments.dir))
        folders = list({(f := open_sweep(name, Path(unpacked))).path.resolve(): f for name in names}.values())
        out = arguments.out or _default_out(names[0], folders)
        check_folder("--out", str(out))
        results = collect(folders)
        results.temporary = Path(unpacked).resolve()
        try:
            write_results(results, SweepFolder(out), select=arguments.select)
        except OSError as error:
            raise StageError(
                f"{error.filename or out}: {error.strerror}; --out=FOLDER names another folder for the results"
            ) from None
        if out == folders[0].path and not names[0].startswith(SCHEME):
            with sync_sweep(folders[0]) as sync:  # the trackers that the sweep was started with
                sync.start()
        if results.damaged:
            first, count = next(iter(results.damaged.values())), len(results.damaged)
            others = f" ({count - 1} more points have damaged results)" if count > 1 else ""
            raise SweepFailed(f"{first}{others}; run the sweep again to remake it")
    return 0


def _default_out(first: str, folders: Sequence[SweepFolder]) -> Path:
    """Return where results go: the sweep's folder, A+B beside A for several, and for study.zip `study` beside it.

    Raises ConfigError where the folder is another sweep's.
    """
    is_study = first.endswith(SUFFIX) and Path(first).is_file()
    beside = Path(first).absolute() if is_study else folders[0].path
    if len(folders) > 1:
        beside = beside.with_name("+".join(folder.name for folder in folders))
    elif is_study:
        beside = beside.with_suffix("")
    else:
        return beside
    if SweepFolder(beside).exists():
        raise ConfigError(f"{beside}: is the folder of a sweep; name another one for the results, --out FOLDER")
    return beside


if __name__ == "__main__":
    sys.exit(main())
