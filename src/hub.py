"""Whether what points name on the Hugging Face hub can be had, asked before anything is submitted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from src.config import ConfigError, Point
from src.identity import locate

SECONDS = 5.0  # to wait for the hub's answer


def check(points: Iterable[Point]) -> list[str]:
    """One warning for the names that could not be checked. Raises ConfigError naming one that cannot be had."""
    names = dict.fromkeys(name for point in points for name in _names(point))
    if not names:
        return []
    from huggingface_hub import constants

    absent = [name for name in names if not _cached(name, Path(constants.HF_HUB_CACHE))]
    if not absent:
        return []
    if constants.HF_HUB_OFFLINE:
        return [_warning(absent, "HF_HUB_OFFLINE is set")]
    for number, name in enumerate(absent):
        if reason := _ask(name):
            return [_warning(absent[number:], reason)]
    return []


# (config key, repository, kind of repository, revision)
Name = tuple[str, str, str, str | None]


def _names(point: Point) -> Iterable[Name]:
    if locate(point.model.path) is None:
        yield "model.path", point.model.path, "model", point.model.revision
    if point.judge.name == "reward_model" and point.judge.model is not None and locate(point.judge.model) is None:
        yield "judge.model", point.judge.model, "model", None
    data = point.dataset
    if data.source == "hub" and data.path is None:
        for key, table in (("dataset.sft.path", data.sft), ("dataset.preference.path", data.preference)):
            if table is not None:
                yield key, table.path, "dataset", None


def _cached(name: Name, cache: Path) -> bool:
    _, repository, kind, _ = name
    return (cache / f"{kind}s--{repository.replace('/', '--')}" / "snapshots").is_dir()


def _ask(name: Name) -> str | None:
    """Why the hub could not be asked; None when the name is fine."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    key, repository, kind, revision = name
    api = HfApi()
    try:
        info = api.repo_info(repository, repo_type=kind, revision=revision, timeout=SECONDS)
        if getattr(info, "gated", False):
            api.auth_check(repository, repo_type=kind)
    except GatedRepoError:
        raise ConfigError(
            f"{key}={repository}: gated on the hub: ask for access there and `hf auth login`, or give a local path"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{key}={repository}: neither a local path nor on the hub (or private: `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{key}={repository}: the hub has no revision {revision}") from None
    except Exception as error:  # no network here says nothing about the nodes
        return type(error).__name__
    return None


def _warning(names: list[Name], reason: str) -> str:
    what = ", ".join(f"{key}={repository}" for key, repository, _, _ in names)
    return f"not checked ({reason}): {what}; jobs need the hub or a filled cache to find them"
