"""Which chat templates and end tokens a config may name. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.config.fields import shortened
from src.config.paths import is_file
from src.errors import ConfigError

if TYPE_CHECKING:
    from src.config.schema import Model

TEMPLATES = ("plain", "tokenizer", "chatml", "llama3", "mistral")


def is_template_file(template: str) -> bool:
    """Return whether model.template names a file, not one of TEMPLATES."""
    return template.endswith(".jinja")


def end_tokens_of(model: Model) -> tuple[str, ...]:
    """Return the tokens of model.end_token, none where it is not set. Raises ConfigError for anything but tokens."""
    value = model.end_token
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(isinstance(token, str) and token.strip() for token in tokens):
        raise ConfigError(
            f"model.end_token={shortened(str(value))}: must be a token of the tokenizer or a list of them, as "
            "'model.end_token=\"<|im_end|>\"'; null: the template's own"
        )
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"model.end_token={value}: names a token twice")
    return tuple(tokens)


def check_template(model: Model) -> None:
    """Raise ConfigError for a template that is neither known nor a file, and for what cannot be end tokens."""
    template = model.template
    if is_template_file(template):
        if not is_file("model.template", template):
            raise ConfigError(f"model.template={template}: no such file")
    elif template not in TEMPLATES:
        raise ConfigError(
            f"model.template={shortened(template)}: must be one of {', '.join(TEMPLATES)}, or a file whose name ends "
            "with .jinja"
        )
    end_tokens_of(model)
    if model.system_prompt is not None and not model.system_prompt.strip():
        raise ConfigError("model.system_prompt is empty: give a text, or null for none")
