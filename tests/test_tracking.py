"""W&B and TensorBoard get what the store has, each step once, and never stop a run."""

import json
import os
import re
import signal
import subprocess

import pytest

from src.store.files import read_json
from src.store.sweep_folder import SweepFolder
from tests.support import wandb_server
from tests.support.commands import ROOT, SMALL, command
from tests.support.tracked import metrics_of, read_yaml, run, scalars, shell, training_rows
from tests.support.waiting import wait_until

TWO_POINTS = ["-m", *SMALL, "beta=0.2,0.4", "sweep.name=demo"]
TENSORBOARD = "tracking.tensorboard.enabled=true"  # beside W&B, which is the default


@pytest.fixture
def server():
    with wandb_server.serving() as server:
        yield server


@pytest.fixture(scope="module")
def uploaded_sweep(tmp_path_factory):
    """Return a server, and the output_dir of a sweep that was synced to it while it ran."""
    out = tmp_path_factory.mktemp("uploaded")
    with wandb_server.serving() as server:
        done = run(server, *TWO_POINTS, TENSORBOARD, f"output_dir={out}")
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        assert f"W&B: online, alignment-sweep ({server.url})" in done.stdout
        assert f"tensorboard --logdir {out}/tensorboard" in done.stdout
        yield server, out


def points_of(out, name="demo"):
    return SweepFolder(out / "sweeps" / name).read()["points"]


def event_files(out):
    return {path: path.stat().st_size for path in out.glob("tensorboard/**/*") if path.is_file()}


def align_run(server):
    """Return the only run of a point."""
    (align,) = (r for r in server.runs.values() if r.job_type == "align")
    return align


def num_uploaded(server, folder):
    """Return how many runs an upload found missing."""
    done = run(server, str(folder), module="sweeps.wandb_sync")
    assert done.returncode == 0, done.stderr
    return int(re.search(r"^(\d+) of \d+ runs uploaded", done.stdout, re.M)[1])


@pytest.mark.slow
def test_a_sweep_is_a_run_per_point_and_shared_stage_with_the_numbers_of_the_store(uploaded_sweep):
    server, out = uploaded_sweep
    points = points_of(out)
    job_types = sorted(r.job_type for r in server.runs.values())
    assert job_types == ["aggregate", "align", "align", "baseline", "reference", "sft"]
    assert {r.group for r in server.runs.values()} == {"demo"}
    assert all(r.num_finished == 1 for r in server.runs.values())
    for point in points:
        align = server.runs[point["identity"]]
        assert align.display == point["label"] and align.tags == ["mini_tldr", "dpo", "sft"]
        assert training_rows(align.history) == metrics_of(out, "align", point["stages"]["align"])
        result = read_json(out / "store" / "evaluate" / point["identity"] / "result.json")
        assert align.summary["quality/value"] == result["quality"]["value"]
        assert align.summary["kl/per_sequence/value"] == result["kl"]["per_sequence"]["value"]
        assert align.config["beta"]["value"] == point["beta"]
        assert align.config["trainer"]["value"]["align"]["batch_size"] == 16
        assert align.config["upstream_runs"]["value"]["sft"] in server.runs
        computed = align.config["computed"]["value"]
        assert computed["align"]["host"] == os.uname().nodename and computed["evaluate"]["seconds"] >= 0
        (table,) = (json.loads(data) for name, data in align.files.items() if name.startswith("media/table/samples"))
        assert len(table["data"]) == 16 and table["columns"][:3] == ["index", "prompt", "response"]
    sft = points[0]["stages"]["sft"]
    assert training_rows(server.runs[sft].history) == metrics_of(out, "sft", sft)


@pytest.mark.slow
def test_nothing_is_uploaded_twice(uploaded_sweep):
    server, out = uploaded_sweep
    num_requests, events = len(server.requests), event_files(out)
    assert num_uploaded(server, out / "sweeps" / "demo") == 0
    again = run(server, *TWO_POINTS, TENSORBOARD, f"output_dir={out}")
    assert again.returncode == 0 and len(server.requests) == num_requests
    assert event_files(out) == events and len(events) == 6, "two points, sft, reference, baseline, and the sweep"


@pytest.mark.slow
def test_curves_and_results_in_tensorboard_are_those_of_the_store(uploaded_sweep):
    _, out = uploaded_sweep
    for point in points_of(out):
        (folder,) = out.glob(f"tensorboard/demo/*-{point['identity'][-8:]}")
        curves, metrics = scalars(folder), metrics_of(out, "align", point["stages"]["align"])
        for name in metrics[0].keys() - {"step"}:
            expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics]  # stored in float32
            assert curves[f"train/{name}"] == expected
        result = read_json(out / "store" / "evaluate" / point["identity"] / "result.json")
        assert curves["quality/value"] == [(7, pytest.approx(result["quality"]["value"]))]


@pytest.mark.slow
def test_a_point_killed_twice_is_one_run_with_every_step_once(server, tmp_path):
    long = [*SMALL, "trainer.align.epochs=40", f"output_dir={tmp_path}", TENSORBOARD]
    often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}  # the client's default is 15 s
    for _ in range(2):
        process = subprocess.Popen(command(*long), cwd=ROOT, env=shell(server, **often), start_new_session=True)
        before = {r.name: len(r.steps) for r in server.runs.values() if r.job_type == "align"}

        def has_new_steps(before=before):
            runs = (r for r in server.runs.values() if r.job_type == "align")
            return any(len(r.steps) > before.get(r.name, 0) + 2 for r in runs)

        wait_until(has_new_steps, 120, "live training curves")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(server, *long).returncode == 0
    (align,) = (path.parent.name for path in (tmp_path / "store" / "align").glob("*/DONE"))
    metrics = metrics_of(tmp_path, "align", align)
    assert align_run(server).steps == [row["step"] for row in metrics] == list(range(320))
    assert [row["loss"] for row in training_rows(align_run(server).history)] == [row["loss"] for row in metrics]
    (folder,) = (path for path in tmp_path.glob("tensorboard/*") if "dpo" in path.name)
    assert len(list(folder.glob("events.out.tfevents.*"))) > 1, "it was continued"
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(320))


@pytest.mark.slow
def test_rungs_of_a_search_continue_in_the_same_run(server, tmp_path):
    halving = ["sweep.search=successive_halving", "sweep.rungs=[0.5,1]", f"output_dir={tmp_path}"]
    done = run(server, *TWO_POINTS, *halving)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    points = points_of(tmp_path)
    runs = [r for r in server.runs.values() if r.job_type == "align"]
    assert {r.name for r in runs} == {point["full_result"] for point in points}
    assert sorted(r.steps for r in runs) == [list(range(4)), list(range(8))]
    for point in points:
        assert server.runs[point["full_result"]].summary["result"] == point["identity"]
    assert num_uploaded(server, tmp_path) == 0


@pytest.mark.slow
def test_two_processes_that_need_the_same_point_write_one_run(server, tmp_path):
    both = [
        subprocess.Popen(
            command(*SMALL, f"output_dir={tmp_path}"), cwd=ROOT, env=shell(server), stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    num_uploaded(server, tmp_path)
    align = align_run(server)
    assert training_rows(align.history) == metrics_of(tmp_path, "align", align.config["stages"]["value"]["align"])
    assert sum("samples" in row for row in align.history) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["busy", "silent"])
def test_without_a_server_a_run_warns_once_and_a_later_upload_completes_it(how, server, tmp_path):
    if how == "busy":
        server.refuse = 429
    else:
        server.lock.acquire()  # it accepts connections and never answers
    done = run(server, *SMALL, TENSORBOARD, f"output_dir={tmp_path}")
    assert done.returncode == 0 and "result:" in done.stdout, done.stderr
    assert done.stderr.count("warning: upload incomplete (W&B: ") == 1 and "Traceback" not in done.stderr
    assert f"`python -m sweeps.wandb_sync {tmp_path}` uploads the rest" in done.stderr
    (folder,) = (path for path in tmp_path.glob("tensorboard/*") if "dpo" in path.name)
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(8)), "the other tracker is complete"
    server.refuse = None
    if how == "silent":
        server.lock.release()
    assert num_uploaded(server, tmp_path) == 4
    align = align_run(server)
    assert training_rows(align.history) == metrics_of(tmp_path, "align", align.config["stages"]["value"]["align"])


@pytest.mark.slow
def test_a_server_that_goes_away_during_a_sweep_stops_nothing_and_is_completed_later(server, tmp_path):
    folder = tmp_path / "sweeps" / "demo"
    upsert = server.op_upsert_bucket

    def answer_and_go_away(variables):
        server.refuse = -1  # it closes every connection
        requests_before.append(len(server.requests))
        return upsert(variables)

    requests_before = []
    server.op_upsert_bucket = answer_and_go_away
    done = run(server, *TWO_POINTS, f"output_dir={tmp_path}")
    server.op_upsert_bucket, stderr, num_requests = upsert, done.stderr, requests_before[0]
    assert done.returncode == 0 and stderr.count("warning: upload incomplete") == 1, stderr
    assert f"python -m sweeps.wandb_sync {folder}" in stderr
    assert [point["state"] for point in points_of(tmp_path)] == ["done", "done"]
    assert len(server.requests) > num_requests, "it was asked after it had gone"
    server.refuse = None
    assert num_uploaded(server, folder) == 6
    assert num_uploaded(server, folder) == 0
    for point in points_of(tmp_path):
        history = server.runs[point["identity"]].history
        assert training_rows(history) == metrics_of(tmp_path, "align", point["stages"]["align"])


@pytest.mark.slow
def test_the_aggregation_run_has_tables_figures_report_and_best_points(uploaded_sweep):
    server, out = uploaded_sweep
    (aggregation,) = (r for r in server.runs.values() if r.job_type == "aggregate")
    folder = SweepFolder(out / "sweeps" / "demo")
    assert aggregation.display == aggregation.group == "demo"
    best = read_yaml(folder.best_yaml)["mini_tldr"]["dpo"]
    assert aggregation.summary["best/mini_tldr/dpo/beta"] == best["beta"]
    assert aggregation.summary["points/done"] == 2
    assert json.loads(aggregation.files[folder.record.name])["finished"]
    logged = [key for row in aggregation.history for key in row]
    assert "report" in logged and any(key.startswith("figures/") for key in logged) and "tables/best" in logged
    (artifact,) = (a for a in server.artifacts.values() if a["artifactTypeName"] == "sweep")
    assert artifact["committed"]
    assert {"report.html", "best.yaml", "points.csv", "tables/best.csv", folder.record.name} <= set(artifact["files"])
    assert artifact["files"]["best.yaml"] == folder.best_yaml.read_bytes()


@pytest.mark.slow
def test_a_sweep_aggregated_from_wandb_alone_gives_the_same_tables(uploaded_sweep, tmp_path):
    server, out = uploaded_sweep
    for _ in range(2):
        done = run(server, "wandb://me/alignment-sweep/demo", module="sweeps.aggregate", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    downloaded, original = tmp_path / "outputs/wandb/me/alignment-sweep/sweeps/demo", out / "sweeps" / "demo"
    for name in ("tables/best.md", "tables/differences.csv"):
        assert (downloaded / name).read_text() == (original / name).read_text()
    assert (downloaded / "report.html").exists()
    downloads = [path for path, _ in server.requests if path.startswith("GET") and path.endswith("/samples.jsonl")]
    assert len(downloads) == 3, "of two points and their baseline, in the first call only"

    for address, message in {
        "wandb://me/alignment-sweep/none": "no runs",
        "wandb://demo": "ENTITY/PROJECT/GROUP",
        "wandb://me/p/a/../b": "ENTITY/PROJECT/GROUP",
    }.items():
        done = run(server, address, module="sweeps.aggregate", cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_dashboard_in_wandb_is_the_definition_in_the_file_and_created_once(uploaded_sweep):
    server, out = uploaded_sweep
    folder = out / "sweeps" / "demo"
    for _ in range(2):
        done = run(server, str(folder), module="sweeps.dashboard")
        assert done.returncode == 0 and f"workspace: {server.url}/me/alignment-sweep?nw=" in done.stdout, done.stderr
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]
    definition = read_json(folder / "dashboard.json")
    workspace, report = sorted(server.views.values(), key=lambda view: view["type"])
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s["title"] for s in definition["sections"]]
    assert [len(s["panels"]) for s in sections] == [len(s["panels"]) for s in definition["sections"]]
    colors = workspace["spec"]["section"]["customRunColors"]
    assert colors == dict.fromkeys(definition["runs"], definition["colors"]["dpo"])
    pinned = workspace["spec"]["section"]["runSets"][0]["runFeed"]["columnPinned"]
    assert "config:method.value.name" in pinned and "summary:quality/value" in pinned
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(sections)

    # Every key that a panel shows exists in the runs.
    metrics = {key for r in server.runs.values() for row in r.history for key in row}
    summaries = {key for r in server.runs.values() for key in r.summary}
    panels = json.dumps(definition["sections"])
    for key in re.findall(r'"summary:([^"]+)"', panels):
        assert key in summaries
    for key in re.findall(r'"(train/[^"]+)"', panels):
        assert key in metrics


@pytest.mark.slow
def test_a_dashboard_without_an_account_is_files_and_a_clear_error(uploaded_sweep, tmp_path):
    _, out = uploaded_sweep
    folder = SweepFolder(out / "sweeps" / "demo")
    done = run(None, str(folder.path), module="sweeps.dashboard")
    assert done.returncode == 2 and "--local" in done.stderr
    assert run(None, str(folder.path), "--local", module="sweeps.dashboard").returncode == 0
    done = run(None, str(out), "--local", module="sweeps.dashboard")
    assert done.returncode == 2 and "give a sweep's folder" in done.stderr
    empty = SweepFolder(tmp_path / "sweeps" / "empty")
    sweep = folder.read()
    for point in sweep["points"]:
        point |= {"identity": "0" * 24, "state": "to do"}
    empty.write(sweep)
    (tmp_path / "store").mkdir()
    done = run(None, str(empty.path), "--local", module="sweeps.dashboard")
    assert done.returncode == 2 and "no point is done yet" in done.stderr, done.stderr
