"""Where max_steps bounds training, the rows that its steps read are tokenized and scored, and no others."""

import json
import math
import random

import pytest

from src.config.schema import Dataset, HubTable, Point, Training
from src.data import tokenization
from src.data.sources import JsonLines, open_source, training_rows
from src.data.tokenization import load_examples
from src.model.loading import load_template
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.inputs import max_examples, pair_data, sft_data
from src.planning.plan import make_plan
from src.stages import reference
from src.stages.runner import compute_or_wait
from src.store.attempt import Attempt
from src.store.files import read_json, read_jsonl
from src.store.store import Store
from src.training.lr_schedule import total_steps
from tests.support.configs import TINY, identities, point

NO_ROWS_TO_LEARN_FROM = 3  # of ten: their responses are equal
MINI = ModelInputs(ContentPath.of("package://src.data/mini_tldr_base", "model.path"), "plain", "fp32")


@pytest.fixture(scope="module")
def mini():
    return load_template(MINI)


def test_as_many_examples_are_read_as_max_steps_steps_take_and_not_one_more():
    rng = random.Random(0)
    for _ in range(2000):
        epochs = rng.choice([1.0, 2.0, 1.5, 0.1, 0.3, 0.7, 1 / 3, 1e-6, rng.uniform(0.01, 3)])
        trainer = Training(lr=1.0, epochs=epochs, max_steps=rng.randint(1, 500), batch_size=rng.randint(1, 300))
        count = max_examples(trainer, None)
        assert count is not None and total_steps(count, trainer) == trainer.max_steps
        if epochs >= 1:
            assert count == trainer.max_steps * trainer.batch_size
        else:
            assert math.floor((count - 2) * epochs / trainer.batch_size) < trainer.max_steps, "one for rounding"


@pytest.mark.parametrize(
    ("max_steps", "epochs", "num_rows"),
    [(None, 1.0, None), (8, 1.0, 64), (8, 1.0, 9), (8, 0.5, 128), (1, 1e-300, None)],
)
def test_max_steps_that_do_not_bound_what_is_read_change_nothing(max_steps, epochs, num_rows):
    trainer = Training(lr=1.0, epochs=epochs, max_steps=max_steps, batch_size=8)
    assert max_examples(trainer, num_rows) is None


def rows(count):
    """Numbered rows; from some of them nothing can be learned."""
    for n in range(count):
        chosen = "the same" if n % 10 < NO_ROWS_TO_LEARN_FROM else f"a{n}"
        yield {"prompt": f"p{n}", "chosen": chosen, "rejected": "the same", "completion": f"c{n}"}


@pytest.fixture(params=["mini_tldr", "jsonl", "hub"])
def dataset(request, tmp_path):
    for name in ("sft", "preference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows(300))))
    where = {"jsonl": tmp_path / "sft" / "train.jsonl", "hub": tmp_path}.get(request.param)
    table = HubTable("x/y", validation_split="train") if request.param == "hub" else None
    return Dataset("d", request.param, where and str(where), sft=table, preference=table, validation_size=20)


class Counted:
    """A template that counts the prompts that are tokenized."""

    def __init__(self, template):
        self.template, self.prompts = template, 0

    def __getattr__(self, name):
        if name in ("prompt_ids", "turns"):
            self.prompts += 1
        return getattr(self.template, name)


def load(tmp_path, dataset, split, max_steps, template):
    point = Point(dataset=dataset)
    for name in ("sft", "align"):
        settings = getattr(point.trainer, name)
        settings.max_steps, settings.batch_size = max_steps, 8
    data = (sft_data if split == "sft" else pair_data)(point)
    tokenization._cache.clear()
    attempt = Attempt(tmp_path, tmp_path, None, lambda *_: None, "label", "identity", tmp_path / "out")
    return list(load_examples(data, MINI, split, template, attempt, {}).examples)


@pytest.mark.parametrize("split", ["sft", "train"])
def test_training_has_max_steps_times_batch_size_examples_and_no_other_row_is_tokenized(split, dataset, tmp_path, mini):
    template = Counted(mini)
    examples = load(tmp_path, dataset, split, 4, template)
    assert len(set(examples)) == 32, "rows that are dropped are made up for"
    assert template.prompts <= 32 if dataset.source == "mini_tldr" or split == "sft" else 32 < template.prompts < 80
    more = load(tmp_path, dataset, split, 7, mini)
    assert more[:32] == examples, "fewer steps read a part of what more steps read"
    # The negative control: without max_steps all rows are tokenized.
    template = Counted(mini)
    everything = load(tmp_path, dataset, split, None, template)
    assert template.prompts >= 280 and set(more) < set(everything)
    assert everything[:32] != examples, "a random sample, not the first rows"


def test_smaller_fractions_of_the_demonstrations_read_rows_of_larger_ones(dataset, tmp_path, mini):
    def read(fraction):
        changed = Dataset(**{**vars(dataset), "sft_fraction": fraction})
        return load(tmp_path, changed, "sft", 3, mini)

    everything = read(1.0)
    assert len(everything) == 24 and read(0.5) == everything
    few = read(0.03)
    assert few == everything[: len(few)] and (len(few) < 24 or dataset.source == "mini_tldr")


def test_rows_of_a_table_that_no_step_reads_are_not_even_parsed(tmp_path, mini, monkeypatch):
    for name in ("sft", "preference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows(300))))
    table = HubTable("x/y", validation_split="train")
    dataset = Dataset("d", "hub", str(tmp_path), sft=table, preference=table, validation_size=20)
    point = Point(dataset=dataset)
    point.trainer.align.max_steps, point.trainer.align.batch_size = 1, 8
    source = open_source(pair_data(point))
    parsed = []
    parse = source._parse
    monkeypatch.setattr(source, "_parse", lambda *a: parsed.append(a) or parse(*a))
    lazily = training_rows(source, "train")
    assert len(lazily) == 300 and not parsed
    assert lazily[5].prompt == list(lazily[:6])[5].prompt and len(parsed) == 7


@pytest.mark.parametrize(("num_rows", "validation"), [(12, 2), (100, 10), (2_560, 256), (6_000, 256)])
def test_a_file_s_validation_pairs_are_a_tenth_of_it_and_at_most_256(num_rows, validation, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(num_rows))))
    source = JsonLines(pair_data(Point(dataset=Dataset("d", "jsonl", str(path)))))
    assert len(source.pairs("validation")) == validation
    assert len(source.pairs("train")) == num_rows - validation


def test_points_of_a_grid_share_what_max_steps_bounds():
    bounded = ["trainer.align.max_steps=10"]
    one = identities(*bounded)
    for other in (["beta=0.3"], ["lr=2e-4"], ["method=ipo"], ["trainer.align.stop_fraction=0.5"]):
        two = identities(*bounded, *other)
        assert two["reference"] == one["reference"] and two["align"] != one["align"], other
    assert identities("trainer.align.max_steps=20")["baseline"] == one["baseline"]
    assert identities("trainer.align.max_steps=20")["reference"] != one["reference"]


def test_reference_log_probs_are_those_of_the_pairs_that_steps_read(tmp_path):
    from src.model.loading import set_cpu_threads

    plan = make_plan([point(*TINY, "trainer.align.max_steps=2", f"output_dir={tmp_path}")], Store(tmp_path))
    store, folders = Store(tmp_path), {}
    set_cpu_threads(1)
    for stage in plan.stages.values():
        if stage.kind in ("sft", "reference", "align"):
            folders[stage.kind] = compute_or_wait(stage, store)
    logps = reference.read(folders["reference"])
    assert [len(logps[split]) for split in ("train", "validation")] == [2 * 8, 8]
    assert len(list(read_jsonl(folders["align"] / "metrics.jsonl"))) == 2
    assert read_json(folders["align"] / "data.json")["pairs"] == 16
    for kind, folder in folders.items():
        done = read_json(folder / "DONE")
        assert 0 < done["loading_seconds"] < done["seconds"], kind
        assert (done["alone_seconds"] > 0) == (kind != "reference"), kind
