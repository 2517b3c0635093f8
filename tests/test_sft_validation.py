"""The loss of SFT on held-out demonstrations, and a mixture from its tables to the report."""

import json
import math

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from src.data import mini_tldr
from src.data.sources import open_source
from src.model.loading import load_template
from src.planning.inputs import sft_data
from src.stages.measurements import _by_source
from src.stages.runner import compute_or_wait
from src.store.files import read_json, read_jsonl
from src.store.store import Store
from src.tracking.sink import tracked_name
from tests.support.commands import SMALL, train
from tests.support.configs import TINY, identities, point, stage_of


def computed(stage, tmp_path, name):
    return compute_or_wait(stage, Store(tmp_path / name))


def test_validation_changes_the_identity_of_sft_and_no_bit_of_its_model(tmp_path):
    from src.model.loading import set_cpu_threads

    set_cpu_threads(1)
    plain, validated = (stage_of("sft", *TINY, f"dataset.sft_validation_size={size}") for size in (0, 16))
    folders = [computed(stage, tmp_path, name) for stage, name in ((plain, "plain"), (validated, "validated"))]
    assert plain.identity != validated.identity
    assert plain.identity == identities(*TINY)["sft"], "off by default"
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    lines = [list(read_jsonl(folder / "metrics.jsonl")) for folder in folders]
    last = lines[1].pop()
    assert [row["loss"] for row in lines[0]] == [row["loss"] for row in lines[1]]
    assert not (folders[0] / "validation.jsonl").exists() and set(last) == {"step", "eval_loss"}

    # By transformers alone, one demonstration at a time.
    template, model = load_template(validated.inputs.model), AutoModelForCausalLM.from_pretrained(folders[1])
    rows = open_source(sft_data(point(*TINY, "dataset.sft_validation_size=16"))).held_out_demonstrations()
    assert len(rows) == 16
    trained = open_source(plain.inputs.data).demonstrations()
    assert not {row.prompt.key for row in rows} & {row.prompt.key for row in trained}
    total = tokens = 0
    for row in rows:
        prompt, response = template.prompt_ids(row.prompt), template.response_ids(row.response)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        tokens += len(response)
    assert last["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    written = list(read_jsonl(folders[1] / "validation.jsonl"))
    assert sum(row["tokens"] for row in written) == tokens
    assert abs(last["eval_loss"] - lines[1][-1]["loss"]) > 1e-4, "the negative control: another loss is not this one"


def test_points_of_a_sweep_share_the_validated_sft_model():
    validated = ("dataset.sft_validation_size=16",)
    one, two = identities(*validated, "beta=0.3"), identities(*validated, "method=ipo")
    assert one["sft"] == two["sft"] and one["evaluate"] != two["evaluate"]
    base = identities(*validated, "init=base", "beta=1", "lr=1e-3")
    assert base["align"] == identities("init=base", "beta=1", "lr=1e-3")["align"], "no SFT model is behind it"


def test_trackers_call_the_loss_on_held_out_rows_what_trl_does():
    assert [tracked_name(name) for name in ("eval_loss", "loss", "rewards/chosen")] == [
        *("eval/loss", "train/loss", "train/rewards/chosen")
    ]


def test_by_source_pairs_of_a_prompt_are_one_observation_and_count_for_their_own_table():
    def pair(prompt, source, correct):
        return {"prompt": prompt, "source": source, "correct": correct, "margin": correct, "loss": 1 - correct}

    pairs = [pair(0, "a", 1.0), pair(0, "a", 1.0), pair(1, "a", 0.0), pair(1, "b", 1.0), pair(2, "b", 0.0)]
    table = _by_source([row for row in pairs if row["prompt"] < 2], pairs, [])
    assert table["a"]["quality"] == {"value": 0.5, "se": 0.5, "n": 2}
    assert table["b"]["quality"] == {"value": 1.0, "se": None, "n": 1}, "prompt 1 is of both tables"
    accuracy = table["a"]["reward_accuracy"]
    assert accuracy["value"] == pytest.approx(2 / 3) and accuracy["n"] == 2
    apart = _by_source([], [pair(i, "a", c) for i, c in enumerate((1.0, 1.0, 0.0))], [])["a"]["reward_accuracy"]
    assert apart["value"] == accuracy["value"] and apart["se"] < accuracy["se"], "the negative control: three prompts"


TABLES = {"careful": 0.9, "hasty": 0.2}  # quality of the demonstrators
MIXTURE = "[{path: x/careful, weight: 3}, {path: x/hasty, weight: 1}]"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two methods on a mixture of two tables of generated posts, and its folder."""
    out = tmp_path_factory.mktemp("mixture")
    for number, (name, quality) in enumerate(TABLES.items()):
        for kind in ("sft", "preference"):
            (out / "data" / kind / name).mkdir(parents=True)
            for split, count in (("train", 60), ("validation", 24)):
                seed = number + 10 * (split == "train")
                if kind == "sft":
                    rows = mini_tldr.demonstrations(count, seed, quality)
                    table = [{"prompt": post.text, "completion": summary} for post, summary in rows]
                else:
                    rows = mini_tldr.preferences(count, seed + 100)
                    table = [{"prompt": post.text, "chosen": w, "rejected": lo} for post, w, lo in rows]
                text = "\n".join(map(json.dumps, table))
                (out / "data" / kind / name / f"{split}.jsonl").write_text(text)
    small = [option for option in SMALL if not option.startswith("dataset.")]
    train(
        *("-m", "method=dpo,asft", "beta=0.1", "dataset=ultrafeedback_hh", f"dataset.path={out / 'data'}", *small),
        *(f"dataset.sft.tables={MIXTURE}", f"dataset.preference.tables={MIXTURE}", "judge=none"),
        *(
            "evaluation=preference",
            "evaluation.num_prompts=8",
            "dataset.max_tokens=160",
            "dataset.max_prompt_tokens=112",
        ),
        *("evaluation.generation.max_new_tokens=8", "trainer.sft.epochs=6", "tracking=tensorboard", "sweep.name=mixed"),
        *(f"output_dir={out}", "dataset.validation_size=28", "dataset.sft_validation_size=32", "server=none"),
    )
    return out / "sweeps" / "mixed"


@pytest.mark.slow
def test_results_and_report_tell_of_every_table(swept):
    points = pd.read_csv(swept / "points.csv").set_index("method")
    assert (points.state == "done").all() and points.sft_validation_loss.nunique() == 1
    store = swept.parents[1] / "store"
    for method, identity in points.identity.items():
        result = read_json(store / "evaluate" / identity / "result.json")
        sources = result["sources"]
        assert set(sources) == set(TABLES)
        pairs = {name: sources[name]["reward_accuracy"] for name in TABLES}
        assert (pairs["careful"]["n"], pairs["hasty"]["n"]) == (21, 7), "three to one"
        for name, overall in (
            ("reward_accuracy", result["reward_accuracy"]),
            ("reward_margin", result["reward_margin"]),
            ("quality", result["splits"]["reporting"]),
        ):
            parts = [source[name] for source in sources.values() if name in source]
            assert sum(part["n"] for part in parts) == overall["n"], name
            mean = math.fsum(part["value"] * part["n"] for part in parts) / overall["n"]
            assert mean == pytest.approx(overall["value"]), name
        losses = {name: sources[name]["sft_validation_loss"] for name in TABLES}
        assert (losses["careful"]["n"], losses["hasty"]["n"]) == (24, 8)
        assert losses["careful"]["value"] < losses["hasty"]["value"], "it learned of three careful ones to a hasty one"
        total = result["sft_validation_loss"]
        assert losses["careful"]["value"] < total["value"] < losses["hasty"]["value"] and total["se"] > 0
        assert points.sft_validation_loss[method] == pytest.approx(total["value"])

    (sft,) = store.glob("sft/*/metrics.jsonl")
    last = list(read_jsonl(sft))[-1]
    assert last["eval_loss"] == pytest.approx(total["value"], rel=1e-9)
    (folder,) = (swept.parents[1] / "tensorboard" / "mixed").glob("mini_tldr_sft-*")
    (event,) = EventAccumulator(str(folder)).Reload().Scalars("eval/loss")
    assert event.value == pytest.approx(total["value"], rel=1e-6) and event.step == last["step"]

    table = pd.read_csv(swept / "tables" / "sources.csv")
    assert sorted(zip(table.Method, table.Source, strict=True)) == sorted(
        (m, s) for m in ("DPO", "ASFT") for s in TABLES
    )
    assert f"{total['value']:.3f} ± " in pd.read_csv(swept / "tables" / "sft.csv")["SFT validation loss"][0]
    report = (swept / "report.html").read_text()
    assert '<section id="sources">' in report and report.count(">hasty</td>") == 2 and "<h3>SFT models</h3>" in report
