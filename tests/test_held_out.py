"""Validation pairs are of prompts that are not trained on, of two at least, and a tie on one is half a point."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from src.config.schema import Dataset, HubTable, Point
from src.data.held_out import check_held_out, count_leaks
from src.data.rows import Demonstration, Pair, Prompt, text_prompt
from src.data.sources import JsonLines, open_source
from src.data.templates import Template
from src.data.tokenization import TokenizedDataset, tokenize
from src.errors import StageError
from src.planning.inputs import pair_data
from src.planning.resources import Resources, resources_of
from src.stages import align
from src.store.attempt import Attempt
from tests.support import tiny_llama
from tests.support.commands import run_in_process
from tests.support.configs import point, stage_of
from tests.support.padded import padded_logps
from tests.support.small_models import make_model, random_pairs

END = "the cat sat and " * 9  # of a prompt: all that remains of it where it is cut


@pytest.fixture(scope="module")
def llama3() -> Template:
    return Template("llama3", tiny_llama.tokenizer())


def pairs(template, *rows, limits=(1000, 500)):
    return tokenize([Pair(text_prompt(p), w, lo) for p, w, lo in rows], template, *limits)


def write(path, prompts):
    rows = [{"prompt": p, "chosen": f"a{i}", "rejected": "b"} for i, p in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def jsonl(path, **sizes) -> JsonLines:
    return JsonLines(pair_data(Point(dataset=Dataset("d", "jsonl", str(path), **sizes))))


def test_prompts_that_differ_in_blanks_around_them_are_never_split_apart(tmp_path):
    prompts = [f"{blank}p{i}{end}" for i in range(20) for blank, end in (("", ""), ("", " "), ("\n", "\t"))]
    source = jsonl(write(tmp_path / "pairs.jsonl", prompts), validation_size=10)
    train, validation = ({p.prompt.text for p in source.pairs(s)} for s in ("train", "validation"))
    assert not {p.strip() for p in train} & {p.strip() for p in validation} and len(validation) == 12
    assert len(source.prompts(99)) == 4  # and no prompt of them is sampled for, or judged, twice
    # The split of other prompts is the one it always was.
    same = jsonl(write(tmp_path / "same.jsonl", [f"p{i % 30}" for i in range(60)]), validation_size=7)
    order = [p.prompt.text for p in same.pairs("validation")]
    assert order == ["p3", "p3", "p10", "p10", "p18", "p18", "p17", "p17"]


def test_leaks_are_counted_on_what_the_model_reads(llama3):
    train = pairs(llama3, ("why", "a", "b"), ("how ", "a", "b"), ("x " * 99 + END, "a", "b"))
    held_out = pairs(llama3, (" why", "a", "b"), ("how", "a", "c"), ("y " * 99 + END, "a", "b"), ("is", "a", "b"))
    assert count_leaks(train.examples, held_out.examples, 500) == (2, 1)
    limits = (90, 40)
    train = pairs(llama3, ("x " * 99 + END, "a", "b"), limits=limits)
    held_out = pairs(llama3, ("y " * 99 + END, "a", "b"), ("is", "a", "b"), limits=limits)
    assert count_leaks(train.examples, held_out.examples, 40) == (1, 1)


def test_a_later_turn_of_a_demonstration_leaks_its_prompt(llama3):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"t{i}"} for i in range(5)]
    demonstrations = tokenize([Demonstration(Prompt(tuple(turns)), "bye")], llama3, 400, 200)
    for count in (1, 3, 5):
        held_out = tokenize([Pair(Prompt(tuple(turns[:count])), "a", "b")], llama3, 400, 200)
        assert count_leaks(demonstrations.examples, held_out.examples, 200) == (1, 0), count
    assert count_leaks(demonstrations.examples, pairs(llama3, ("t2", "a", "b")).examples, 200) == (0, 0)


def test_leaks_are_one_warning_and_two_equal_tables_are_all_leaks(llama3, tmp_path, caplog):
    for name in ("sft", "preference"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            write(tmp_path / name / f"{split}.jsonl", [f"p{i}" for i in range(8)])
    table = HubTable("x/y")
    data = pair_data(Point(dataset=Dataset("d", "hub", str(tmp_path), sft=table, preference=table)))
    train, held_out = (
        tokenize(open_source(data).pairs(split), llama3, 400, 200).examples for split in ("train", "validation")
    )
    with caplog.at_level(logging.WARNING, "src"):
        assert check_held_out(data, train, held_out, 2, "training pairs") == (8, 8)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"dataset.path={tmp_path}: 8 of 8 validation pairs have a prompt that is among"
    )
    caplog.clear()
    other = pairs(llama3, ("q1", "a", "b"), ("q2", "a", "b")).examples
    assert check_held_out(data, train, other, 2, "training pairs") == (0, 0) and not caplog.records


def test_one_prompt_after_truncation_is_refused_before_training_where_halves_are_needed(llama3):
    data = pair_data(point())
    one = pairs(llama3, ("x " * 99 + END, "a", "b"), ("y " * 99 + END, "b", "a"), limits=(90, 40)).examples
    two = pairs(llama3, ("x", "a", "b"), ("y", "b", "a"), limits=(90, 40)).examples
    assert check_held_out(data, two, one, 1, "rows") == (0, 0)
    with pytest.raises(StageError, match=r"1 distinct prompt in 2 validation pairs .* at least 2: raise dataset\."):
        check_held_out(data, two, one, 2, "rows")


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ((), 1),  # mini TL;DR has prompts of its own
        (("evaluation.metric=reward_accuracy",), 2),
        (("dataset=tldr", "judge=none", "evaluation=preference"), 2),
    ],
)
def test_halves_of_validation_prompts_are_needed_where_points_are_compared_by_them(overrides, needed):
    config = point(*overrides)
    assert resources_of(config, pair_data(config)).min_validation_prompts == needed


def test_a_file_whose_validation_pairs_have_one_prompt_is_refused_before_anything_runs(tmp_path):
    short = ("dataset.max_tokens=96", "dataset.max_prompt_tokens=48", "evaluation.generation.max_new_tokens=48")
    for end, code in (("", 2), ("q", 0)):
        prompts = ["p", "p ", "p", "p", "p", "p", "p", *(f"{end and i}{'q' * (not end)}" for i in range(7))]
        path = write(tmp_path / "pairs.jsonl", prompts)
        options = ("judge=none", "evaluation=preference", "dataset.validation_size=2", "dataset.seed=1", "dry_run=true")
        output_dir = f"output_dir={tmp_path / 'out'}"
        done = run_in_process("dataset=jsonl", f"dataset.path={path}", *options, *short, output_dir)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert code == 0 or ("validation pairs have the same prompt" in done.stderr and done.stderr.count("\n") == 1)


def test_pairs_of_equal_tokens_are_dropped_and_counted(llama3):
    same_start = "the cat sat " * 30
    rows = [("p", "a", "a"), ("p", same_start + "a", same_start + "b"), ("p", "a", "b"), ("p", "", "")]
    data = pairs(llama3, *rows, limits=(60, 20))
    assert data.counts.dropped == {"chosen equals rejected": 2, "no supervised token": 1} and len(data.examples) == 1
    data = pairs(llama3, *rows)
    assert data.counts.dropped == {"chosen equals rejected": 1, "no supervised token": 1} and len(data.examples) == 2


@pytest.mark.parametrize("method", ["dpo", "simpo", "orpo"])
def test_a_tie_is_half_a_point_however_it_is_rounded(method, tmp_path):
    """Compare a policy with itself, computed in another way: what differs is rounding. Equal responses tie, too."""
    inputs = stage_of("align", f"method={method}", "beta=0.1").inputs
    assert isinstance(inputs, align.AlignInputs)
    examples, needs_reference = random_pairs(8, seed=1), method == "dpo"
    if not needs_reference:
        examples = [replace(e, responses=(e.responses[0], e.responses[0])) for e in examples]

    def validate(reference_seed):
        attempt = Attempt(tmp_path, tmp_path, None, lambda *_: None, "label", "identity", tmp_path)
        data = TokenizedDataset.__new__(TokenizedDataset)
        data.examples = examples
        with torch.no_grad():
            logps = padded_logps(make_model(seed=reference_seed, patched=False), examples).view(-1, 2)
        resources = Resources(device="cpu", attention="sdpa", max_tokens_per_micro_batch=4000)
        return align._validate(inputs, resources, make_model(), data, logps if needs_reference else None, attempt)

    lines = validate(reference_seed=0)
    assert {line["correct"] for line in lines} == {0.5}
    if needs_reference:
        assert any(line["margin"] > 0 for line in lines)  # which is noise, and was counted as right
        other = validate(reference_seed=2)
        assert {line["correct"] for line in other} == {0.0, 1.0}
        assert all(line["correct"] == (line["margin"] > 0) for line in other)
