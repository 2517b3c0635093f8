"""Rows and tokens of local files, before they are tokenized: what the dry run says against what stages read."""

import json
import math
import random
import re

import pytest

from src.config.schema import Dataset, HubTable, Point
from src.config.validation import build_point
from src.data.row_counts import MAX_BYTES_OF_LINES, count_rows
from src.data.sources import SOURCES, open_source, training_rows
from src.data.table_size import table_size
from src.data.tokenization import tokenize
from src.model.loading import load_template
from src.planning.identity import ModelInputs
from src.planning.inputs import pair_data, sft_data
from src.planning.stage import stages_of
from tests.support import tiny_llama
from tests.support.commands import dry_run
from tests.support.configs import composed

WORDS = "the a quick brown fox jumped over lazy dogs and then nobody asked whether any sentence would ever end".split()


def write_pairs(path, count, words=40, seed=0):
    rng = random.Random(seed)

    def text(number):
        return " ".join(rng.choices(WORDS, k=rng.randint(number // 2, 2 * number)))

    rows = [{"prompt": f"{i} {text(2 * words)}", "chosen": text(words), "rejected": text(words)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(point, split):
    """The number of examples of a split and their mean length, from the whole of it as stages tokenize it."""
    data = sft_data(point) if split == "sft" else pair_data(point)
    source = open_source(data)
    rows = source.pairs(split) if split == "validation" else training_rows(source, split)
    model = next(stage.inputs.model for stage in stages_of(point))
    assert isinstance(model, ModelInputs)
    lengths = [e.length for e in tokenize(rows, load_template(model), data.max_tokens, data.max_prompt_tokens).examples]
    return len(lengths), sum(lengths) / len(lengths)


@pytest.mark.parametrize("split", ["sft", "train", "validation"])
@pytest.mark.parametrize("dataset", ["mini_tldr", "jsonl", "chat", "hub"])
def test_the_estimate_is_what_the_stages_read(dataset, split, tmp_path):
    llama = f"model.path={tiny_llama.model(tmp_path / 'model')}"
    if dataset == "mini_tldr":
        overrides = ["dataset.sft_size=300", "dataset.train_size=200"]
    elif dataset == "hub":
        data = tiny_llama.ultrachat_ultrafeedback(tmp_path / "data")
        overrides = ["setup=llama31_8b_uf", llama, f"dataset.path={data}", "dataset.validation_size=8"]
    else:
        path = write_pairs(tmp_path / "pairs.jsonl", 200)
        overrides = ["setup=smollm2_jsonl", f"dataset.path={path}", llama, "dataset.max_tokens=600"]
        overrides += ["model.template=llama3"] if dataset == "chat" else ["model.template=plain"]
    point = build_point(composed(*overrides))
    rows, tokens = read(point, split)
    size = table_size(point, split)
    assert size.rows == rows
    assert size.tokens == pytest.approx(tokens, rel=0.1)  # headers of chat messages are counted alike
    assert size.responses == (1 if split == "sft" else 2)


def test_longer_rows_and_more_of_them_are_seen(tmp_path):
    def size(name, *args, **kwargs):
        path = write_pairs(tmp_path / name, *args, **kwargs)
        return table_size(build_point(composed("setup=smollm2_jsonl", f"dataset.path={path}")), "train")

    small, long, many = size("a", 50), size("b", 50, words=80), size("c", 100)
    assert many.rows == 2 * small.rows and long.tokens > 1.5 * small.tokens
    cut = build_point(composed("setup=smollm2_jsonl", f"dataset.path={tmp_path / 'b'}", "dataset.max_prompt_tokens=20"))
    assert table_size(cut, "train").prompt_tokens == 20


def test_tokens_of_a_gguf_models_vocabulary_are_its_tokenizers(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 60)
    point = build_point(composed("setup=smollm2_jsonl", f"dataset.path={path}", "model.template=plain"))
    assert table_size(point, "train").tokens == pytest.approx(read(point, "train")[1], rel=0.03)


def test_without_a_tokenizer_a_token_is_four_characters(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 60)
    point = build_point(composed("setup=smollm2_jsonl", f"dataset.path={path}", "model.path=nobody/nothing"))
    rows = SOURCES["jsonl"](pair_data(point)).pairs("train")
    characters = sum(len(row.prompt.text) + len(row.chosen) + len(row.rejected) for row in rows) / len(rows)
    assert table_size(point, "train").tokens == pytest.approx(characters / 4, rel=0.15)


def test_rows_of_files_are_counted_without_parsing_them(tmp_path):
    lines = write_pairs(tmp_path / "a.jsonl", 300)
    assert count_rows([str(lines), str(lines)]) == 600
    repeated = -(-2 * MAX_BYTES_OF_LINES // lines.stat().st_size)
    (tmp_path / "large.jsonl").write_bytes(lines.read_bytes() * repeated)
    assert count_rows([str(tmp_path / "large.jsonl")]) == pytest.approx(300 * repeated, rel=0.01)
    (tmp_path / "list.json").write_text(json.dumps([{"a": 1}] * 3))
    assert count_rows([str(tmp_path / "list.json")]) is None  # known once all of it is parsed
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    assert count_rows([str(lines), str(tmp_path / "damaged.parquet")]) is None


def test_a_table_of_the_hub_has_the_size_that_conf_states():
    point = build_point(composed("setup=llama32_3b_tldr"))
    assert (table_size(point, "train").rows, table_size(point, "train").tokens) == (73_396, 451)
    assert table_size(point, "train").prompt_tokens == 379
    assert math.isnan(table_size(build_point(composed("setup=llama32_3b_tldr", "dataset=hh_rlhf")), "train").rows)


def test_the_dry_run_shows_tokens_and_disk_of_local_models_and_files(tmp_path):
    pairs, other = write_pairs(tmp_path / "pairs.jsonl", 100), write_pairs(tmp_path / "other.jsonl", 200)
    outputs = {}
    for name, path in {"pairs": pairs, "other": other}.items():
        output = dry_run("setup=smollm2_jsonl", f"dataset.path={path}", "beta=0.1")[1]
        outputs[name] = dict(re.findall(r"^(sft|reference|align|generate) +\d+ +(\S+ \w?)", output, re.M))
        assert "-" not in outputs[name].values() and set(outputs[name]) == {"sft", "reference", "align", "generate"}
        assert "disk: 1.08 GB for the weights of 2 models" in output  # 134.5 M parameters in float32
    assert outputs["pairs"] != outputs["other"]


def test_what_is_held_out_of_a_split_and_what_where_leaves_are_counted():
    def rows(*overrides):
        tested = build_point(composed("setup=qwen25_7b_math", "judge=none", "evaluation=preference", *overrides))
        return {split: round(table_size(tested, split).rows) for split in ("sft", "train", "validation")}

    assert rows() == {"sft": 77_954, "train": 52_877, "validation": 266}  # 0.5 % of 78,346 and 53,143 rows
    assert rows("dataset.preference.held_out=0.1")["validation"] == 5_314


def test_rows_that_where_leaves_out_are_not_counted_in_a_local_copy(tmp_path):
    for name in ("sft", "preference"):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "task": "x" if n % 4 else "y"} for n in range(400)]
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {"validation_split": "train", "held_out": 0.25, "rows": {"train": 100}}
    for where, expected in (({"task": "y"}, (75, 25)), ({}, (300, 100))):
        described = HubTable("a/b", where=where, **table)
        tested = Point(dataset=Dataset("d", "hub", str(tmp_path), sft=described, preference=described))
        tested.model.path = "package://src.data/mini_tldr_base"
        assert tuple(table_size(tested, split).rows for split in ("train", "validation")) == expected
