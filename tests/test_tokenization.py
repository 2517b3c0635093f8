"""The boundary of prompt and response, truncation, dropped rows, and the token cache."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from src.config.schema import Dataset, HubTable, Point
from src.data import mini_tldr, tokenization
from src.data.rows import Pair, Prompt, parse_pair, text_prompt
from src.data.sources import JsonLines, MiniTldr, open_source, training_rows
from src.data.templates import Template
from src.data.tokenization import TokenizedDataset, load_examples, tokenize
from src.model.loading import load_template
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.inputs import pair_data, sft_data
from src.store.attempt import Attempt
from tests.support.small_models import smollm2_template

MINI = ModelInputs(ContentPath.of("package://src.data/mini_tldr_base", "model.path"), "plain", "fp32")


@pytest.fixture(scope="module")
def mini() -> Template:
    return load_template(MINI)


def pairs_of(dataset: Dataset):
    return pair_data(Point(dataset=dataset))


def pairs(rows: list[tuple[str, str, str]], template: Template, *limits: int) -> TokenizedDataset:
    return tokenize([Pair(text_prompt(p), w, lo) for p, w, lo in rows], template, *(limits or (160, 112)))


def test_prompt_and_response_are_tokenized_apart_and_the_end_is_supervised(mini):
    data = pairs([("r/work POST: the boss", "someone lost 50 dollars .", "someone")], mini)
    (example,) = data.examples
    assert example.prompt == tuple(mini.prompt_ids(text_prompt("r/work POST: the boss")))
    assert example.prompt[0] == mini.tokenizer.bos_token_id
    assert all(r[-1] == mini.end_id for r in example.responses)
    assert [mini.text(list(r)) for r in example.responses] == ["someone lost 50 dollars .", "someone"]
    # The boundary: the same prompt before any response, however the two would merge if tokenized together.
    rows = [("so we were in bos", response, "x") for response in ("ton on monday", "someone")]
    assert len({e.prompt for e in pairs(rows, mini).examples}) == 1


def test_chat_template_marks_the_turns_and_ends_with_the_end_token_once():
    template = smollm2_template()
    messages = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    )
    text = template.tokenizer.decode(template.prompt_ids(Prompt(messages)))
    assert text.count("<|im_start|>") == 5  # system, three turns, and the header of the answer; no second begin token
    assert text.endswith("<|im_start|>assistant\n")
    response = template.response_ids("Good bye.")
    assert response.count(template.end_id) == 1 and response[-1] == template.end_id
    assert template.text(response) == "Good bye."


def test_over_long_prompts_keep_their_end_and_responses_are_cut_on_the_right(mini):
    prompt, response = "a b c d e f g h i j k l m n o p", "one two three four five six seven eight nine ten"
    full = pairs([(prompt, response, "x")], mini).examples[0]
    cut = pairs([(prompt, response, "x")], mini, 14, 6).examples[0]
    assert cut.prompt == full.prompt[-6:]
    assert cut.responses[0] == full.responses[0][:8]
    assert cut.responses[0][-1] != mini.end_id  # the end was cut away with the rest, not moved
    assert cut.responses[1] == full.responses[1]


def test_rows_without_a_supervised_token_are_dropped_and_counted(mini):
    data = pairs([("a", "b", "c"), ("a", "", "c"), ("a", "b", "  ")], mini)
    assert len(data.examples) == 1 and data.counts.dropped == {"no supervised token": 2}


CONVERSATION = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}, {"from": "human", "value": "Bye"}]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, 1),
        ({"prompt": [{"role": "user", "content": "Hi"}], "chosen": "A", "rejected": "B"}, 1),
        (
            {
                "conversations": CONVERSATION,
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            3,
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "B"}],
            },
            1,
        ),
    ],
)
def test_every_public_layout_of_a_pair_reads_the_same(row, turns):
    pair = parse_pair(row, "here")
    assert (pair.chosen, pair.rejected, len(pair.prompt.messages)) == ("A", "B", turns)
    assert pair.prompt.messages[-1]["role"] == "user"


def test_json_lines_are_split_once_and_never_overlap(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(50)))
    source = JsonLines(pairs_of(Dataset(path=str(path), validation_size=10, train_size=30)))
    train, validation = ({p.prompt.text for p in source.pairs(s)} for s in ("train", "validation"))
    assert (len(train), len(validation)) == (30, 10) and not train & validation
    assert {p.text for p in source.prompts(99)} == validation
    assert [d.prompt for d in source.demonstrations()] == [p.prompt for p in source.pairs("train")]


def test_pairs_of_one_prompt_stay_on_one_side_of_the_split(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i % 12}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines(pairs_of(Dataset(path=str(path), validation_size=7)))
    train, validation = ({p.prompt.text for p in source.pairs(s)} for s in ("train", "validation"))
    assert not train & validation and len(validation) == 2 and len(source.pairs("validation")) == 10


@pytest.mark.parametrize("source", ["mini_tldr", "jsonl", "hub"])
def test_a_smaller_fraction_of_the_demonstrations_is_a_subset_of_every_larger_one(source, tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": f"a{n}", "rejected": "b", "completion": f"a{n}"} for n in range(300)]
    for name in ("sft", "preference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = {"jsonl": tmp_path / "sft" / "train.jsonl", "hub": tmp_path}.get(source)
    table = HubTable("x/y") if source == "hub" else None
    data = Dataset("d", source, where and str(where), sft=table, preference=table, sft_size=200, validation_size=20)

    def responses(fraction):
        inputs = sft_data(Point(dataset=replace(data, sft_fraction=fraction)))
        return [d.response for d in training_rows(open_source(inputs), "sft")]

    everything = responses(1.0)
    samples = [responses(fraction) for fraction in (0.01, 0.03, 0.1, 0.5, 1.0)]
    assert [len(sample) for sample in samples] == [2, 6, 20, 100, 200]
    for sample, larger in pairwise(samples):
        assert set(sample) < set(larger)
        assert sample == [response for response in everything if response in set(sample)]  # in their order
    assert samples[3] != everything[:100]  # a random sample, not the first rows


def test_mini_tldr_is_the_same_every_time_and_its_labels_follow_the_gold_score():
    data = pairs_of(Dataset("d", "mini_tldr", sft_size=50, train_size=400, validation_size=20))
    a, b = MiniTldr(data), MiniTldr(data)
    assert a.pairs("train") == b.pairs("train") and a.prompts(30) == b.prompts(30)
    assert not {p.prompt.text for p in a.pairs("train")} & {p.text for p in a.prompts(30)}
    rows = mini_tldr.preferences(2000, seed=5)
    gaps = [mini_tldr.gold_score(post.facts, c) - mini_tldr.gold_score(post.facts, r) for post, c, r in rows]
    assert 0.75 < sum(g > 0 for g in gaps) / len(gaps) < 0.97  # noisy, so that over-optimization is possible


def test_gold_score_counts_facts_and_charges_for_what_is_wrong():
    (post,) = mini_tldr.posts(1, seed=3)
    facts = post.facts
    clean = "{who} {act} in {place} on {time} , lost {amount} dollars , {ask} ?".format(**facts)
    best = mini_tldr.gold_score(facts, clean)
    assert best == pytest.approx(sum(mini_tldr.WEIGHTS.values()))
    other = next(p for p in mini_tldr.WORDS["place"] if p != facts["place"])
    assert mini_tldr.gold_score(facts, clean.replace(facts["place"], other)) == pytest.approx(best - 1.4)
    assert mini_tldr.gold_score(facts, clean + " honestly") == pytest.approx(best - 0.5)
    assert mini_tldr.gold_score(facts, clean, finished=False) == pytest.approx(best - 1.0)
    assert mini_tldr.gold_score(facts, "") == 0.0


def attempt_in(folder: Path) -> Attempt:
    return Attempt(folder, folder, None, lambda *_: None, "label", "identity", folder)


@pytest.mark.parametrize("split", ["sft", "train", "validation"])
def test_tokens_are_cached_for_every_stage_that_reads_the_same_rows(split, tmp_path, mini, caplog):
    rows = [{"prompt": f"p{n}", "chosen": f"a{n}" if n % 9 else "", "rejected": "b " * n + "c"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = Dataset("d", "jsonl", str(tmp_path / "pairs.jsonl"))

    def load(template, dataset=dataset):
        """Load as another process would; without a template, tokens can only come from the cache."""
        tokenization._cache.clear()
        caplog.clear()
        data = (sft_data if split == "sft" else pair_data)(Point(dataset=dataset))
        return load_examples(data, MINI, split, template, attempt_in(tmp_path), {})

    tokenized = load(mini)
    (folder,) = (tmp_path / "store" / "tokenized").glob("*")
    cached = load(None)
    assert list(cached.examples) == list(tokenized.examples) and cached.counts == tokenized.counts
    assert len(cached.examples) > 1 and cached.examples[-2:] == list(tokenized.examples)[-2:]
    assert split == "validation" or "no supervised token" in caplog.text  # warned about every time

    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-100])  # torn by a full disk
    assert list(load(mini).examples) == list(tokenized.examples)
    assert list(load(None).examples) == list(tokenized.examples)

    shorter = replace(dataset, max_tokens=4, max_prompt_tokens=2)
    assert list(load(mini, shorter).examples) != list(tokenized.examples)
    assert len(list(folder.parent.iterdir())) == 2  # and no draft remains


def test_of_several_processes_that_save_the_same_tokens_the_first_one_wins(tmp_path, mini):
    tokenized = pairs([("a", "b", "c"), ("d", "e", "f")], mini)
    tokenized.save(tmp_path / "tokens")
    before = (tmp_path / "tokens" / "state.json").stat().st_mtime_ns
    tokenized.save(tmp_path / "tokens")
    loaded = TokenizedDataset.load(tmp_path / "tokens")
    assert list(loaded.examples) == list(tokenized.examples)
    assert (tmp_path / "tokens" / "state.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
