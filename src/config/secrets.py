"""Secrets in a command line or config are refused: both are copied to logs, reports and trackers. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from src.errors import ConfigError

# What keys and tokens of common services look like. Names of models and files can begin with `sk-` or `hf_` as well,
# so that short ones count only where they begin a word that is not part of a path.
_KEYS = re.compile(
    r"""
    (?<![\w/.-])sk-\w[\w-]{5,} | \bsk-(?=[\w-]*\d)[\w-]{20,}       # OpenAI, Anthropic and many others
    | (?<![A-Za-z0-9])(?:hf|gsk|npm|pypi|r8|nvapi|pplx)[_-][A-Za-z0-9]{16,}
    | (?<![A-Za-z0-9])(?:gh[opusr]_|github_pat_|glpat-|wandb_v\d_|xox[abeprs]-)[\w-]{10,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{12,} | \bAIza[\w-]{30,} | \bya29\.[\w-]{20,}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                            # JSON web tokens
    | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY
    """,
    re.VERBOSE,
)
_HEADER = re.compile(r"\b(?:bearer|authorization\W+basic)\s+(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_COMMIT = re.compile(r"(?:revision|commit|sha|hash|ref)$", re.IGNORECASE)  # keys whose value may be 40 hex digits
# The end token of a model is none.
_SECRET_NAME = re.compile(
    r"(?:^|(?<!\bend)[_.-])(?:key|token|secret|passwd|password)$|api_?key$|[a-z](?:Key|Token|Secret)$"
)
_FLAG = re.compile(
    r"""
    (?:^|\s)--?
    (?:[\w-]*(?:api|access|auth|hf|hub|secret|private)[_-])?(?:api)?(?:key|token|secret|password)
    (?:\s+|=)(\S+)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ASSIGNMENT = re.compile(r"(?<![\w$-])([A-Za-z_][\w-]*)[\"']?\s*[=:](?!//)\s*([^\s,{}\[\]]+)")
_QUERY = re.compile(r"[?&;#]([^=&?#;\s]+)=([^&\s\"']+)")
_NO_SECRET = {"", "0", "1", "true", "false", "yes", "no", "on", "off", "null", "none", "???"}


@lru_cache(maxsize=10_000)  # points of a sweep have most values in common
def find_secret(key: str, value: str) -> str | None:
    """Return in words what looks like a secret in the value of a key; None when nothing does."""
    if re.search(r"\w://\S*@", value) or (re.match(r"[\"']?\w+://", value) and "@" in value):
        return "a URL with credentials"
    for parameter, text in _QUERY.findall(value):
        parts = re.split(r"[^a-z]+", unquote(parameter).lower())
        secret = any(part in ("sig", "auth", "pwd", "signature", "credential", "credentials", "sas") for part in parts)
        if (secret or re.search(r"key|token|secret|passw", unquote(parameter).lower())) and not _is_reference(text):
            return "a URL with a key in its query"
    if _KEYS.search(value) or _HEADER.search(value):
        return "a key or token"
    if _WANDB_KEY.fullmatch(value.strip("\"' ")) and not _COMMIT.search(key):
        return "a key (40 hexadecimal digits)"
    settings = [(key, value), *_ASSIGNMENT.findall(value)]
    if any(_is_secret_name(name) and not _is_reference(text) for name, text in settings):
        return "a key, token or password"
    if any(not _is_reference(text) for text in _FLAG.findall(value)):
        return "a key, token or password"
    return None


def find_key(text: str) -> str | None:
    """Return the first word of any text, as of a sample, that has the form of a service's key or token; None without.

    Only forms that nothing else has: prose may well say what a password is.
    """
    found = _KEYS.search(text) or _HEADER.search(text)
    return None if found is None else found[0]


def secrets_of_environment() -> dict[str, str]:
    """Return the environment variables whose names say that they are secret, without values too short to be one."""
    return {name: value for name, value in os.environ.items() if len(value) >= 8 and _is_secret_name(name)}


def _is_secret_name(name: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _SECRET_NAME.search(name.lower()))


def _is_reference(text: str) -> bool:
    """Return whether a text only says where a secret is, as `$OPENAI_API_KEY` does, or is no secret, as `true`."""
    bare = text.strip("\"';")
    return bare.startswith("$") or bare.lower() in _NO_SECRET


def conceal_secrets(message: str) -> str:
    """Return an error's message with quoted values that look like secrets struck out, which a YAML file may have.

    Values of the command line are checked before anything can quote them.
    """
    return re.sub(r"'([^']*)'", lambda m: "'[secret]'" if find_secret("", m[1]) else m[0], message)


def check_secret(key: str, value: Any) -> None:
    """Raise ConfigError, which names the key alone, for a secret in a value or in what it contains."""
    for place, text in _texts(key, value):
        kind = find_secret(place, text)
        if kind is not None:
            raise ConfigError(
                f"{place}: contains {kind}; pass secrets through environment variables, not the config, which is "
                "copied to logs and trackers"
            )


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a secret in a command line, before anything of it is printed or written."""
    for number, argument in enumerate(arguments, 1):
        key, _, value = argument.partition("=")
        name = key.lstrip("+~")
        if not re.fullmatch(r"[\w./@:-]+", name) or "://" in name or find_secret("", key) is not None:
            name, value = f"argument {number}", argument
        check_secret(name, value)


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every text in a value; names of keys count as text as well."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            if find_secret("", str(name)) is not None:
                yield key, str(name)
            else:
                yield from _texts(f"{key}.{name}", item)
    elif isinstance(value, Iterable):
        for index, item in enumerate(value):
            yield from _texts(f"{key}[{index}]", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, str(value)
