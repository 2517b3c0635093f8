"""Conversations of several turns: which tokens carry loss, where they are cut, and the chat templates."""

import pytest

from src.data.rows import Prompt, parse_demonstration, parse_pair, text_prompt
from src.data.templates import Template
from src.data.tokenization import tokenize
from src.errors import ConfigError
from src.model.packing import pack
from tests.support import tiny_llama, tiny_qwen
from tests.support.conversations import TURNS, conversation
from tests.support.small_models import smollm2_template


def chat(name: str) -> Template:
    if name == "tokenizer":
        return smollm2_template()
    return Template(name, (tiny_qwen if name == "chatml" else tiny_llama).tokenizer())


RESPONSES = {"chosen": "yes", "rejected": "no"}


def supervised_texts(examples, template: Template) -> list[str]:
    """The predicted tokens as text, split at the end token of every answer."""
    ids = pack(examples, [0]).targets.tolist()
    end = template.tokenizer.convert_ids_to_tokens(template.end_id)
    return template.tokenizer.decode(ids).split(end)


@pytest.mark.parametrize("name", ["llama3", "mistral", "chatml", "tokenizer"])
def test_every_answer_of_a_conversation_carries_loss_and_no_user_turn_does(name):
    template = chat(name)
    examples = tokenize([conversation()], template, 1000, 500).examples
    assert [text.strip() for text in supervised_texts(examples, template)] == [*TURNS[1::2], ""]
    (example,) = examples
    # The model sees the whole conversation, also what carries no loss.
    last = Prompt(conversation().prompt.messages)
    assert [*example.prompt, *example.responses[0]] == [*template.prompt_ids(last), *template.response_ids("See you")]
    assert example.num_supervised_tokens == sum(len(template.response_ids(answer)) for answer in TURNS[1::2])
    # One answer is one response.
    (single,) = tokenize([conversation(TURNS[:2])], template, 1000, 500).examples
    assert single.unsupervised_spans == () and single.prompt == example.prompt
    assert list(single.responses[0]) == template.response_ids(TURNS[1])


def test_a_greeting_that_opens_a_conversation_is_part_of_the_prompt():
    template = chat("llama3")
    turns = [("assistant", "Hello"), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "See you")]
    row = parse_demonstration({"messages": [{"role": r, "content": t} for r, t in turns]}, "here")
    (example,) = tokenize([row], template, 1000, 500).examples
    assert [text.strip() for text in supervised_texts([example], template)] == ["Yes?", "See you", ""]
    assert list(example.prompt) == template.prompt_ids(Prompt(row.prompt.messages[:2]))
    assert "Hello" in template.tokenizer.decode(example.prompt)
    # Nothing else before the answer: the prompt is the greeting alone.
    greeting = parse_pair({"conversations": [{"role": "assistant", "content": "Hello"}], **RESPONSES}, "here")
    assert template.turns(greeting.prompt) == (template.prompt_ids(greeting.prompt), [])


@pytest.mark.parametrize("name", ["llama3", "chatml", "tokenizer"])
def test_a_conversation_that_is_too_long_ends_with_an_answer(name):
    template = chat(name)
    (full,) = tokenize([conversation()], template, 1000, 500).examples
    every = pack([full], [0]).targets.tolist()
    num_spans = set()
    for limit in range(len(full.prompt) + 1, full.length + 2):
        (cut,) = tokenize([conversation()], template, limit, 500).examples
        ids = pack([cut], [0]).targets.tolist()
        assert ids == every[: len(ids)] and len(ids) == cut.num_supervised_tokens > 0
        assert cut.responses[0][-1] == ids[-1]  # not with a user turn
        assert cut.length < limit or len(cut.responses[0]) == limit - len(cut.prompt)
        num_spans.add(len(cut.unsupervised_spans))
    assert num_spans == {0, 1, 2} and cut == full


def test_a_template_that_renders_earlier_answers_differently_is_refused():
    tokenizer = tiny_llama.tokenizer()
    # As templates do that leave out earlier reasoning.
    answer = "{{ m.content if loop.last else m.content[:1] }}{{ eos_token }}"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] " + answer + "{% endfor %}"
    template = Template("tokenizer", tokenizer)
    with pytest.raises(ConfigError, match="renders an assistant turn differently"):
        tokenize([conversation()], template, 1000, 500)
    assert len(tokenize([conversation(TURNS[:2])], template, 1000, 500).examples) == 1


def test_an_end_token_after_user_turns_alone_is_not_taken_for_that_of_answers():
    tokenizer = tiny_llama.tokenizer()
    user, answer = "'Q ' + m.content + eos_token + 'A '", "m.content + ' '"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ {user} if m.role == 'user' else {answer} }}}}{{% endfor %}}"
    )
    with pytest.raises(ConfigError, match="ends an answer without"):
        tokenize([conversation()], Template("tokenizer", tokenizer), 1000, 500)
    assert len(tokenize([conversation(TURNS[:2])], Template("tokenizer", tokenizer), 1000, 500).examples) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(answer, "m.content + eos_token")
    examples = tokenize([conversation()], Template("tokenizer", tokenizer), 1000, 500).examples
    assert "Q How are you" in tokenizer.decode(examples[0].responses[0])


def test_mistrals_format_is_its_instruct_format_with_one_begin_and_the_end_after_each_answer():
    template = chat("mistral")
    fast = template.tokenizer
    roles = ("system", "user", "assistant", "user")
    messages = tuple(
        {"role": r, "content": c} for r, c in zip(roles, ("Be brief.", "Hi", "Hello", "Why?"), strict=True)
    )
    ids = template.prompt_ids(Prompt(messages)) + template.response_ids("Because.")
    text = "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Why? [/INST] Because.</s>"
    assert fast.decode(ids) == text.replace("<s>", fast.bos_token).replace("</s>", fast.eos_token)
    assert ids.count(fast.bos_token_id) == 1 and ids[-1] == template.end_id == fast.eos_token_id


def test_a_template_that_writes_todays_date_writes_the_same_on_any_day():
    """A stage that resumes tomorrow, and one that reads cached tokens, has the prompts of today."""
    tokenizer = tiny_llama.tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert tokenizer.decode(Template("tokenizer", tokenizer).prompt_ids(text_prompt("Hi"))) == "26 Jul 2024 Hi"
