"""Conversations -> token ids: prompt and response tokenised apart, so the boundary between them never moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from src.data.rows import Prompt
from src.errors import ConfigError

# The header format of Llama 3 (Meta's model card); base checkpoints come without a template.
_LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The instruct format of Mistral 7B v0.1 and v0.2: plain text, but for the end of each answer.
_MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '[INST] ' + m['content'] | trim + '\n\n' }}"
    "{% else %}{{ ('' if loop.index0 and loop.previtem['role'] == 'system' else '[INST] ') + m['content'] | trim }}"
    "{{ ' [/INST]' }}{% endif %}{% endfor %}"
)
_FORMATS = {"llama3": _LLAMA3, "mistral": _MISTRAL}
_AFTER_A_SPACE = ("plain", "mistral")  # where a response begins


@dataclass
class Template:
    """How a model is spoken to: `plain` text, the `tokenizer`'s own chat template, `llama3` headers or `mistral`'s
    [INST]."""

    name: str
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.name == "tokenizer" and not self.tokenizer.chat_template:
            raise ConfigError(
                "model.template=tokenizer: this tokenizer brings no chat template; use plain, llama3 or mistral"
            )
        if self.name == "llama3" and "<|eot_id|>" not in self.tokenizer.get_vocab():
            raise ConfigError("model.template=llama3: this tokenizer has no <|eot_id|>; use plain or tokenizer")
        if self.end_id is None:
            raise ConfigError(f"model.template={self.name}: this tokenizer has no end-of-sequence token")

    @property
    def end_id(self) -> int:
        """The token that ends a response, supervised and generated."""
        if self.name == "llama3":
            return self.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        return self.tokenizer.eos_token_id

    def _text_of(self, prompt: Prompt) -> str:
        """Up to where the response begins."""
        if self.name == "plain":
            return prompt.text
        chat = {"chat_template": _FORMATS[self.name]} if self.name in _FORMATS else {}
        return self.tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=True, **chat
        )

    def turns(self, prompt: Prompt) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """The ids up to the first answer in a conversation, and for each answer before the last one its ids with the
        end token, and those from there to the next answer. Plain text has no turns: it is one prompt.

        Raises ConfigError where a template writes an answer otherwise once others follow.
        """
        answers = [i for i, m in enumerate(prompt.messages) if m["role"] == "assistant"]
        if self.name == "plain" or not answers:
            return self.prompt_ids(prompt), []
        prompts = [Prompt(prompt.messages[:i]) for i in answers]
        texts = [self._text_of(p) for p in (*prompts, prompt)]
        end, turns = self.tokenizer.convert_ids_to_tokens(self.end_id), []
        for i, before, after in zip(answers, texts, texts[1:], strict=False):
            _, found, between = after.removeprefix(before).partition(end)
            if not found or not after.startswith(before):
                raise ConfigError(
                    f"model.template={self.name}: it writes an answer otherwise once others follow, so those of a "
                    "conversation cannot be learned together; use another template, or rows of one answer"
                )
            ids = self.tokenizer(between, add_special_tokens=False)["input_ids"]
            turns.append((self.response_ids(prompt.messages[i]["content"]), ids))
        return self.prompt_ids(prompts[0]), turns

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = self.tokenizer(self._text_of(prompt), add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        # Chat formats without a begin token (ChatML) declare one all the same; only the other three start with it.
        if bos is not None and self.name != "tokenizer" and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Response tokens, the end token last. A plain response, and mistral's, follows its prompt after one space."""
        text = " " + text.lstrip() if self.name in _AFTER_A_SPACE else text
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
