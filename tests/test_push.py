"""`python -m sweeps.push`: a folder that transformers and datasets open, what its cards say, and its upload."""

import json
import os
from types import SimpleNamespace
from zipfile import ZipFile

import datasets
import huggingface_hub
import pytest
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data.rows import text_prompt
from src.data.templates import Template, published_chat_template
from src.store.files import write_json
from src.store.integrity import WEIGHTS_REMOVED
from src.store.lease import Lease
from tests.support.chat_model import EMBEDDED, write_chat_model
from tests.support.published import (
    METHODS,
    SAMPLES,
    SFT,
    finish,
    publish_adapters,
    publishable_sweep,
    push,
    refusal,
    write_points,
)

CONFIGS = {"points", "best", "samples", "judgements", "metrics", "validation"}


def card(folder, kind=huggingface_hub.ModelCard):
    return kind.load(folder / "README.md", ignore_metadata_errors=False)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return publishable_sweep(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def pushed(sweep):
    done = push(sweep, "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("method", METHODS)
def test_a_published_model_opens_and_continues_a_prompt_as_the_study_samples(method, sweep, pushed):
    model = AutoModelForCausalLM.from_pretrained(sweep.hub / method)
    tokenizer = AutoTokenizer.from_pretrained(sweep.hub / method)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    assert all(one.equal(other) for one, other in zip(model.parameters(), original.parameters(), strict=True))
    inputs = tokenizer(tokenizer.bos_token + "r/family POST:", add_special_tokens=False, return_tensors="pt")
    assert model.generate(**inputs).shape[1] > inputs["input_ids"].shape[1]
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.max_new_tokens) == (True, 1.0, 0, 48)


def test_every_config_of_the_data_set_opens_and_its_rows_belong_to_points(sweep, pushed, tmp_path):
    folder = str(sweep.hub / "study")
    assert set(datasets.get_dataset_config_names(folder)) == CONFIGS
    tables = {name: datasets.load_dataset(folder, name, split="train", cache_dir=str(tmp_path)) for name in CONFIGS}
    points = {row["identity"]: row for row in tables["points"]}
    assert len(points) == 6 and sum(row["selected"] for row in points.values()) == len(METHODS) == len(tables["best"])
    assert tables["samples"].num_rows == tables["judgements"].num_rows == 6 * SAMPLES
    for row in tables["samples"]:
        assert row["method"] == points[row["identity"]]["method"]
        assert row["response"] == f"{row['method']} {row['prompt_index']} ?"
    first = tables["judgements"][0]
    assert (first["judge"], first["verdict"], json.loads(first["details"])) == ("gold", 1.0, {"grade": 7})
    assert {row["split"] for row in tables["judgements"]} <= {"selection", "reporting"}
    assert tables["validation"][0]["logps"] == [-1.0, -2.0] and tables["metrics"][1]["rewards/margins"] == 0.1
    assert "sweep.json" in {os.path.basename(name) for name in ZipFile(f"{folder}/study.zip").namelist()}
    with pytest.raises(ValueError, match="not found"):
        datasets.load_dataset(folder, "prompts", cache_dir=str(tmp_path))


def test_cards_say_what_was_measured_and_under_which_license(sweep, pushed):
    for method in METHODS:
        shown = card(sweep.hub / method)
        assert shown.data.license == "apache-2.0" and method in shown.data.tags
        assert "base_model" not in shown.data.to_dict()  # the embedded one is not on the hub
        row = next(r for r in parquet.read_table(sweep.hub / "study/best.parquet").to_pylist() if r["method"] == method)
        interval = (
            f"{row['quality_reporting']:.3f} [{row['quality_reporting_low']:.3f}, {row['quality_reporting_high']:.3f}]"
        )
        values = (
            interval,
            f"| Beta | {row['beta']:g} |",
            "beta 1e-05, 0.0001, 0.001",
            "(dropped: 2 too long)",
            "0123abc",
        )
        assert all(value in shown.text for value in values), shown.text
        assert "python -m src.train -m method=dpo,nca beta=grid" in shown.text and "output_dir=" not in shown.text
        assert (sweep.hub / method / "quality_over_beta.png").read_bytes()[:4] == b"\x89PNG"
    assert {c["config_name"] for c in card(sweep.hub / "study", huggingface_hub.DatasetCard).data.configs} == CONFIGS


def test_no_file_names_a_folder_of_this_machine(sweep, pushed):
    place = os.fsencode(sweep.output_dir)
    for path in (path for path in sweep.hub.rglob("*") if path.is_file() and path.name != "study.zip"):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content = json.dumps(parquet.read_table(path).to_pylist()).encode()
        assert place not in content, path
    assert place in (sweep.output_dir / "store/evaluate/dpo-0-0-0/run_config.json").read_bytes(), "it is somewhere"


def test_the_same_sweep_gives_the_same_bytes(sweep, pushed, tmp_path):
    assert push(sweep, "--license", "apache-2.0", "--folder", tmp_path / "again").returncode == 0
    files = sorted(path.relative_to(sweep.hub) for path in sweep.hub.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert [name for name in files if (sweep.hub / name).read_bytes() != (tmp_path / "again" / name).read_bytes()] == []


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("--license=Apache 2",), "--license=Apache 2: no name of a license"),
        (("--methods", "kto"), "--methods kto: "),
        (("--base-model", "/models/x"), "--base-model: "),
        (("--folder", "tests"), "has other files"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, reason, sweep):
    assert reason in refusal(push(sweep, *arguments))


@pytest.mark.parametrize("name", ["", "missing", "x" * 300, "a\nb", "\udcff", "pipe"])
def test_a_folder_without_a_sweep_is_one_line(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    folder = SimpleNamespace(path=tmp_path / name)
    assert "no sweep.json in it" in refusal(push(folder))


def test_a_model_that_is_gone_or_damaged_is_named_with_the_command_that_remakes_it(tmp_path):
    sweep = publishable_sweep(tmp_path)
    row = next(r for r in sweep.read()["points"] if r["method"] == "nca" and r["identity"] == best_of(sweep, "nca"))
    weights = sweep.store.root / "align" / row["stages"]["align"] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + b"12345678")
    message = refusal(push(sweep))
    assert "the model of nca" in message and "damaged, its content is not what was published" in message
    weights.unlink()
    (weights.parent / WEIGHTS_REMOVED).write_text("{}")
    message = refusal(push(sweep))
    remake = f"method=nca init=sft beta={row['beta']} lr={row['lr']} seed=0 output_dir={tmp_path}"
    assert "keep_checkpoints has removed its weights" in message
    assert f"python -m src.train -m {remake}" in message and "judge.concurrency" not in message
    assert not sweep.hub.exists() and push(sweep, "--methods", "dpo").returncode == 0
    assert push(sweep, "--no-models").returncode == 0 and not (sweep.hub / "dpo").exists()


def test_a_secret_in_what_is_published_is_refused(sweep, pushed, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "a secret that no pattern knows")
    assert push(sweep).returncode == 0
    record = sweep.read()
    sweep.write(record | {"command": record["command"] + " 'tracking=a secret that no pattern knows'"})
    try:
        assert "JUDGE_API_KEY" in refusal(push(sweep))
        sweep.write(record | {"command": f"{record['command']} model.path=hf_{'a1' * 17}"})
        assert "contains a key or token" in refusal(push(sweep))
    finally:
        sweep.write(record)


def best_of(sweep, method):
    from sweeps.analysis.results import collect
    from sweeps.share.chosen import choose

    best = choose(sweep, collect([sweep]), []).best
    return best[best.method == method].identities.iloc[0][0]


def test_adapters_are_published_with_the_sft_model_that_they_belong_to(tmp_path):
    from peft import PeftModel

    sweep = publishable_sweep(tmp_path)
    publish_adapters(sweep, str(sweep.store.root / "sft" / SFT))
    assert push(sweep).returncode == 0
    shown = card(sweep.hub / "dpo")
    assert shown.data.base_model == "me/demo-sft" and shown.data.base_model_relation == "adapter"
    assert "LoRA adapters of [me/demo-sft]" in shown.text and shown.data.library_name == "peft"
    assert json.loads((sweep.hub / "dpo/adapter_config.json").read_text())["base_model_name_or_path"] == "me/demo-sft"
    base = AutoModelForCausalLM.from_pretrained(sweep.hub / "sft")
    tokenizer = AutoTokenizer.from_pretrained(sweep.hub / "dpo")
    inputs = tokenizer("r/family POST:", return_tensors="pt")
    before = base(**inputs).logits.detach().clone()
    assert not PeftModel.from_pretrained(base, sweep.hub / "dpo")(**inputs).logits.allclose(before, atol=1e-3)
    assert "SFT: 64 demonstrations" in card(sweep.hub / "sft").text


def test_adapters_of_a_local_base_model_need_its_name_on_the_hub(tmp_path):
    sweep = publishable_sweep(tmp_path)
    publish_adapters(sweep, str(EMBEDDED))
    record = sweep.read()
    for point in record["points"]:
        point["init"] = "base"
    sweep.write(record)
    write_points(sweep)
    assert "--base-model USER/NAME" in refusal(push(sweep))
    assert push(sweep, "--base-model", "org/base").returncode == 0 and not (sweep.hub / "sft").exists()
    assert card(sweep.hub / "nca").data.base_model == "org/base"
    assert AutoTokenizer.from_pretrained(sweep.hub / "nca").vocab_size == 800


def test_a_base_model_is_named_only_where_the_run_had_it_from_the_hub(tmp_path):
    sweep = publishable_sweep(tmp_path, "model.path=org/base", "model.template=chatml")  # a local folder that is gone
    assert push(sweep).returncode == 0
    assert "base_model" not in card(sweep.hub / "nca").data.to_dict()
    for point in sweep.read()["points"]:
        stage = sweep.store.root / "align" / point["stages"]["align"]
        inputs = {"model": {"path": "hub:org/base@default"}}
        write_json(stage / "stage.json", {"upstream": {"init": "sft-model"}, "inputs": inputs})
        finish(stage)
    assert push(sweep).returncode == 0
    assert card(sweep.hub / "nca").data.base_model == "org/base"


def test_a_folder_of_another_is_left_alone_and_an_old_one_stays_when_writing_fails(
    sweep, pushed, tmp_path, monkeypatch
):
    before = {path: path.stat().st_mtime_ns for path in sweep.hub.rglob("*")}

    def full(*arguments):
        raise OSError(28, "No space left on device", "weights")

    with monkeypatch.context() as patched:
        patched.setattr("sweeps.share.publish.write_data_set", full)
        assert "weights: No space left on device; --folder=" in refusal(push(sweep), 1)
    with Lease(sweep.hub.with_name(".hub.lease")):
        assert "another process is writing it" in refusal(push(sweep))
    assert {path: path.stat().st_mtime_ns for path in sweep.hub.rglob("*")} == before
    assert not list(sweep.path.glob(".hub.draft"))
    (tmp_path / "mine").write_text("x")
    assert "has other files" in refusal(push(sweep, "--folder", tmp_path)) and (tmp_path / "mine").exists()


def test_half_of_a_sweep_is_published_as_that_and_nothing_is_refused(tmp_path):
    sweep = publishable_sweep(tmp_path, seeds=2)
    for path in sweep.store.root.glob("evaluate/*-2-0-1"):
        path.rename(path.with_name(f"gone-{path.name}"))
    write_points(sweep)
    done = push(sweep)
    assert done.returncode == 0 and "10 of 12 points have results; the cards say so" in done.stderr
    assert "5 of 6 points have results" in card(sweep.hub / "dpo").text
    back = sweep.store.root / "evaluate" / "dpo-2-0-1"
    back.with_name(f"gone-{back.name}").rename(back)
    assert "python -m sweeps.aggregate" in push(sweep).stderr.splitlines()[-1]  # points.csv is without it
    for path in sweep.store.root.glob("evaluate/*"):
        path.rename(path.with_name(f"gone-{path.name}"))
    assert "no point has a result yet" in push(sweep).stderr.splitlines()[-1]


TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.mark.parametrize("system_prompt", [None, 'Be "brief".\n'])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_the_published_chat_template_writes_the_prompts_of_the_study(name, system_prompt):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    template = Template(name, tokenizer, system_prompt=system_prompt)
    prompt = text_prompt("should i move out ?")
    tokenizer.chat_template = published_chat_template(name, system_prompt)
    ids = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)["input_ids"]
    assert ids == template.prompt_ids(prompt)
    assert published_chat_template("plain") is None


def test_a_model_of_another_chat_template_ends_its_answers_where_the_study_did(tmp_path):
    model = write_chat_model(tmp_path / "model")
    sweep = publishable_sweep(tmp_path / "out", f"model.path={model}", "model.template=chatml")
    for stage in sweep.store.root.glob("align/*"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (stage / file).write_bytes((model / file).read_bytes())
        finish(stage)
    assert push(sweep).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(sweep.hub / "dpo")
    assert tokenizer.chat_template == published_chat_template("chatml")
    settings = json.loads((sweep.hub / "dpo/generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "apply_chat_template" in card(sweep.hub / "dpo").text
