"""The repositories of a published study on the Hugging Face Hub, and the calls that upload them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import ConfigError, StageError, describe_failure

MAX_NAME = 96  # characters of a repository's name, by the hub
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A folder, and the repository it is uploaded to. kind: model or dataset."""

    folder: Path
    name: str
    kind: str
    summary: str  # of what is in it

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Call:
    """A call of a function of huggingface_hub."""

    function: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"huggingface_hub.{self.function}({arguments})"


def check_repository(option: str, name: str) -> None:
    """Raise ConfigError for a name that the hub does not take."""
    valid = _REPOSITORY.fullmatch(name) and not re.search(r"--|\.\.|[.-](/|$)|\.git$", name)
    if not valid or len(name.partition("/")[2]) > MAX_NAME:
        raise ConfigError(
            f"{option}: {name!r} is no name of a repository: USER/NAME, of letters, digits, `_`, `-` and `.`, NAME of "
            f"at most {MAX_NAME} characters"
        )


def creating(repository: Repository, public: bool) -> Call:
    """Return the call that creates a repository, unless it exists."""
    arguments = {"repo_id": repository.name, "repo_type": repository.kind, "private": not public, "exist_ok": True}
    return Call("create_repo", arguments)


def uploading(repository: Repository, message: str) -> Call:
    """Return the call that uploads a folder in one commit; files that are there already are not sent again.

    Others that are there are deleted: transformers would put adapters of an earlier upload onto a whole model.
    """
    return Call(
        "upload_folder",
        {
            "repo_id": repository.name,
            "repo_type": repository.kind,
            "folder_path": str(repository.folder),
            "commit_message": message,
            "delete_patterns": "*",
        },
    )


def upload(repositories: Sequence[Repository], public: bool, message: str, report: Callable[[str], None]) -> None:
    """Create all repositories, then upload each folder in one commit.

    report: called with a line about each repository that is uploaded. Raises ConfigError when nobody is logged in or a
    repository that exists is public and should not be, or the other way around, and StageError when the hub refuses
    something.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise ConfigError("not logged in to the hub: `hf auth login`, or export HF_TOKEN, with a token that may write")
    done: list[str] = []

    def make(call: Call) -> Any:
        try:
            return getattr(huggingface_hub, call.function)(**call.arguments)
        except Exception as error:  # of any type: those of the hub, of its client and of the network
            reason = describe_failure(error).removeprefix(f"{type(error).__name__}: ")
            names = [f"{repository.kind} {repository.name}" for repository in repositories]
            missing = ", ".join(name for name in names if name not in done)
            raise StageError(
                f"{call.function} of {call.arguments['repo_id']}: {reason}; uploaded: {', '.join(done) or 'nothing'}; "
                f"not uploaded: {missing}; the same command continues (files that are there are not sent again)"
            ) from error

    for repository in repositories:
        make(creating(repository, public))
        info = make(Call("repo_info", {"repo_id": repository.name, "repo_type": repository.kind}))
        if not public and not info.private:
            raise ConfigError(
                f"the {repository.kind} {repository.name} exists and is public: give --public to write into it, or "
                "another name, --to USER/NAME; nothing was uploaded"
            )
        if public and info.private:
            raise ConfigError(
                f"the {repository.kind} {repository.name} exists and is private: make it public in its settings on the "
                "hub, or leave --public out; nothing was uploaded"
            )
    for repository in repositories:
        make(uploading(repository, message))
        done.append(f"{repository.kind} {repository.name}")
        report(f"uploaded {done[-1]}: {repository.summary}")
