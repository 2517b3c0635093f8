"""The toy experiment: networks trained together are independent, and its grid resumes and refuses as it should."""

import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from src.losses import LOSSES
from src.toy.networks import OBJECTIVES, NetworkSettings, _gradient, _sample_data_and_weights, _scores, _test, train
from tests.support.commands import ROOT, environment
from tests.support.kills import slowed
from tests.support.waiting import wait_until

SMALL = NetworkSettings(
    "dpo", 3, 0.9, 0.03, 1.0, prompts=100, train_fraction=0.8, epochs=3, batch_size=16, optimizer="adam"
)


def toy(*overrides, check=True):
    command = [sys.executable, "-m", "src.toy", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_by_hand_is_autograds(objective):
    x, y, weights = (part.double() for part in _sample_data_and_weights(SMALL, range(4)))
    options = {"calibration_weight": 1.0} if objective == "cal_dpo" else {}

    def loss(chosen, rejected):
        return LOSSES[objective](chosen, rejected, 1.0, **options)

    by_hand = _gradient(weights, x, y, loss)
    for seed in range(4):
        network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
        flat = weights[:, seed]
        with torch.no_grad():
            network[0].weight.copy_(flat[:6].view(2, 3).T)
            network[0].bias.copy_(flat[6:9])
            network[2].weight.copy_(flat[9:12].view(1, 3))
            network[2].bias.copy_(flat[12:])
        chosen, rejected = (network(torch.stack([x[:, seed], y[i, :, seed]], -1))[:, 0] for i in (0, 1))
        loss(chosen, rejected).mean().backward()
        first, _, last = network
        expected = torch.cat([first.weight.grad.T.flatten(), first.bias.grad, last.weight.grad[0], last.bias.grad])
        assert torch.allclose(by_hand[:, seed], expected, rtol=1e-6, atol=1e-9)  # losses are float32
        assert torch.allclose(_scores(weights, x, y)[0][0, :, seed], chosen)


def test_a_network_is_the_same_whatever_is_trained_beside_it():
    together, alone = train(SMALL, range(7)), train(SMALL, range(5, 6))
    for name, values in alone.items():  # to rounding: vectorized logsigmoid rounds differently at the end of a row
        assert values[0] == pytest.approx(together[name][5], rel=1e-5)
    assert len(set(together["icc"])) == 7  # all differ


def test_data_are_as_the_paper_says():
    x, y, _ = _sample_data_and_weights(NetworkSettings(**{**vars(SMALL), "prompts": 4000}), range(2))
    assert (y[0] > y[1]).all()  # the higher score is preferred
    low = x < 0.5
    means = y.mean(0)
    assert torch.allclose(means[low], torch.tensor(0.9)) and torch.allclose(means[~low], torch.tensor(0.0), atol=1e-6)
    assert float((y[0] - y[1]).mean()) == pytest.approx(1 / 3, abs=0.01)  # of two uniform draws


def test_icc1_is_1_where_only_the_prompt_counts_and_minus_1_where_only_the_response_does():
    x = torch.rand(50)
    scores = torch.stack([torch.stack([x, x]), torch.stack([x, -x]), torch.stack([x * 0, x * 0 + 1e-8])], -1)
    results = _test(scores)
    assert results["icc"][:2] == pytest.approx([1.0, -1.0])
    assert list(results["accuracy"]) == [0.5, 1.0, 0.5]
    assert list(results["dead"]) == [False, False, True] and np.isnan(results["icc"][2])
    broken = _test(torch.full((2, 5, 1), torch.nan))
    assert broken["dead"].all() and broken["accuracy"] == 0.5


@pytest.mark.slow
def test_pairwise_objectives_ignore_a_bias_that_pointwise_ones_have_to_learn(tmp_path):
    overrides = ["objectives=[dpo,nca]", "widths=[3]", "lrs=[0.01]", "lr_seeds=1", "seeds=100"]
    done = toy(*overrides, f"output_dir={tmp_path}")
    table = pd.read_csv(tmp_path / "toy" / "toy.csv").set_index(["bias", "objective"])
    assert set(table.seeds) == {100} and len(table) == 4
    assert (table.loc[0.0].accuracy_alive > 0.99).all()  # unbiased: all alike
    kinds = pd.read_csv(tmp_path / "toy" / "kinds.csv").set_index("bias")
    assert abs(kinds.accuracy_difference[0.0]) <= 1.96 * kinds.accuracy_difference_se[0.0]
    assert kinds.accuracy_difference[0.9] > 1.96 * kinds.accuracy_difference_se[0.9]
    low = table.loc[0.9].icc1 - 1.96 * table.loc[0.9].icc1_se
    high = table.loc[0.9].icc1 + 1.96 * table.loc[0.9].icc1_se
    assert low["dpo"] > high["nca"]
    assert "| 0.9 | 3 | dpo | pairwise |" in done.stdout
    for name in ("toy.md", "toy.png", "toy.svg"):
        assert (tmp_path / "toy" / name).stat().st_size > 500


@pytest.mark.slow
def test_after_an_interruption_only_what_is_missing_is_trained_and_the_table_is_the_same(tmp_path):
    overrides = ["seeds=3", "lr_seeds=3", "widths=[1]", "lrs=[0.1]", "prompts=200", "epochs=20", "workers=1"]
    whole = toy(*overrides, f"output_dir={tmp_path / 'whole'}")
    command = [sys.executable, "-m", "src.toy", *overrides, f"output_dir={tmp_path / 'cut'}"]
    slow = slowed("toy/networks/*.npz", 1)  # it is interrupted long before it ends
    process = subprocess.Popen(command, cwd=ROOT, env=slow, stderr=subprocess.PIPE, text=True)
    networks = tmp_path / "cut" / "toy" / "networks"
    wait_until(lambda: list(networks.glob("*.npz")), 120, "results of a network")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    finished = {path.name: path.stat().st_mtime_ns for path in networks.glob("[!.]*.npz")}
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert 0 < len(finished) < 24  # 12 to select learning rates, 12 at the selected ones
    again = toy(*overrides, f"output_dir={tmp_path / 'cut'}")
    assert {name: (networks / name).stat().st_mtime_ns for name in finished} == finished
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == [
        line for line in whole.stdout.splitlines() if line.startswith("|")
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives=[simpo]", "objectives: simpo (on a scalar score it is dpo) is not one of dpo, ipo,"),
        ("widths=[]", "widths: an empty list"),
        ("lrs=[0.1,0.1]", "has a value twice"),
        ("optimizer=adamw", "optimizer=adamw: must be one of adam, sgd"),
        ("seeds=0", "seeds=0: must be >= 1"),
        ("train_fraction=1.0", "train_fraction=1: must be >= 0.1 and <= 0.9"),
        ("seed=3", "seed"),
    ],
)
def test_what_cannot_be_trained_is_one_line(override, message, tmp_path):
    done = toy(override, f"output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "toy" / "networks").exists()
