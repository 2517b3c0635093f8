"""Conversations -> token ids. Prompt and response are tokenized apart, so the boundary between them never moves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from src.config.paths import naming
from src.config.template_rules import is_template_file
from src.data.control_tokens import ControlTokens
from src.data.rows import Demonstration, Message, Pair, Prompt, text_prompt
from src.errors import ConfigError, describe_failure

_FOLDER = Path(__file__).parent / "chat_templates"
_NAMES = ("chatml", "llama3", "mistral")
_CHAT_TEMPLATES = {name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in _NAMES}
# Some templates write today's date (Llama 3.1 and later), and results must not depend on the day: this is the date that
# Llama's template has where it is told none.
_SAME_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own tag around an answer


@dataclass(frozen=True)
class _Format:
    """How ids are made of what a template writes.

    tokens: that it needs, the last of which ends a response; none: the tokenizer's end of sequence does. adds_begin:
    whether the begin token comes first, where the template does not write it. Tokenizers of chat formats without one
    (ChatML) declare a begin token all the same.
    """

    tokens: tuple[str, ...] = ()
    adds_begin: bool = False
    space_before_response: bool = False


_FORMATS = {
    "plain": _Format(adds_begin=True, space_before_response=True),
    "mistral": _Format(adds_begin=True, space_before_response=True),
    "llama3": _Format(("<|eot_id|>",), adds_begin=True),
    "chatml": _Format(("<|im_start|>", "<|im_end|>")),
}


def tokens_of(name: str) -> tuple[str, ...]:
    """Return the tokens that a tokenizer must have for model.template=`name`."""
    return _FORMATS.get(name, _Format()).tokens


def read_template(file: str) -> str:
    """Return the chat template in a file. Raises ConfigError, with the line where its syntax is wrong."""
    with naming("model.template", file):
        try:
            text = Path(file).read_text(encoding="utf-8")
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
        except UnicodeDecodeError as error:
            raise ConfigError(f"model.template={file}: not UTF-8 ({error.reason})") from None
        except TemplateSyntaxError as error:
            raise ConfigError(f"model.template={file}, line {error.lineno}: {error.message}") from None
    if not text.strip():
        raise ConfigError(f"model.template={file}: the file is empty")
    return text


def published_chat_template(name: str, system_prompt: str | None = None) -> str | None:
    """Return the chat template that writes for transformers what model.template=`name` writes; None for plain text.

    With the begin token and the system prompt, which the study adds itself. Not for `tokenizer`, which has its own.
    """
    if name == "plain":
        return None
    text = read_template(name) if is_template_file(name) else _CHAT_TEMPLATES[name]
    before = "{{- bos_token -}}\n" if _FORMATS.get(name, _Format()).adds_begin else ""
    if system_prompt is not None:
        message = f"[{{'role': 'system', 'content': {json.dumps(system_prompt, ensure_ascii=False)}}}]"
        before += "{% if messages[0]['role'] != 'system' %}{% set messages = " + message + " + messages %}{% endif %}\n"
    return before + text


@dataclass
class Template:
    """Chat template: `plain` text, the `tokenizer`'s own, `chatml`, `llama3` headers, `mistral`'s [INST], or a file.

    end_tokens: that end a response instead of the template's; the first is learned, any of them ends a sample.
    system_prompt: the first message of every conversation that does not begin with one of the system.
    """

    name: str
    tokenizer: Any
    end_tokens: tuple[str, ...] = ()
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.name == "tokenizer" and not self.tokenizer.chat_template:
            raise ConfigError(
                "model.template=tokenizer: this tokenizer has no chat template; use plain, chatml, llama3, mistral or "
                "FILE.jinja"
            )
        vocabulary = self.tokenizer.get_vocab()
        for key, tokens in ((f"template={self.name}", self._format.tokens), ("end_token", self.end_tokens)):
            if absent := [token for token in tokens if token not in vocabulary]:
                raise ConfigError(missing_token(key, absent[0]))
        if not self.end_tokens and not self._format.tokens and self.tokenizer.eos_token_id is None:
            raise ConfigError(f"model.template={self.name}: this tokenizer has no end-of-sequence token")
        self._source = read_template(self.name) if is_template_file(self.name) else _CHAT_TEMPLATES.get(self.name)
        self._render(text_prompt("a"))  # a template that does not work at all is refused when it is loaded
        render = None if self.name == "plain" else self._apply
        self._control = ControlTokens(self.tokenizer, render, self.end_tokens)
        if self.system_prompt is not None:
            self._check_system_prompt(self.system_prompt)

    def _check_system_prompt(self, system_prompt: str) -> None:
        """Raise ConfigError when the template cannot write a system prompt, or leaves it out."""
        (user,) = text_prompt("a").messages
        written = {
            self._render(Prompt(({"role": "system", "content": text}, user)))
            for text in (
                system_prompt,
                f"{system_prompt} b",
            )  # the prompt itself may be what the template has without one
        }
        if len(written) == 1:
            raise ConfigError(
                f"model.system_prompt: model.template={self.name} leaves out messages of the system; use another "
                "template, or model.system_prompt=null"
            )

    @property
    def _format(self) -> _Format:
        return _FORMATS.get(self.name, _Format())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response. The first is the one that is learned."""
        tokens = self.end_tokens or self._format.tokens[-1:]
        return tuple(map(self.tokenizer.convert_tokens_to_ids, tokens)) or (self.tokenizer.eos_token_id,)

    @property
    def end_id(self) -> int:
        """The token that ends a response where it is learned, and pads samples."""
        return self.end_ids[0]

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
        chat_template = _SAME_DATE + (self._source or self.tokenizer.get_chat_template())
        options = {"chat_template": chat_template, "tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(list(messages), **options)

    def _mark(self, prompt: Prompt) -> Prompt:
        """Return the prompt with marked control tokens in its messages: rendered, it has only those of the template.

        The system prompt comes before them where it is missing.
        """
        messages = self._with_system_prompt(prompt.messages)
        marked = ({**message, "content": self._control.mark(message["content"])} for message in messages)
        return replace(prompt, messages=tuple(marked))

    def _with_system_prompt(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.system_prompt is None or [message["role"] for message in messages[:1]] == ["system"]:
            return messages
        return {"role": "system", "content": self.system_prompt}, *messages

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
        texts = [self._render(self._mark(p)) for p in (*prompts, prompt)]
        end, turns = self.tokenizer.convert_ids_to_tokens(self.end_id), []
        for i, before, after in zip(answers, texts, texts[1:], strict=False):
            # The first end token after an answer is the template's: one that the answer spells is marked.
            written, end_token, next_prompt = after.removeprefix(before).partition(end)
            answer = self._control.mark(prompt.messages[i]["content"]).strip()
            if not end_token or (written.strip() != answer and written.lstrip().startswith(answer)):
                raise ConfigError(
                    f"model.template={self.name}: the chat template ends an answer without {end}, which is what ends a "
                    "response, so multi-turn SFT is not possible: set model.end_token to the token that it writes there"
                )
            if not after.startswith(before) or written.strip() != answer:
                raise ConfigError(
                    f"model.template={self.name}: the chat template renders an assistant turn differently when it is "
                    "not the last one, so multi-turn SFT is not possible with it; use another, or rows of one answer"
                )
            turns.append((self.response_ids(prompt.messages[i]["content"]), self._control.encode(next_prompt)))
        return self.prompt_ids(prompts[0]), turns

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the text up to the start of the response, for a program that tokenizes it without adding tokens.

        Control tokens that it spells are such there. Raises ConfigError when the template cannot write it.
        """
        text = self._render(replace(prompt, messages=self._with_system_prompt(prompt.messages)))
        begin = self.tokenizer.bos_token if self._format.adds_begin else None
        return text if begin is None or text.startswith(begin) else begin + text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens up to the start of the response, with the begin token of the format."""
        ids = self._control.encode(self._render(self._mark(prompt)))
        bos = self.tokenizer.bos_token_id
        if bos is not None and self._format.adds_begin and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def response_ids(self, text: str, end_id: int | None = None) -> list[int]:
        """Return the response tokens, the end token last. In `plain` and `mistral` a space comes before them.

        end_id: the token that ended a sample, where it is not the first one.
        """
        text = " " + text.lstrip() if self._format.space_before_response else text
        return [*self._control.encode(self._control.mark(text)), self.end_id if end_id is None else end_id]

    def text(self, ids: list[int]) -> str:
        """Return the text of response tokens, without the token that ended them."""
        ids = ids[:-1] if ids and ids[-1] in self.end_ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def missing_token(key: str, token: str) -> str:
    """Return the message for a token that a key needs and a tokenizer does not have; key: without `model.`."""
    return f"model.{key}: this tokenizer has no {token}; use a model that has it, or another model.template"
