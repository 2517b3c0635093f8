"""Apply every rule to the points of some sweeps -> a table of findings, the worst first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from sweeps.analysis.diagnosis.command import next_command
from sweeps.analysis.diagnosis.finding import SEVERITIES, Finding
from sweeps.analysis.diagnosis.of_group import of_failures, of_group, unmeasured
from sweeps.analysis.diagnosis.of_study import of_study
from sweeps.analysis.diagnosis.point_files import PointFiles
from sweeps.analysis.selection import GROUP, STUDY, rows_of_study
from sweeps.recorded_command import variant_overrides

if TYPE_CHECKING:
    from sweeps.analysis.results import Results

COLUMNS = ["severity", "rule", *STUDY, "beta", "lr", "selected", "finding", "command"]


def diagnose(
    results: Results, averages: pd.DataFrame, best: pd.DataFrame, differences: pd.DataFrame, verdicts: pd.DataFrame
) -> pd.DataFrame:
    """Return COLUMNS, one row a finding: of selected points and whole studies first, the worst of them first.

    selected: False for a finding about a point that was not selected. Of a rule that fires for several of these there
    is one row a method, of the worst point, which names the others. A finding about all methods has no method, beta
    and lr, one about runs that failed no beta and lr.

    averages: of average_seeds. best: of select_points. differences: of reporting_split.differences. verdicts: of
    judges.read_verdicts.
    """
    files, commands, rows = PointFiles(results), _Commands(results), []
    files.learn_references([identity for seeds in best.identities for identity in seeds])
    for point in best.to_dict("records"):
        study = rows_of_study(averages, point)
        for found in of_study(results, files, study, point, verdicts):
            where = {name: found.point[name] for name in (*STUDY, "beta", "lr")} | {"selected": found.is_selected}
            rows.append(_row(found.finding, where, commands.of(found.finding, found.point, point["identities"][0])))
    for finding, failed in of_failures(results):
        where = {name: failed[name] for name in STUDY} | {"selected": True}
        rows.append(_row(finding, where, commands.of(finding, failed, failed["identity"])))
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        of_these = differences[(differences[GROUP] == list(key)).all(axis=1)]
        first = group.iloc[0].to_dict()
        for finding in [*unmeasured(files, group), *of_group(results, group, of_these)]:
            where = dict(zip(GROUP, key, strict=True)) | {"selected": True}
            rows.append(_row(finding, where, commands.of(finding, first | {"method": None}, first["identities"][0])))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["order"] = table.severity.map(SEVERITIES.index)
    table = table.sort_values(["selected", "order"], ascending=[False, True], kind="stable")
    return table[COLUMNS].reset_index(drop=True)


def _row(finding: Finding, where: dict[Any, Any], command: str) -> dict[Any, Any]:
    return {"severity": finding.severity, "rule": finding.rule, "finding": finding.text, "command": command, **where}


class _Commands:
    """Makes the commands of findings from those of the sweeps."""

    def __init__(self, results: Results) -> None:
        self.results = results
        sweeps = results.sweeps
        self._sweep_of = {p.get("reporting", p["identity"]): sweep for sweep in sweeps for p in sweep["points"]}
        self._sweep_of |= {point["identity"]: sweep for sweep in sweeps for point in sweep["points"]}
        # A sweep of one setup or init has it in its command, or by default.
        self._varying = [name for name in ("setup", "init") if results.points[name].nunique() > 1]

    def of(self, finding: Finding, point: dict[Any, Any], result: str) -> str:
        """Return the command of a finding about a point; empty where no run would show more.

        result: identity of a result of the study, by which its sweep and its variant are known.
        """
        if not finding.overrides:
            return ""
        sweep = self._sweep_of.get(result, self.results.sweeps[0])
        overrides = {name: str(point[name]) for name in self._varying}
        overrides |= variant_overrides(self.results.settings.get(result, {})) if point["method"] else {}
        overrides |= {"method": point["method"]} if point["method"] else {}
        return next_command(sweep["command"], sweep["name"], overrides | dict(finding.overrides))
