"""Addresses and keys of endpoints: which are allowed, which are equal, and which key goes where. No torch."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from src.config.judge import JudgeEndpoint
from src.errors import ConfigError

OPENAI_URL = "https://api.openai.com/v1"
SERVED = "server"  # judge.base_url: the judging job itself serves the model, by server.command
OPENAI_KEY = "OPENAI_API_KEY"  # the variable whose key OpenAI is sent without judge.api_key_env

_ADDRESS = re.compile(r"(?i:https?)://(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?(/[!-~]*)?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_WORD = 15  # letters and digits of a variable's name between underscores; keys have longer ones


def check_url(key: str, url: str) -> None:
    """Raise ConfigError for what is no address of an endpoint; the message does not repeat one that may hold a secret.

    A query string or a fragment is refused because some providers expect keys there.
    """
    if re.search(r"[@?#]", url):
        raise ConfigError(
            f"{key}: an address has no user, password, query string or fragment; a key is passed in the environment "
            "variable that judge.api_key_env names"
        )
    if not url.lower().startswith(("http://", "https://")):
        raise ConfigError(f"{key}={url}: must begin with http:// or https://")
    match = _ADDRESS.fullmatch(url)
    if match is None or not 0 < int(match["port"] or 80) < 2**16 or not _is_host(match["host"]):
        raise ConfigError(f"{key}={url!r}: not an address; must be like http://localhost:8000/v1")


def _is_host(host: str) -> bool:
    if re.search(r"[^\d.]", host) and not host.startswith("["):
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def normalize_url(url: str) -> str:
    """Return one spelling of equal addresses: lower-case scheme and host, no default port, no slash at the end."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def is_loopback(url: str) -> bool:
    """Return whether requests to the address do not leave this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key_name(key: str, name: str) -> None:
    """Raise ConfigError, without repeating the value, for what may be a key and not the name of a variable."""
    long = any(len(word) > _LONGEST_WORD and re.search(r"\d", word) for word in name.split("_"))
    if long or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ConfigError(
            f"{key}: must be the name of an environment variable, in upper-case letters, digits and _, such as "
            f"{OPENAI_KEY}, not the key itself"
        )


def check_key_is_protected(endpoint: JudgeEndpoint) -> None:
    """Raise ConfigError when a key would cross a network unencrypted."""
    url = endpoint.base_url
    if url is None or endpoint.api_key_env is None or urlsplit(url).scheme == "https" or is_loopback(url):
        return
    raise ConfigError(
        f"judge.base_url={url}: the key of judge.api_key_env would be sent unencrypted; use https://, or "
        "judge.api_key_env=null for a server without a key"
    )


def read_key(endpoint: JudgeEndpoint) -> str | None:
    """Return the key that the endpoint is sent; None for no key.

    OpenAI gets that of OPENAI_API_KEY, or of the variable that api_key_env names; an endpoint of one's own gets only
    the latter. Raises ConfigError when the variable is not set, or has what no key has.
    """
    check_key_is_protected(endpoint)
    other = os.environ.get("OPENAI_BASE_URL")
    if endpoint.base_url is None and other and normalize_url(other) != OPENAI_URL:
        raise ConfigError(
            "OPENAI_BASE_URL is set, and this program does not read it: unset it, or set judge.base_url=URL, and "
            "judge.api_key_env=NAME if that server needs a key"
        )
    name = endpoint.api_key_env or (OPENAI_KEY if endpoint.base_url is None else None)
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        if endpoint.base_url is None:
            raise ConfigError(
                f"the judge calls OpenAI and {name} is not set: export it (judge.api_key_env names another "
                "variable), or set judge.base_url=URL to use another endpoint"
            )
        raise ConfigError(f"judge.api_key_env={name}: this variable is not set; export it, or use null for no key")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"{name}: its value has a space, a line break or a character that no key has")
    return key
