"""Jobs of a real SLURM cluster and W&B: each tells of what it computes, or the last of everything."""

from src.store.files import read_json
from tests.support import wandb_server
from tests.support.commands import SMALL
from tests.support.on_slurm import SLURM, finished, until
from tests.support.tracked import metrics_of, run, told


def test_jobs_tell_w_and_b_while_they_run_or_their_conclusion_in_one_go(slurm, tmp_path):
    with wandb_server.serving() as server:
        for name, beta, who in (("live", 0.2, "live"), ("last", 0.4, "last")):
            folder = tmp_path / "sweeps" / name
            point = [f"beta={beta}", f"sweep.name={name}", f"hydra.launcher.wandb={who}", f"output_dir={tmp_path}"]
            done = run(server, "-m", *SMALL, *SLURM, *point)
            assert done.returncode == 0, done.stderr
            until(lambda folder=folder: finished(folder))
            (own,) = read_json(folder / "sweep.json")["points"]
            until(lambda name=name: any(r.finished for r in server.runs.values() if r.display == name))
            mine = server.runs[own["identity"]]
            assert told(mine.history) == metrics_of(tmp_path, "align", own["stages"]["align"])
            computed = mine.config["computed"]["value"]
            assert computed["align"]["slurm_job"].isdigit() and computed["align"]["commit"]
            spoke = sorted(path.parent.name for path in folder.glob("jobs/*/wandb-*.log"))
            assert bool(spoke) == (who == "live")
            assert {r.group for r in server.runs.values() if r.job_type == "align"} >= {name}
        kinds = [r.job_type for r in server.runs.values()]
        assert sorted(kinds) == ["aggregate", "aggregate", "align", "align", "baseline", "reference", "sft"]
        assert all(r.finished == 1 for r in server.runs.values()), "each was told to its end, once"
