"""The launchers, as far as they can be tested without a cluster."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import pytest

from launchers.slurm import cluster
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import split_parallelism
from launchers.slurm.job_records import new_submission
from launchers.slurm.submit import _in_flight
from src import preflight
from src.config.validation import build_point
from src.errors import ConfigError
from src.planning.model_shape import model_shape
from src.planning.plan import make_plan
from src.store import code_snapshot
from src.store.store import Store
from src.store.sweep_folder import SweepFolder, result_folders
from tests.support import rehearsals
from tests.support.commands import ROOT, SMALL, environment, train
from tests.support.configs import composed
from tests.support.endpoint import LoopbackServer


def test_without_sbatch_the_command_fails_and_writes_nothing(tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("git", "env"):
        os.symlink(f"/usr/bin/{name}", path / name)
    command = [sys.executable, "-m", "src.train", "-m", "hydra/launcher=slurm", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), "PATH": str(path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "sbatch not found" in done.stderr and "hydra/launcher=local" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_single_run_refuses_the_slurm_launcher(tmp_path):
    done = train("hydra/launcher=slurm", *SMALL, f"output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and "add -m" in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (None, [3, 5], [None, None]),
        (8, [30, 10], [6, 2]),
        (4, [8, 8, 4], [2, 1, 1]),
        (1, [5, 5], [1, 1]),
        (100, [3, 5], [3, 5]),
    ],
)
def test_arrays_share_the_parallelism_of_a_sweep_in_proportion_to_their_sizes(total, sizes, expected):
    assert split_parallelism(total, sizes) == expected


def test_a_job_whose_upstream_job_failed_is_not_in_flight(monkeypatch, tmp_path):
    # SLURM leaves the dependents of a failed job in the queue until it next evaluates dependencies, a moment too short
    # to hit on a cluster.
    store = Store(tmp_path)
    point = build_point(composed("method=orpo"))
    plan = make_plan([point], store)
    sft, align = (next(s for s in plan.stages.values() if s.kind == kind) for kind in ("sft", "align"))
    sweep = SweepFolder(tmp_path / "sweeps" / "x")
    known = [new_submission(sweep, s.kind, [(s.kind, [[s.kind, s.identity]])]) for s in (sft, align)]
    for submission, job in zip(known, ("1", "2"), strict=True):
        submission.tasks[0].job = job
    cancelled: set[str] = set()
    monkeypatch.setattr("launchers.slurm.cluster.cancel", cancelled.update)
    waiting = QueuedJob("2", "PENDING", "Dependency", "x-align")
    running = QueuedJob("1", "RUNNING", "None", "x-sft")
    assert _in_flight(plan, known, {"1": running, "2": waiting}) == {sft.identity: "1", align.identity: "2"}
    assert not cancelled
    assert _in_flight(plan, known, {"2": waiting}) == {} and cancelled == {"2"}


@pytest.mark.parametrize("name", ["SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SLURM_ARRAY_TASK_ID", "MASTER_PORT"])
def test_environment_variables_do_not_override_the_options_of_a_submission(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "kept")
    monkeypatch.setenv("SBATCH_ACCOUNT", "kept")
    with cluster.clean_environment({"partition": "gpu"}):
        assert name not in os.environ and os.environ["SLURM_CONF"] == os.environ["SBATCH_ACCOUNT"] == "kept"
    assert os.environ[name] == "1"


def test_the_code_snapshot_is_complete_wherever_output_dir_is(tmp_path):
    for output_dir in (ROOT / "outputs", tmp_path, ROOT.parent, ROOT):
        code = code_snapshot.snapshot(tmp_path / "code", result_folders(output_dir))
        assert (code / "src" / "train.py").exists() and (code / "sweeps" / "sweeper.py").exists()
    assert len(list((tmp_path / "code").iterdir())) == 1


def test_hub_names_that_cannot_be_verified_are_named_in_one_warning(monkeypatch, tmp_path):
    point = build_point(composed("setup=llama32_3b_tldr"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (warning,) = preflight.check_hub([point, point])
    assert warning.count("model.path=meta-llama/Llama-3.2-3B") == 1 and "HF_HUB_OFFLINE" in warning
    folder = tmp_path / "models--meta-llama--Llama-3.2-3B" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (warning,) = preflight.check_hub([point])
    assert "model.path" in warning, "planning fetches a config without the model"
    (folder / "model-00001-of-00002.safetensors").touch()
    (warning,) = preflight.check_hub([point])
    assert "model.path" not in warning, "the model is in the cache"
    assert preflight.check_hub([build_point(composed())]) == []


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for a gated, a public and a missing repository."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/open/model/resolve/main/config.json"):
            self.respond(200, "", rehearsals.TINY)
        elif self.path.startswith("/capped/model/resolve/main/config.json"):
            self.respond(200, "", rehearsals.TINY | {"attn_logit_softcapping": 50.0})
        elif self.path.startswith("/other/model/resolve/main/config.json"):
            self.respond(200, "", {"model_type": "t5"})
        elif "/gated/" in self.path and self.path.endswith("auth-check"):
            self.respond(403, "GatedRepo")
        elif "/gated/" in self.path:
            self.respond(200, "", {"id": "gated/model", "gated": "manual", "siblings": [], "tags": []})
        elif "/open/" in self.path:
            self.respond(200, "", {"id": "open/model", "siblings": [], "tags": []})
        else:
            self.respond(404, "RepoNotFound")

    def respond(self, status: int, code: str, body: dict | None = None) -> None:
        text = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)


@pytest.fixture
def reachable_hub(monkeypatch, tmp_path):
    server = LoopbackServer()
    server.serve(Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    root = server.url.removesuffix("/v1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", root)
    resolved = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", root + resolved)
    monkeypatch.setattr(preflight, "HUB_TIMEOUT", 60)
    model_shape.cache_clear()
    yield
    server.close()
    model_shape.cache_clear()


def test_a_run_of_any_model_of_the_hub_is_planned_by_its_config(reachable_hub, monkeypatch):
    run = build_point(composed("model=hf", "model.path=open/model", "model.template=plain"))
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        preflight.check_input_files([run])
        assert model_shape("open/model") is None, "the control"
    preflight.check_input_files([run])
    assert model_shape("open/model").num_parameters == rehearsals.NUM_PARAMETERS
    with pytest.raises(ConfigError, match=r"it has 8192 positions, sequences have up to 9000"):
        preflight.check_input_files(
            [build_point(composed("model=hf", "model.path=open/model", "dataset.max_tokens=9000"))]
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("capped/model", "soft-capped attention scores are not supported"),
        ("other/model", "log-probs of model_type t5 are not supported"),
    ],
)
def test_a_model_of_the_hub_that_is_not_supported_is_refused_by_its_config_when_a_run_is_planned(
    name, reason, reachable_hub
):
    with pytest.raises(ConfigError, match=f"^model.path={name}: .*{reason}"):
        preflight.check_input_files([build_point(composed("model=hf", f"model.path={name}", "model.template=plain"))])


def test_a_missing_or_gated_repository_is_an_error(reachable_hub):
    with pytest.raises(ConfigError, match=r"model\.path=some/where: neither a local path nor on the hub"):
        preflight.check_hub([build_point(composed("model.path=some/where"))])
    with pytest.raises(ConfigError, match=r"model\.path=gated/model: gated on the hub"):
        preflight.check_hub([build_point(composed("model.path=gated/model"))])
    assert preflight.check_hub([build_point(composed("model.path=open/model"))]) == []
