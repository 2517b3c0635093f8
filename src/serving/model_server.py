"""A server of one checkpoint, started for a stage and stopped whatever happens, and samples through it."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import StageError
from src.model.sampling import seed_from_str
from src.planning.identity import GenerationInputs

if TYPE_CHECKING:
    import openai

    from src.data.templates import Template

LOG = "server.log"
ANSWER = 600.0  # seconds that one sample may take
ATTEMPTS = 5  # at a prompt, when the server fails
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for a lock


@contextmanager
def serving(
    server_command: str, timeout: float, checkpoint: Path, precision: str, folder: Path, beat: Callable[[], None]
) -> Iterator[str]:
    """Yields the base URL of a server that calls its model by the path of the checkpoint. Its output goes to
    server.log in `folder`. beat() is called while it starts. Raises StageError when it does not start, and when it is
    why the caller has one.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {"checkpoint": str(checkpoint), "port": port, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision]}
    command = [word.format(**words) for word in shlex.split(server_command)]
    with (folder / LOG).open("w") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # also when this process is killed and can stop nothing
            )
        except OSError as error:
            raise StageError(f"server.command: {command[0]} cannot be started ({error.strerror})") from error
        try:
            root = f"http://127.0.0.1:{port}"
            _wait(process, root, timeout, folder, beat)
            try:
                yield f"{root}/v1"
            except StageError as error:
                if process.poll() is None:
                    raise
                how = f"ended with code {process.returncode} while it sampled"
                raise StageError(f"the server of server.command {how}: {_last_words(folder)}") from error
        finally:
            _stop(process)


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):  # Linux
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], root: str, timeout: float, folder: Path, beat: Callable[[], None]) -> None:
    """Until the server says that it is well."""
    import httpx

    deadline = time.monotonic() + timeout
    with httpx.Client(trust_env=False, timeout=5) as client:  # a proxy for the world does not know this machine
        while True:
            ended = process.poll() is not None  # first: another server may answer on the port this one did not get
            if not ended:
                with suppress(httpx.HTTPError):
                    if client.get(f"{root}/health").status_code == 200:
                        return
            if ended or time.monotonic() > deadline:
                why = (
                    f"ended with code {process.returncode}" if ended else f"is silent for server.timeout={timeout:g} s"
                )
                raise StageError(f"the server of server.command {why}: {_last_words(folder)}")
            beat()
            time.sleep(0.5)


def _last_words(folder: Path) -> str:
    """What the server said last."""
    lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server and what it has started: asked first, then killed."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def served_folder(checkpoint: Path, folder: Path, template: Template, generation: GenerationInputs) -> Path:
    """The checkpoint under `folder`, with the configured sampling as its own: servers agree on generation_config.json,
    not on how top-k is asked for."""
    target = folder / "served"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt, perhaps before everything was moved
    target.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "generation_config.json":
            (target / path.name).symlink_to(path.absolute())
    greedy = generation.temperature == 0.0
    settings: dict[str, Any] = {"do_sample": not greedy, "max_new_tokens": generation.max_new_tokens}
    if not greedy:
        settings |= {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    settings |= {"eos_token_id": template.end_id, "pad_token_id": template.end_id}
    settings |= {"bos_token_id": template.tokenizer.bos_token_id}
    (target / "generation_config.json").write_text(json.dumps(settings))
    return target


def sample_through(
    url: str,
    concurrency: int,
    model: str,
    template: Template,
    prompts: dict[int, list[int]],
    seed: str,
    generation: GenerationInputs,
    keep: Callable[[int, tuple[list[int], bool]], None],
    beat: Callable[[], None],
) -> None:
    """keep(index, (response ids, finished)) for every prompt (index -> ids). A server returns text, so the ids are
    those of its text. Raises StageError as Remote.each does."""
    from src.serving.openai_client import Remote  # the client is an optional package

    texts = {index: _text_of(template, ids) for index, ids in prompts.items()}
    remote = Remote(url, None, ANSWER, ATTEMPTS, concurrency, grace=0.0)

    def request(index: int, client: openai.OpenAI) -> Any:
        return client.completions.create(
            model=model,
            prompt=texts[index],
            max_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=seed_from_str(f"{seed}/{index}") >> 32,  # not every server takes more bits
        )

    def read(completion: Any) -> tuple[list[int], bool]:
        choice = completion.choices[0]
        finished = choice.finish_reason == "stop"
        ids = template.response_ids(choice.text)
        return (ids if finished else ids[:-1]), finished

    remote.each(((index, partial(request, index)) for index in texts), read, keep, beat)


def _text_of(template: Template, ids: Sequence[int]) -> str:
    """The text that a server reads as these ids. Raises StageError when there is none: it would answer another
    prompt."""
    tokenizer = template.tokenizer
    for skipped in (0, 1):  # servers add a begin token where the tokenizer does
        text = tokenizer.decode(ids[skipped:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == list(ids):
            return text
    raise StageError(
        f"server: a prompt of model.template={template.name} cannot be written as text that this tokenizer reads "
        "back as the same tokens; use server=none"
    )
