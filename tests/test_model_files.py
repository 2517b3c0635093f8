"""A model is loaded whole or refused in one line that names model.path, before anything runs where files show it."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from src.errors import ConfigError, DamagedFile
from src.model.files import check_model_files
from src.model.loading import load_pretrained, load_weights
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.resources import Resources
from tests.support.commands import ROOT, run_in_process

BASE = ROOT / "src" / "data" / "mini_tldr_base"
WEIGHTS = "model.safetensors"
RESOURCES = Resources(device="cpu", max_sequence_tokens=256)


class Executed:
    def __reduce__(self):
        return print, ("EXECUTED",)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **values):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def tensors(change):
    def rewrite(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def renamed(prefix):
    return tensors(lambda weights: {prefix + name: weight for name, weight in weights.items()})


def pickled(content):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return change


def adapter(folder):
    remove("config.json")(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')


def sharded(folder):
    shutil.move(folder / WEIGHTS, folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))


def set_nan(weights):
    weights["model.norm.weight"][3] = float("nan")
    return weights


WHOLE = (BASE / WEIGHTS).read_bytes()

# Seen in the files: refused when planning, without torch.
DAMAGED_FILES = {
    "truncated": (write(WEIGHTS, WHOLE[: len(WHOLE) // 2]), "an interrupted download"),
    "empty": (write(WEIGHTS, b""), "cut off or not in the safetensors format"),
    "garbage": (write(WEIGHTS, b"garbage " * 1000), "cut off or not in the safetensors format"),
    "no header": (write(WEIGHTS, (16).to_bytes(8, "little") + b"no JSON at all!!"), "not in the safetensors format"),
    "no weights": (remove(WEIGHTS), "no weights; one of"),
    "a missing shard": (sharded, "1 of 2 files of weights are missing, the first model-00002-of-00002"),
    "empty pickle": (pickled(b""), "pytorch_model.bin is empty"),
    "no config": (remove("config.json"), "no config.json"),
    "config {}": (write("config.json", b"{}"), "config.json has no model_type"),
    "config []": (write("config.json", b"[]"), "config.json, line 1"),
    "config not JSON": (write("config.json", b'{"a":\n1,,}'), "config.json, line 2"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "tokenizer {}": (write("tokenizer.json", b"{}"), "tokenizer.json has no vocabulary"),
    "tokenizer not JSON": (write("tokenizer.json", b"nothing"), "tokenizer.json, line 1"),
    "foreign tokenizer": (edit("config.json", vocab_size=700), "ids up to 799, and the model embeds 700"),
    "DDP": (renamed("module."), "saved from inside DistributedDataParallel; strip the prefix"),
    "torch.compile": (renamed("_orig_mod."), "saved from inside torch.compile; strip the prefix"),
    "int8": (tensors(lambda w: {n: (20 * x).to(torch.int8) for n, x in w.items()}), "integers (I8) as weights"),
    "adapter": (adapter, "LoRA adapter"),
    **{
        name: (edit("config.json", model_type=name), f"model_type {name} are not supported; use one of")
        for name in ("bert", "t5", "mamba", "falcon", "nothing")
    },
}

# Seen when tensors meet the architecture.
UNLOADABLE = {
    "missing": (
        tensors(lambda w: {n: x for n, x in w.items() if "1.mlp.up" not in n}),
        "1 tensors of a Llama.*up_proj",
    ),
    "a layer more": (edit("config.json", num_hidden_layers=3), r"9 tensors of a LlamaForCausalLM are missing"),
    "untied": (edit("config.json", tie_word_embeddings=False), "missing from its files: lm_head.weight"),
    "another architecture": (edit("config.json", model_type="gpt2"), "29 tensors of a GPT2LMHeadModel are missing"),
    "vocabulary": (edit("config.json", vocab_size=900), r"embed_tokens.weight: \(800, 96\) in the file, \(900, 96\)"),
    "hidden size": (edit("config.json", hidden_size=48), "the shapes of 20 tensors do not fit its config.json"),
    "heads": (edit("config.json", num_attention_heads=5), "not a multiple of the number of attention heads"),
    "not finite": (tensors(set_nan), "1 tensors have values that are not finite: model.norm.weight"),
    "pickle": (pickled(pickle.dumps({"a": Executed()}, protocol=2)), "pickled weights hold other objects than tensors"),
}


def damaged_copy(folder, change):
    shutil.copytree(BASE, folder)
    change(folder)
    return folder


def inputs(folder):
    return ModelInputs(ContentPath.of(str(folder), "model.path"), "plain", "fp32")


@pytest.mark.parametrize("kind", DAMAGED_FILES)
def test_what_the_files_show_is_refused_in_one_line(kind, tmp_path):
    change, message = DAMAGED_FILES[kind]
    with pytest.raises(ConfigError) as refusal:
        check_model_files(str(damaged_copy(tmp_path / "model", change)))
    text = str(refusal.value)
    assert text.startswith(f"model.path={tmp_path / 'model'}: ") and message in text and "\n" not in text


@pytest.mark.parametrize("mode", [[], ["dry_run=true"], ["-m"]])
def test_commands_refuse_it_before_anything_runs(mode, tmp_path):
    folder = damaged_copy(tmp_path / "model", DAMAGED_FILES["truncated"][0])
    done = run_in_process(*mode, "tracking=none", f"model.path={folder}", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and f"model.path={folder}: " in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out" / "store").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.max_tokens=300", "has 256 positions, sequences have up to 300 tokens"),
        ("evaluation.generation.max_new_tokens=200", "has 256 positions, sequences have up to 312 tokens"),
        # A model of the hub, whose config is known without a network.
        ("model.path=meta-llama/Llama-3.2-3B dataset.max_tokens=200000", "has 131072 positions, sequences have up to"),
        ("dataset.max_tokens=256", None),  # the control: as many as there are positions
    ],
)
def test_sequences_longer_than_a_model_attends_to_are_refused_before_anything_runs(override, message, tmp_path):
    done = run_in_process("-m", "dry_run=true", *override.split(), f"output_dir={tmp_path}", "engine.gpu=null")
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("content", "suffix"), [(b"", ".gguf"), (b"x" * 100, ".gguf"), (WHOLE, ".safetensors")])
def test_a_file_that_is_no_gguf_file_is_refused(content, suffix, tmp_path):
    file = (tmp_path / "model").with_suffix(suffix)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not in the GGUF format|neither the folder of a model nor a \.gguf file"):
        check_model_files(str(file))


@pytest.mark.parametrize("kind", UNLOADABLE)
def test_a_model_that_is_not_whole_is_refused(kind, tmp_path, capfd):
    change, message = UNLOADABLE[kind]
    folder = damaged_copy(tmp_path / "model", change)
    check_model_files(str(folder))  # nothing to see in the files
    with pytest.raises(ConfigError, match=message) as refusal:
        load_weights(inputs(folder), RESOURCES)
    assert str(refusal.value).startswith(f"model.path={folder}") and "\n" not in str(refusal.value)
    assert "EXECUTED" not in capfd.readouterr().out


def test_the_whole_model_is_loaded_and_more_tensors_are_a_warning(tmp_path, caplog):
    check_model_files(str(BASE))
    load_weights(inputs(BASE), RESOURCES)
    assert not caplog.records
    extra = damaged_copy(tmp_path / "model", tensors(lambda weights: weights | {"rubbish.weight": torch.ones(3)}))
    for _ in range(2):
        load_weights(inputs(extra), RESOURCES)
    assert caplog.text.count("1 tensors that a LlamaForCausalLM does not have are ignored: rubbish.weight") == 1


def test_pickled_tensors_are_loaded(tmp_path):
    def as_pickle(folder):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        remove(WEIGHTS)(folder)

    model = load_weights(inputs(damaged_copy(tmp_path / "model", as_pickle)), RESOURCES)
    assert torch.equal(model.model.norm.weight, load_file(BASE / WEIGHTS)["model.norm.weight"])


def test_code_that_comes_with_a_model_is_never_executed(tmp_path, capfd):
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change = edit("config.json", model_type="nothing", auto_map=auto_map)
    folder = damaged_copy(tmp_path / "model", change)
    (folder / "code.py").write_text("print('EXECUTED')")
    with pytest.raises(ConfigError, match="its auto_map names code of its own, which is never executed"):
        load_weights(inputs(folder), RESOURCES)
    assert "EXECUTED" not in capfd.readouterr().out


def test_a_checkpoint_that_is_not_whole_is_a_damaged_file(tmp_path):
    folder = damaged_copy(tmp_path / "checkpoint", UNLOADABLE["missing"][0])
    with pytest.raises(DamagedFile, match=f"^{folder}: 1 tensors"):
        load_weights(inputs(BASE), RESOURCES, folder)


def test_a_reward_model_without_a_trained_head_is_refused(tmp_path):
    folder = damaged_copy(tmp_path / "model", edit("config.json", num_labels=1))
    check_model_files(str(folder), "judge.model", causal=False)
    with pytest.raises(
        ConfigError, match=r"^judge.model=x: 1 tensors of a .* are missing from its files: score.weight"
    ):
        load_pretrained(AutoModelForSequenceClassification, str(folder), "judge.model=x")
