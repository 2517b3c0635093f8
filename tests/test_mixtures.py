"""Mixtures: which rows of which table are read, what a mistake says, and what results say of each table."""

import json
import random
from dataclasses import asdict

import pytest

from src.config.schema import Dataset, HubTable, ListedTable, Point
from src.data import tokenization
from src.data.row_samples import rows_of_each
from src.data.sources import open_source, training_rows
from src.data.table_size import table_size
from src.data.tokenization import load_examples
from src.errors import ConfigError
from src.model.loading import load_template
from src.planning.content import ContentPath, hashable
from src.planning.identity import ModelInputs
from src.planning.inputs import pair_data, sft_data
from src.planning.stage import stages_of
from src.store.attempt import Attempt
from tests.support.commands import dry_run, run_in_process
from tests.support.configs import point

MINI = ModelInputs(ContentPath.of("package://src.data/mini_tldr_base", "model.path"), "plain", "fp32")
SIZES = {"small": (30, 6), "large": (90, 20)}  # training and held-out rows


def test_a_mixture_is_in_proportion_to_its_weights_and_no_row_is_taken_twice():
    rng = random.Random(0)
    for _ in range(60):
        available = [rng.randint(0, 60) for _ in range(rng.randint(2, 4))]
        weights = [rng.choice([0.1, 0.5, 1, 2, 7]) for _ in available]
        whole = rows_of_each(available, weights, None)
        before = [0] * len(available)
        for size in range(sum(whole) + 3):
            counts = rows_of_each(available, weights, size)
            assert sum(counts) == min(size, sum(whole)) and all(map(int.__le__, counts, available))
            assert all(map(int.__le__, before, counts)), "a smaller mixture is part of a larger one"
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - weight / sum(weights) * sum(counts)) < len(available) / 2
            before = counts
        # It ends because a table has no more, not before.
        assert any(count == rows for count, rows in zip(whole, available, strict=True))


def test_tables_without_weights_are_read_whole_and_sampled_evenly():
    assert rows_of_each([30, 90], [None, None], None) == [30, 90]
    assert rows_of_each([30, 90], [None, None], 40) == [10, 30]
    assert rows_of_each([30, 90], [1, 1], None) == [30, 30], "the negative control: weights do not take all"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Local copies of two tables for each of sft and preference; every response names its table."""
    folder = tmp_path_factory.mktemp("copy")
    for kind in ("sft", "preference"):
        for name, sizes in SIZES.items():
            (folder / kind / name).mkdir(parents=True)
            for split, count in zip(("train", "test"), sizes, strict=True):
                rows = [
                    {"prompt": f"{split} {name} {n}", "chosen": f"a {name} {n}", "rejected": f"b {n}"}
                    for n in range(count)
                ]
                (folder / kind / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def tables(small=(), large=()):
    common = {"validation_split": "test"}
    return [
        ListedTable("x/small", **(common | dict(small))),
        ListedTable("x/y", name="large", **(common | dict(large))),
    ]


def mixed(copy, small=(), large=(), **settings):
    table = HubTable(tables=tables(small, large))
    point = Point(dataset=Dataset("d", "hub", str(copy), sft=table, preference=table, **settings))
    point.model.path, point.model.template = MINI.path.location, "plain"
    return point


def sources(rows):
    return {name: sum(row.prompt.source == name for row in rows) for name in SIZES}


@pytest.mark.parametrize(
    ("small", "large", "train_size", "trained", "held_out"),
    [
        ({}, {}, None, (30, 90), (6, 20)),
        ({}, {}, 40, (10, 30), (6, 20)),
        ({"size": 12}, {"size": 5}, None, (12, 5), (6, 20)),
        ({"weight": 1}, {"weight": 2}, None, (30, 60), (6, 12)),
        ({"weight": 3}, {"weight": 1}, 20, (15, 5), (6, 2)),
        ({"validation_split": None}, {}, None, (30, 90), (0, 20)),
    ],
)
def test_rows_of_each_table_are_those_that_weights_and_sizes_name(copy, small, large, train_size, trained, held_out):
    point = mixed(copy, small, large, train_size=train_size, sft_size=train_size, sft_validation_size=None)
    pairs, demonstrations = open_source(pair_data(point)), open_source(sft_data(point))
    rows = pairs.pairs("train")
    assert tuple(sources(rows).values()) == trained and len({row.chosen for row in rows}) == sum(trained)
    assert all(row.prompt.source in row.chosen for row in rows), "a row has the name of its own table"
    assert tuple(sources(pairs.pairs("validation")).values()) == held_out
    assert tuple(sources(demonstrations.demonstrations()).values()) == trained
    assert tuple(sources(demonstrations.held_out_demonstrations()).values()) == held_out
    assert {prompt.source for prompt in pairs.prompts(99)} == {n for n, count in sources(rows).items() if count} - (
        {"small"} if not held_out[0] else set()
    )
    for split, count in {"train": trained, "sft": trained, "validation": held_out}.items():
        size = table_size(point, split)
        assert size.rows == sum(count) and size.tokens > 0


def test_the_first_prompts_of_evaluation_are_in_proportion(copy):
    def first(count, small=(), large=()):
        prompts = open_source(pair_data(mixed(copy, small, large))).prompts(count)
        return [sum(prompt.source == name for prompt in prompts) for name in SIZES]

    for count in range(2, 26):
        small, large = first(count)
        assert small + large == count and abs(small - count * 6 / 26) <= 0.5, "as many as there are rows of each"
    assert first(9, {"weight": 2}, {"weight": 1}) == [6, 3] and first(6, {"weight": 2}, {"weight": 1}) == [4, 2]
    alone = open_source(pair_data(mixed(copy, large={"validation_split": None}))).prompts(3)
    assert [prompt.text for prompt in alone] == [f"test small {n}" for n in range(3)], "of one table in its order"


def test_a_mixture_of_billions_of_rows_is_counted_without_looking_at_each():
    assert rows_of_each([10**9, 3 * 10**9], [None, None], 10**9) == [25 * 10**7, 75 * 10**7]
    assert rows_of_each([10**9, 10**12], [2, 1], None) == [10**9, 5 * 10**8]
    assert rows_of_each([10**9, 10**12], [1, 2], 4) == [1, 3], "the negative control: of few rows"


def test_another_seed_takes_other_rows_in_the_same_proportion(copy):
    one, two = (open_source(pair_data(mixed(copy, train_size=40, seed=seed))).pairs("train") for seed in (0, 1))
    assert sources(one) == sources(two) and {r.chosen for r in one} != {r.chosen for r in two}


def test_a_mixture_of_one_table_reads_what_the_table_alone_does(copy):
    alone = Dataset("d", "hub", str(copy / "alone"), sft=HubTable("x/y"), preference=HubTable("x/y"), train_size=7)
    listed = HubTable(tables=[ListedTable("x/large", validation_split="test")])
    (copy / "alone").mkdir()
    (copy / "alone" / "preference").symlink_to(copy / "preference" / "large")
    mixture = Dataset("d", "hub", str(copy), sft=listed, preference=listed, train_size=7)
    rows, others = (open_source(pair_data(Point(dataset=d))).pairs("train") for d in (alone, mixture))
    assert rows == others and {row.prompt.source for row in others} == {"large"}


class Counted:
    """A template that counts the prompts that are tokenized."""

    def __init__(self):
        self.template, self.prompts = load_template(MINI), 0

    def __getattr__(self, name):
        self.prompts += name in ("prompt_ids", "turns")
        return getattr(self.template, name)


def test_rows_of_a_mixture_that_no_step_reads_are_not_tokenized(copy, tmp_path):
    def load(max_steps):
        point, template = mixed(copy, {"weight": 1}, {"weight": 1}), Counted()
        point.trainer.align.max_steps, point.trainer.align.batch_size = max_steps, 4
        attempt = Attempt(tmp_path, tmp_path, None, lambda *_: None, "label", "identity", tmp_path / "out")
        examples = list(load_examples(pair_data(point), MINI, "train", template, attempt, {}).examples)
        tokenization._cache.clear()
        again = load_examples(pair_data(point), MINI, "train", template, attempt, {}).examples
        assert [e.source for e in again] == [e.source for e in examples], "read from the cache"
        return examples, template.prompts

    few, num_tokenized = load(4)
    assert len(few) == num_tokenized == 16
    assert {example.source for example in few} == {"small", "large"}
    more, num_tokenized = load(None)  # the negative control
    assert len(more) == num_tokenized == 60 and set(few) < set(more)
    assert [r.prompt.source for r in training_rows(open_source(pair_data(mixed(copy))), "train")].count("small") == 30


LIST = "dataset.preference.tables="


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{LIST}[{{path: a/b, weight: 1}}, {{path: c/d}}]"],
            "tables.1.weight: give every table of a mixture a weight",
        ),
        ([f"{LIST}[{{path: a/b, weight: 0}}]"], "dataset.preference.tables.0.weight=0: must be > 0"),
        ([f"{LIST}[{{path: a/b, weight: -1}}]"], "dataset.preference.tables.0.weight=-1: must be > 0"),
        ([f"{LIST}[{{path: a/b, weight: x}}]"], "dataset.preference.tables=[{path: a/b, weight: x}]: "),
        ([f"{LIST}[{{path: a/b, wait: 1}}]"], "dataset.preference.tables=[{path: a/b, wait: 1}]: "),
        ([f"{LIST}[{{path: a/b}}, {{path: a/b, name: c}}]"], "has a/b (split train) 2 times; list a table once"),
        ([f"{LIST}[{{path: a/b}}, {{path: c/b}}]"], "2 tables are called b: give each a name of its own, name=NAME"),
        ([f"{LIST}[{{path: a/b, name: ../b}}]"], "dataset.preference.tables.0.name=../b: becomes a folder name"),
        ([f"{LIST}[{{path: a/b, rows: {{train: 9}}, size: 10}}]"], "tables.0.size=10: the table has 9 rows"),
        ([f"{LIST}[{{path: a/b, validation_split: null}}]"], "validation_split=null: rows are held out of no table"),
        ([f"{LIST}[{{weight: 1}}]"], "path has no value: add dataset.preference.tables[0].path=VALUE"),
        (["dataset.preference.path=c/d"], "dataset.preference.path: beside dataset.preference.tables"),
        (["dataset.preference.deduplicate=true"], "dataset.preference.deduplicate: beside dataset.preference.tables"),
        (["dataset.preference.tokens=9"], "nothing reads it: set dataset.preference.tables.0.tokens"),
        (["dataset.sft.path="], "dataset.sft.path has no value: add dataset.sft.path=VALUE"),
        (["dataset.sft.validation_split=null"], "of no table, or dataset.sft_validation_size=0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides, message):
    dataset = [] if overrides[0].startswith("dataset.sft.") else ["dataset=ultrafeedback_hh"]
    done = run_in_process("setup=llama31_8b_uf", "method=dpo", *dataset, *overrides, "dry_run=true")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_mistakes_of_a_local_copy_are_found_before_anything_runs(copy, tmp_path):
    def run(*listed, path=copy):
        mixture = [f"{LIST.replace('preference', kind)}[{', '.join(listed)}]" for kind in ("sft", "preference")]
        return run_in_process(
            *("setup=smollm2_jsonl", "model=mini", "dataset=ultrafeedback_hh", "dataset.validation_size=8", *mixture),
            *(f"dataset.path={path}", f"output_dir={tmp_path}", "method=dpo"),
        )

    small, large = "{path: x/small, validation_split: test", "{path: x/large, validation_split: test"
    for listed, message in (
        ([f"{small}, size: 31}}", large + "}"], "tables.0.size=31: "),
        ([f"{small}, columns: {{chosen: best}}}}", large + "}"], "small/train, row 0: no column 'best' for chosen"),
        ([small + "}", f"{large}, columns: {{chosen: best}}}}"], "large/train, row 0: no column 'best' for chosen"),
        ([small + "}", "{path: x/other}"], "missing folder sft/other"),
        ([small + "}", "{path: x/large}"], "split validation"),
    ):
        done = run(*listed)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("store/*"))


def test_a_size_that_filters_leave_too_few_rows_for_is_refused_where_rows_are_read(copy):
    listed = tables({"size": 30, "deduplicate": True})
    folder = copy / "preference" / "small" / "train.jsonl"
    rows = folder.read_text().splitlines()
    point = Point(dataset=Dataset("d", "hub", str(copy), sft=HubTable("x/y"), preference=HubTable(tables=listed)))
    assert len(open_source(pair_data(point)).pairs("train")) == 120
    folder.write_text("\n".join([*rows[:-1], rows[0]]))
    try:
        with pytest.raises(ConfigError, match=r"tables.0.size=30: .*small/train has 29 rows"):
            open_source(pair_data(point)).pairs("train")
    finally:
        folder.write_text("\n".join(rows))


def identity(*listed, sft=()):
    table = HubTable(tables=[ListedTable(**fields) for fields in listed])
    uf = point("setup=llama31_8b_uf", "method=dpo")
    uf.dataset.preference = table
    return {stage.kind: stage.identity for stage in stages_of(uf)}


def test_what_a_mixture_is_made_of_is_in_the_identity_and_what_is_known_of_it_is_not():
    small, large = {"path": "a/small", "weight": 1.0}, {"path": "a/large", "weight": 2.0}
    same = identity(small, large)
    assert identity(small | {"rows": {"train": 9}, "tokens": 5.0, "name": "small"}, large) == same
    for other in (
        [small, large | {"weight": 3.0}],
        [small, large | {"size": 3}],
        [small | {"name": "c"}, large],
        [small | {"deduplicate": True}, large],
        [large, small],
        [small],
    ):
        changed = identity(*other)
        assert changed["sft"] == same["sft"] and changed["reference"] != same["reference"], other


def test_one_table_is_hashed_as_before_mixtures_were():
    data = hashable(pair_data(point("setup=llama31_8b_uf")))
    assert "sft_validation_size" not in data and set(data["preference"]) == {
        *("path", "train_split", "validation_split", "columns", "adapter", "deduplicate", "drop_if_rejected_elsewhere")
    }


def test_the_dry_run_counts_rows_and_tokens_of_every_table(copy, tmp_path):
    listed = [json.dumps({**asdict(t), "columns": {}, "rows": {}}).replace('"', "") for t in tables()]
    mixture = [f"{LIST.replace('preference', kind)}[{', '.join(listed)}]" for kind in ("sft", "preference")]
    output = dry_run(
        *("setup=smollm2_jsonl", "model=mini", "dataset=ultrafeedback_hh", "dataset.sft_validation_size=0", *mixture),
        *("beta=0.1", "method=dpo", f"dataset.path={copy}", f"output_dir={tmp_path}", "model.template=plain"),
        *("dataset.max_tokens=160", "dataset.max_prompt_tokens=112"),
    )[1]
    point = mixed(copy, max_tokens=160, max_prompt_tokens=112)
    size = table_size(point, "sft")
    (tokens,) = [line.split()[2:4] for line in output.splitlines() if line.startswith("sft  ")][-1:]
    assert size.rows == 120 and 0.9 < float(tokens[0]) * {"k": 1000}.get(tokens[1], 1) / (120 * size.tokens) < 1.1
