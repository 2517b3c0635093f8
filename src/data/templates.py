"""Conversations -> token ids. Prompt and response are tokenized apart, so the boundary between them never moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.data.control_tokens import ControlTokens
from src.data.rows import Demonstration, Message, Pair, Prompt, text_prompt
from src.errors import ConfigError, describe_failure

_FOLDER = Path(__file__).parent / "chat_templates"
_CHAT_TEMPLATES = {name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in ("llama3", "mistral")}
# Some templates write today's date (Llama 3.1 and later), and results must not depend on the day: this is the date that
# Llama's template has where it is told none.
_SAME_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_SPACE_BEFORE_RESPONSE = ("plain", "mistral")


@dataclass
class Template:
    """Chat template: `plain` text, the `tokenizer`'s own, `llama3` headers or `mistral`'s [INST]."""

    name: str
    tokenizer: Any

    def __post_init__(self) -> None:
        if self.name == "tokenizer" and not self.tokenizer.chat_template:
            raise ConfigError(
                "model.template=tokenizer: this tokenizer has no chat template; use plain, llama3 or mistral"
            )
        if self.name == "llama3" and "<|eot_id|>" not in self.tokenizer.get_vocab():
            raise ConfigError("model.template=llama3: this tokenizer has no <|eot_id|>; use plain or tokenizer")
        if self.end_id is None:
            raise ConfigError(f"model.template={self.name}: this tokenizer has no end-of-sequence token")
        self._render(text_prompt("a"))  # a template that does not work at all is refused when it is loaded
        self._control = ControlTokens(self.tokenizer, None if self.name == "plain" else self._apply)

    @property
    def end_id(self) -> int:
        """The token that ends a response, supervised and generated."""
        if self.name == "llama3":
            return self.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        return self.tokenizer.eos_token_id

    def _render(self, prompt: Prompt) -> str:
        """Return the text up to the start of the response. Raises ConfigError when the template cannot write it."""
        if self.name == "plain":
            return prompt.text
        try:
            return self._apply(prompt.messages)
        except Exception as error:  # whatever code in a template raises
            roles = ", ".join(message["role"] for message in prompt.messages)
            raise ConfigError(
                f"model.template={self.name}: the chat template cannot write messages of the roles {roles}: "
                f"{describe_failure(error)}; use another model.template, or mend that of model.path"
            ) from error

    def _apply(self, messages: Sequence[Message]) -> str:
        chat_template = _SAME_DATE + (_CHAT_TEMPLATES.get(self.name) or self.tokenizer.get_chat_template())
        options = {"chat_template": chat_template, "tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(list(messages), **options)

    def _mark(self, prompt: Prompt) -> Prompt:
        """Return the prompt with marked control tokens in its messages: rendered, it has only those of the template."""
        messages = ({**message, "content": self._control.mark(message["content"])} for message in prompt.messages)
        return replace(prompt, messages=tuple(messages))

    def spells_control_token(self, row: Pair | Demonstration) -> bool:
        """Return whether a text of the row spells a control token, which then stays text."""
        return any(map(self._control.are_in, (*row.responses, *(m["content"] for m in row.prompt.messages))))

    def turns(self, prompt: Prompt) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Split a conversation at its answers: (ids before the first answer, turns).

        A turn is (ids of an answer with its end token, ids from there to the next answer). Plain text has no turns: it
        is one prompt. Raises ConfigError when the template renders an answer differently once others follow.
        """
        # A greeting that opens the conversation has nothing before it to be predicted from: it belongs to the prompt.
        answers = [i for i, m in enumerate(prompt.messages) if m["role"] == "assistant" and i > 0]
        if self.name == "plain" or not answers:
            return self.prompt_ids(prompt), []
        prompts = [Prompt(prompt.messages[:i]) for i in answers]
        # The first end token after an answer is the template's: one that the answer spells is marked.
        texts = [self._render(self._mark(p)) for p in (*prompts, prompt)]
        end, turns = self.tokenizer.convert_ids_to_tokens(self.end_id), []
        for i, before, after in zip(answers, texts, texts[1:], strict=False):
            _, end_token, next_prompt = after.removeprefix(before).partition(end)
            if not end_token or not after.startswith(before):
                raise ConfigError(
                    f"model.template={self.name}: the chat template renders an assistant turn differently when it is "
                    "not the last one, so multi-turn SFT is not possible with it; use another, or rows of one answer"
                )
            turns.append((self.response_ids(prompt.messages[i]["content"]), self._control.encode(next_prompt)))
        return self.prompt_ids(prompts[0]), turns

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens up to the start of the response, with the begin token of the format."""
        ids = self._control.encode(self._render(self._mark(prompt)))
        bos = self.tokenizer.bos_token_id
        # Tokenizers of chat formats without a begin token (ChatML) declare one all the same, so theirs is not added.
        if bos is not None and self.name != "tokenizer" and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Return the response tokens, the end token last. In `plain` and `mistral` a space comes before them."""
        text = " " + text.lstrip() if self.name in _SPACE_BEFORE_RESPONSE else text
        return [*self._control.encode(self._control.mark(text)), self.end_id]

    def text(self, ids: list[int]) -> str:
        """Return the text of response tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
