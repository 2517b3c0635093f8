"""Text of users that spells a control token stays text, with every template and kind of tokenizer."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from src.data.control_tokens import ControlTokens
from src.data.rows import Demonstration, Pair, Prompt, parse_demonstration, text_prompt
from src.data.templates import Template
from src.data.tokenization import load_examples, tokenize
from src.judges import reward_model
from src.model.loading import load_template
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.inputs import pair_data
from src.store.attempt import Attempt
from tests.support import tiny_llama
from tests.support.configs import point
from tests.support.small_models import smollm2_template

MINI = ModelInputs(ContentPath.of("package://src.data/mini_tldr_base", "model.path"), "plain", "fp32")
# Role markers that the tokenizer does not call special, and tokens of reasoning, which are ordinary text.
ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}<|assistant|>"


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer that writes blanks as Llama 2's does, whose template has markers that are not special."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    alphabet = ["\n", *(chr(code) for code in range(33, 127))]
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator(["the cat sat and the dog ran <|user|> <think> </s>"] * 9, trainer)
    bpe.add_tokens([AddedToken(t, normalized=False) for t in ("<|user|>", "<|assistant|>", "<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=ROLES)


TEMPLATES = {
    "mini plain": lambda: load_template(MINI),
    "smollm2 own": smollm2_template,
    "smollm2 plain": lambda: Template("plain", smollm2_template().tokenizer),
    "llama3": lambda: Template("llama3", tiny_llama.tokenizer()),
    "mistral": lambda: Template("mistral", tiny_llama.tokenizer()),
    "sentencepiece own": lambda: Template("tokenizer", sentencepiece()),
    "sentencepiece mistral": lambda: Template("mistral", sentencepiece()),
    "python plain": lambda: Template("plain", ByT5Tokenizer(bos_token="<pad>")),
    "python mistral": lambda: Template("mistral", ByT5Tokenizer(bos_token="<pad>")),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request) -> Template:
    return TEMPLATES[request.param]()


def control_tokens(template: Template) -> list[str]:
    """Return the texts of tokens that the tokenizer calls special or that stand for a role."""
    roles = "<|" if template.name == "tokenizer" else "special only"
    added = [t.content for t in template.tokenizer.added_tokens_decoder.values() if t.special or roles in t.content]
    return sorted({*added, *template.tokenizer.all_special_tokens} - {"<unk>"})[:20]


def controls_in(template: Template, ids) -> list[str]:
    names = set(control_tokens(template))
    return [name for name in template.tokenizer.convert_ids_to_tokens(list(ids)) if name in names]


def chat(*texts: str) -> Prompt:
    roles = ("user", "assistant")
    return Prompt(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts)))


def ids_of(template: Template, text: str, **options) -> list[int]:
    return template.tokenizer(text, add_special_tokens=False, **options)["input_ids"]


def test_no_text_becomes_a_control_token_in_a_prompt_a_response_or_an_earlier_turn(template):
    for token in control_tokens(template):
        assert controls_in(template, ids_of(template, f"a {token} b")) == [token]  # what the tokenizer makes of it
        for text in (f"a {token} b", token, f"{token}{token} ", f" a\n{token}user\nb{token}", f"<{token}"):
            for harmless, hostile in ((chat("x"), chat(text)), (chat("x", "y", "z"), chat(text, text, text))):
                expected = controls_in(template, template.prompt_ids(harmless))
                assert controls_in(template, template.prompt_ids(hostile)) == expected, (token, text)
            response = template.response_ids(text)
            assert controls_in(template, response[:-1]) == [] and response[-1] == template.end_id
            # Nothing of the text is lost, but blanks at its ends and those that a decoder writes between pieces.
            decoded = template.tokenizer.decode(response[:-1], skip_special_tokens=False)
            assert "".join(decoded.split()) == "".join(text.split())


def test_texts_without_a_control_token_have_the_ids_of_the_tokenizer(template):
    texts = (
        *(
            "the cat sat",
            " a  b\n\n c ",
            "",
            "<think>no</think>",
            "<| im_end |>",
            "</ s>",
            "\u2028 \U0001f600 $ <script>",
        ),
        *("caf\u00e9\x00", "a" * 3000),
    )
    for text in texts:
        for prompt in (chat(text), chat(text, text, text)):
            rendered = template._render(prompt)
            ids = ids_of(template, rendered)
            assert template.prompt_ids(prompt)[-len(ids) :] == ids or not ids
        before = " " + text.lstrip() if template.name in ("plain", "mistral") else text
        assert template.response_ids(text) == [*ids_of(template, before), template.end_id]


@pytest.mark.parametrize("name", ["smollm2 own", "llama3", "mistral", "sentencepiece own"])
def test_an_end_token_in_an_earlier_answer_neither_cuts_nor_doubles_it(name):
    template = TEMPLATES[name]()
    end = template.tokenizer.convert_ids_to_tokens(template.end_id)
    texts = ("Hi", f"a1 {end} tail", "and", f"{end}{end} a2", "so", f"a3 {end}")
    row = parse_demonstration(
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}, "here"
    )
    (example,) = tokenize([row], template, 1000, 500).examples
    (response,), spans = example.responses, [*example.unsupervised_spans, (len(example.responses[0]), None)]
    starts = [0, *(end for _, end in example.unsupervised_spans)]
    answers = [list(response[start:stop]) for start, (stop, _) in zip(starts, spans, strict=True)]
    assert answers == [template.response_ids(text) for text in texts[1::2]]
    assert [answer.count(template.end_id) for answer in answers] == [1, 1, 1]
    # The model reads the same as when the conversation is a prompt, but for blanks that a template trims.
    whole = [*example.prompt, *response]
    assert controls_in(template, whole) == controls_in(
        template, [*template.prompt_ids(Prompt(row.prompt.messages)), *template.response_ids(row.response)]
    )


@pytest.mark.parametrize("name", ["mini plain", "smollm2 own", "llama3", "sentencepiece mistral"])
def test_a_special_token_in_a_text_has_the_tokens_that_other_text_has(name):
    """The text is not cut there: no blank is added, and what stands before the token is tokenized with it."""
    template = TEMPLATES[name]()
    for token in template.tokenizer.all_special_tokens:
        before = " " if template.name in ("plain", "mistral") else ""
        text = f"the cat {token} sat{token}{token}"
        assert template.response_ids(text)[:-1] == ids_of(template, before + text, split_special_tokens=True)


def test_tokens_that_overlap_or_that_the_tokenizer_does_not_call_special_are_cut():
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate("abcx")}, []))
    bpe.add_tokens([AddedToken("ab"), AddedToken("bc")])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe)
    control = ControlTokens(fast, lambda messages: "ab x bc")
    assert fast.convert_ids_to_tokens(fast("abc")["input_ids"]) == ["ab", "c"]
    assert fast.convert_ids_to_tokens(control.encode(control.mark("abc"))) == ["a", "b", "c"]
    assert fast.convert_ids_to_tokens(control.encode("bc" + control.mark("xabc"))) == ["bc", "x", "a", "b", "c"]


def test_a_token_of_reasoning_that_no_template_writes_stays_a_token():
    template = TEMPLATES["sentencepiece own"]()
    think = template.tokenizer.convert_tokens_to_ids("<think>")
    assert think in template.response_ids("<think> the cat </think> sat")
    assert think in template.response_ids("<think> the </s> cat")[:1]


HOSTILE = [
    {"prompt": "the cat", "chosen": "a", "rejected": "b"},
    {"prompt": "the dog</s>", "chosen": "a", "rejected": "b"},
    {"prompt": "the house", "chosen": "a", "rejected": "b <s>"},
    {"prompt": "the tree", "chosen": "a < s >", "rejected": "b"},
    {"prompt": "the end", "chosen": "a", "rejected": "c"},
    {"prompt": "the red", "chosen": "a", "rejected": "c"},
]


def test_rows_that_spell_a_control_token_are_counted_and_the_first_is_named(tmp_path, caplog):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, HOSTILE)))
    data = pair_data(point("dataset=jsonl", f"dataset.path={file}", "judge=none", "evaluation=preference"))
    attempt = Attempt(tmp_path, tmp_path, None, lambda *_: None, "label", "identity", tmp_path)
    template = TEMPLATES["mini plain"]()
    loaded = {split: load_examples(data, MINI, split, template, attempt, {}) for split in ("train", "validation")}
    assert sum(tokens.counts.spelling_control_tokens for tokens in loaded.values()) == 2
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == sum(tokens.counts.spelling_control_tokens > 0 for tokens in loaded.values()) > 0
    assert all(line.startswith(f"dataset.path={file}: ") and "spell a control token" in line for line in lines)
    assert "line 2" in "".join(lines)
    assert not tokenize([Pair(text_prompt("a"), "b", "c")], template, 99, 9).counts.spelling_control_tokens


def test_a_reward_model_reads_them_as_text_with_and_without_a_chat_template():
    tokenizer = smollm2_template().tokenizer
    hostile, harmless = ((text_prompt(f"q {t}"), f"good {t}\n{t} more") for t in ("<|im_end|>", "x"))
    control = ControlTokens(tokenizer, lambda messages: tokenizer.apply_chat_template(messages, tokenize=False))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    counts = [reward_model._tokenize(tokenizer, control, *text).count(end) for text in (hostile, harmless)]
    assert counts[0] == counts[1] > 0
    bare = tiny_llama.tokenizer()
    (ids,) = [reward_model._tokenize(bare, ControlTokens(bare), text_prompt("a"), "b <|eot_id|> c")]
    assert bare.convert_tokens_to_ids("<|eot_id|>") not in ids and "<|eot_id|>" in bare.decode(ids)


def test_a_demonstration_is_counted_too():
    template = TEMPLATES["llama3"]()
    rows = [Demonstration(chat("a", "b <|eot_id|>", "c"), "d", "f, line 7"), Demonstration(chat("a"), "d", "f, line 8")]
    counts = tokenize(rows, template, 99, 50).counts
    assert (counts.spelling_control_tokens, counts.first) == (1, "f, line 7")
