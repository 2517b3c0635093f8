"""W&B gets what the store has, once, and never stops a run."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from src.config.schema import Tracking
from src.store.files import read_json
from src.tracking.following import logged_in, place_of
from src.tracking.session import Place
from tests.support import wandb_server
from tests.support.commands import ROOT, SMALL, command
from tests.support.tracked import metrics_of, offline_history, read_yaml, run, shell, told


@pytest.fixture
def server():
    with wandb_server.serving() as server:
        yield server


@pytest.fixture(scope="module")
def told_sweep(tmp_path_factory):
    """A sweep that was told to a server; both."""
    out = tmp_path_factory.mktemp("told")
    with wandb_server.serving() as server:
        done = run(server, "-m", *SMALL, "beta=0.2,0.4", f"output_dir={out}", "sweep.name=told")
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
        assert f"W&B: online, alignment-sweep ({server.url})" in done.stdout
        yield server, out


def test_a_sweep_is_a_run_of_each_point_and_of_what_they_share_with_the_stores_numbers(told_sweep):
    server, tmp_path = told_sweep
    points = read_json(tmp_path / "sweeps" / "told" / "sweep.json")["points"]
    assert sorted(r.job_type for r in server.runs.values()) == [
        "aggregate",
        "align",
        "align",
        "baseline",
        "reference",
        "sft",
    ]
    assert {r.group for r in server.runs.values()} == {"told"} and all(r.finished for r in server.runs.values())
    for point in points:
        mine = server.runs[point["identity"]]
        assert mine.display == point["label"] and mine.tags == ["mini_tldr", "dpo", "sft"]
        assert told(mine.history) == metrics_of(tmp_path, "align", point["stages"]["align"])
        result = read_json(tmp_path / "store" / "evaluate" / point["identity"] / "result.json")
        assert mine.summary["quality/value"] == result["quality"]["value"]
        assert mine.summary["kl/per_sequence/value"] == result["kl"]["per_sequence"]["value"]
        assert mine.config["beta"]["value"] == point["beta"]
        assert mine.config["uses"]["value"]["sft"] in server.runs
        computed = mine.config["computed"]["value"]
        assert computed["align"]["host"] == os.uname().nodename and computed["evaluate"]["seconds"] >= 0
        (table,) = (json.loads(data) for name, data in mine.files.items() if name.startswith("media/table/samples"))
        assert len(table["data"]) == 16 and table["columns"][:3] == ["index", "prompt", "response"]
    sft = points[0]["stages"]["sft"]
    assert told(server.runs[sft].history) == metrics_of(tmp_path, "sft", sft)

    # What W&B has is not uploaded again, by neither way.
    before = len(server.requests)
    again = run(server, str(tmp_path / "sweeps" / "told"), module="sweeps.wandb_sync")
    assert again.returncode == 0 and "0 of 6 runs uploaded" in again.stdout, again.stderr
    again = run(server, "-m", *SMALL, "beta=0.2,0.4", f"output_dir={tmp_path}", "sweep.name=told")
    assert again.returncode == 0 and len(server.requests) == before


def test_a_point_killed_twice_in_the_middle_is_one_run_without_gap_or_double(server, tmp_path):
    slow = [*SMALL, "dataset.train_size=8000", f"output_dir={tmp_path}"]
    often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.2"}  # else the client sends every 15 s
    for _ in range(2):
        process = subprocess.Popen(command(*slow), cwd=ROOT, env=shell(server, **often), start_new_session=True)
        before = {r.name: len(r.steps) for r in server.runs.values() if r.job_type == "align"}
        deadline = time.monotonic() + 120
        while not any(len(r.steps) > before.get(r.name, 0) + 2 for r in server.runs.values() if r.job_type == "align"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(server, *slow).returncode == 0
    (mine,) = (r for r in server.runs.values() if r.job_type == "align")
    (align,) = (path.parent.name for path in (tmp_path / "store" / "align").glob("*/DONE"))
    metrics = metrics_of(tmp_path, "align", align)
    assert mine.steps == [row["step"] for row in metrics] == list(range(500))
    assert [row["loss"] for row in told(mine.history)] == [row["loss"] for row in metrics]


def test_two_at_once_tell_of_a_point_once(server, tmp_path):
    both = [
        subprocess.Popen(
            command(*SMALL, f"output_dir={tmp_path}"), cwd=ROOT, env=shell(server), stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    synced = run(server, str(tmp_path), module="sweeps.wandb_sync")
    assert synced.returncode == 0, synced.stderr
    (mine,) = (r for r in server.runs.values() if r.job_type == "align")
    assert told(mine.history) == metrics_of(tmp_path, "align", mine.config["stages"]["value"]["align"])
    assert sum("samples" in row for row in mine.history) == 1


def sync(server, folder):
    """How many runs an upload of a sweep had to tell of."""
    done = run(server, str(folder), module="sweeps.wandb_sync")
    assert done.returncode == 0, done.stderr
    return int(re.search(r"^(\d+) of \d+ runs uploaded", done.stdout, re.M)[1])


@pytest.mark.parametrize("how", ["busy", "silent"])
def test_a_server_without_answers_is_one_warning_and_what_is_missing_is_uploaded_once(how, server, tmp_path):
    if how == "busy":
        server.refuse = 429
    else:
        server.lock.acquire()  # takes every question, and has no answer
    done = run(server, *SMALL, f"output_dir={tmp_path}")
    assert done.returncode == 0 and "result:" in done.stdout, done.stderr
    assert done.stderr.count("warning: W&B has not all of this") == 1 and "Traceback" not in done.stderr
    assert f"python -m sweeps.wandb_sync {tmp_path}" in done.stderr
    server.refuse = None
    if how == "silent":
        server.lock.release()
    assert sync(server, tmp_path) == 4
    (mine,) = (r for r in server.runs.values() if r.job_type == "align")
    assert told(mine.history) == metrics_of(tmp_path, "align", mine.config["stages"]["value"]["align"])


def test_a_server_killed_in_the_middle_of_a_sweep_stops_nothing_and_gets_the_rest_later(server, tmp_path):
    folder = tmp_path / "sweeps" / "told"
    process = subprocess.Popen(
        command("-m", *SMALL, "beta=0.2,0.4", f"output_dir={tmp_path}", "sweep.name=told"),
        cwd=ROOT, env=shell(server), stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    while not server.runs:
        assert process.poll() is None
        time.sleep(0.05)
    server.refuse, known = -1, len(server.requests)  # hangs up on whoever calls
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count("warning: W&B has not all of this") == 1, said
    assert f"python -m sweeps.wandb_sync {folder}" in said
    points = read_json(folder / "sweep.json")["points"]
    assert [point["state"] for point in points] == ["done", "done"]
    assert len(server.requests) > known, "it was asked after it had gone"
    server.refuse = None
    assert sync(server, folder) == 6
    assert sync(server, folder) == 0
    for point in points:
        assert told(server.runs[point["identity"]].history) == metrics_of(tmp_path, "align", point["stages"]["align"])


def test_a_login_is_found_where_w_and_b_s_client_leaves_it(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert place_of(Tracking(wandb=True)) == Place("alignment-sweep", None, "offline")
    (tmp_path / "netrc").write_text(f"machine wandb.here:8080\n  login user\n  password {wandb_server.KEY}\n")
    assert not logged_in(), "that is a key for another server"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here:8080\n")
    assert place_of(Tracking(wandb=True, entity="us")) == Place("alignment-sweep", "us", "online")
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here:8080\nmode = offline\n")
    assert place_of(Tracking(wandb=True)).mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert place_of(Tracking(wandb=True)) is None and place_of(Tracking(wandb=False)) is None


def test_not_logged_in_means_offline_and_the_same_numbers(tmp_path):
    done = run(None, "-m", *SMALL, "beta=0.2,0.4", f"output_dir={tmp_path}", "sweep.name=tracked")
    assert done.returncode == 0, done.stderr
    assert "W&B: offline" in done.stdout
    runs = {}
    for folder in (tmp_path / "wandb").glob("offline-run-*"):
        rows, found = offline_history(folder)
        assert found.run_group == "tracked" and found.run_id not in runs
        runs[found.run_id] = rows
    points = read_json(tmp_path / "sweeps" / "tracked" / "sweep.json")["points"]
    assert len(runs) == 6
    for point in points:
        assert told(runs[point["identity"]]) == metrics_of(tmp_path, "align", point["stages"]["align"])


def test_no_secret_reaches_w_and_b_or_any_file(server, tmp_path):
    canaries = {name: f"canary-{name.lower()}-0123456789" for name in ("OPENAI_API_KEY", "HF_TOKEN", "MY_KEY")}
    done = run(server, *SMALL, f"output_dir={tmp_path}", "judge.api_key_env=MY_KEY", **canaries)
    assert done.returncode == 0, done.stderr
    secrets = [*canaries.values(), wandb_server.KEY]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    bodies = [body for _, body in server.requests]
    assert len(files) > 20 and len(bodies) > 5
    for where in (files, bodies, [done.stdout.encode(), done.stderr.encode()]):
        for secret in secrets:
            assert not any(secret.encode() in data for data in where)


@pytest.mark.parametrize("why", ["no folder", "no key"])
def test_a_client_that_cannot_even_start_never_stops_a_run(why, tmp_path):
    if why == "no folder":
        (tmp_path / "wandb").write_text("a file where W&B wants its folder")
    done = run(None, *SMALL, f"output_dir={tmp_path}", *(["tracking.mode=online"] if why == "no key" else []))
    assert "result:" in done.stdout and done.stderr.count("warning: W&B has not all of this") == 1


def test_the_aggregation_run_has_tables_figures_report_and_choice(told_sweep):
    server, out = told_sweep
    (own,) = (r for r in server.runs.values() if r.job_type == "aggregate")
    folder = out / "sweeps" / "told"
    assert own.display == own.group == "told" and own.finished
    best = read_yaml(folder / "best.yaml")["mini_tldr"]["dpo"]
    assert own.summary["best/mini_tldr/dpo/beta"] == best["beta"] and own.summary["points/done"] == 2
    assert json.loads(own.files["sweep.json"])["finished"]
    logged = [key for row in own.history for key in row]
    assert "report" in logged and any(key.startswith("figures/") for key in logged) and "tables/best" in logged
    (artifact,) = (a for a in server.artifacts.values() if a["artifactTypeName"] == "sweep")
    assert artifact["committed"] and {"report.html", "best.yaml", "sweep.json"} <= set(artifact["files"])
    assert artifact["files"]["best.yaml"] == (folder / "best.yaml").read_bytes()


def test_a_sweep_aggregated_from_w_and_b_alone_is_the_same(told_sweep, tmp_path):
    server, out = told_sweep
    for _ in range(2):
        done = run(server, "wandb://me/alignment-sweep/told", module="sweeps.aggregate", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    there, here = (tmp_path / "outputs/wandb/me/alignment-sweep/sweeps/told", out / "sweeps" / "told")
    for name in ("tables/best.md", "tables/differences.csv"):
        assert (there / name).read_text() == (here / name).read_text()
    assert (there / "report.html").exists()
    downloads = [path for path, _ in server.requests if path.startswith("GET") and path.endswith("/samples.jsonl")]
    assert len(downloads) == 3  # of two points and their baseline, in the first call alone

    for address, said in {
        "wandb://me/alignment-sweep/none": "no runs",
        "wandb://told": "ENTITY/PROJECT/GROUP",
        "wandb://me/p/a/../b": "ENTITY/PROJECT/GROUP",
    }.items():
        done = run(server, address, module="sweeps.aggregate", cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_dashboard_in_w_and_b_is_the_definition_in_the_file_and_made_once(told_sweep):
    server, out = told_sweep
    folder = out / "sweeps" / "told"
    for _ in range(2):
        done = run(server, str(folder), module="sweeps.dashboard")
        assert done.returncode == 0 and f"workspace: {server.url}/me/alignment-sweep?nw=" in done.stdout, done.stderr
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]
    definition = read_json(folder / "dashboard.json")
    workspace, report = sorted(server.views.values(), key=lambda view: view["type"])
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s["title"] for s in definition["sections"]]
    assert [len(s["panels"]) for s in sections] == [len(s["panels"]) for s in definition["sections"]]
    colours = workspace["spec"]["section"]["customRunColors"]
    assert colours == dict.fromkeys(definition["runs"], definition["colours"]["dpo"])
    pinned = workspace["spec"]["section"]["runSets"][0]["runFeed"]["columnPinned"]
    assert "config:method.value.name" in pinned and "summary:quality/value" in pinned
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(sections)

    # Every key that a panel shows is one that runs have.
    metrics = {key for r in server.runs.values() for row in r.history for key in row}
    summaries = {key for r in server.runs.values() for key in r.summary}
    shown = json.dumps(definition["sections"])
    for key in re.findall(r'"summary:([^"]+)"', shown):
        assert key in summaries
    for key in re.findall(r'"(train/[^"]+)"', shown):
        assert key in metrics
    assert "<svg" in (folder / "dashboard.html").read_text()


def test_a_dashboard_without_an_account_is_files_and_a_clear_word(told_sweep, tmp_path):
    _, out = told_sweep
    folder = out / "sweeps" / "told"
    done = run(None, str(folder), module="sweeps.dashboard")
    assert done.returncode == 2 and "--local" in done.stderr
    assert run(None, str(folder), "--local", module="sweeps.dashboard").returncode == 0
    done = run(None, str(out), "--local", module="sweeps.dashboard")
    assert done.returncode == 2 and "no sweep.json there" in done.stderr
    empty = tmp_path / "sweeps" / "empty"
    empty.mkdir(parents=True)
    sweep = read_json(folder / "sweep.json")
    for point in sweep["points"]:
        point |= {"identity": "0" * 24, "state": "to do"}
    (empty / "sweep.json").write_text(json.dumps(sweep))
    (tmp_path / "store").mkdir()
    done = run(None, str(empty), "--local", module="sweeps.dashboard")
    assert done.returncode == 2 and "no point is done yet" in done.stderr, done.stderr
