"""A server of one checkpoint, run by the job for the time of a stage, and sampling through it."""

from __future__ import annotations

import ctypes
import json
import os
import re
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

from src.distributed import get_distributed
from src.errors import StageError
from src.hardware import visible_gpus
from src.model.sampling import seed_from_str, seed_of
from src.planning.identity import GenerationInputs

if TYPE_CHECKING:
    import openai

    from src.data.templates import Template

LOG_FILE = "server.log"
REQUEST_TIMEOUT = 600.0  # seconds for one sample
MAX_RETRIES = 4  # per prompt, when the server fails
# What torchrun, submitit and our SLURM jobs set for one rank of a run, and accelerate for the libraries that it drives.
_OF_A_RANK = re.compile(
    r"((LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP)_.*)"
)
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBC = ctypes.CDLL(None)  # loaded at import time: dlopen between fork and exec could deadlock


@contextmanager
def serving(
    server_command: str,
    timeout: float,
    checkpoint: Path | str,
    precision: str,
    folder: Path,
    on_progress: Callable[[], None],
) -> Iterator[str]:
    """Run a server of the checkpoint and yield its base URL; the name of its model is the checkpoint's path or name.

    Its output goes to server.log in `folder`. on_progress is called while it starts. Raises StageError when the server
    does not start, or when it has died and the body therefore raises one.
    """
    port = _free_port()
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    command = [word.format(checkpoint=checkpoint, port=port, dtype=dtype) for word in shlex.split(server_command)]
    with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_own_environment(),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # covers SIGKILL of this process, which cannot clean up
            )
        except OSError as error:
            raise StageError(f"server.command: {command[0]} cannot be started ({error.strerror})") from error
        try:
            root = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, root, timeout, folder, on_progress)
            try:
                yield f"{root}/v1"
            except StageError as error:
                if process.poll() is None:
                    raise
                raise StageError(
                    f"server.command exited with code {process.returncode} while sampling: {_last_log_line(folder)}"
                ) from error
        finally:
            _stop(process)


def _free_port() -> int:
    """Return a port that is free now and that no other rank's server gets."""
    ranks = get_distributed()
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if port % ranks.size == ranks.rank:
            return port


def _own_environment() -> dict[str, str]:
    """Return the environment of a server: the GPU of this rank alone, and nothing by which it would join the ranks."""
    environment = {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
    ranks = get_distributed()
    if ranks.size > 1 and (gpus := visible_gpus()):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[ranks.local_rank % len(gpus)]
    return environment


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):  # Linux only
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_ready(
    process: subprocess.Popen[bytes], root: str, timeout: float, folder: Path, on_progress: Callable[[], None]
) -> None:
    """Poll /health until the server is ready. Raises StageError on exit or timeout."""
    import httpx

    deadline = time.monotonic() + timeout
    with httpx.Client(trust_env=False, timeout=5) as client:  # trust_env: bypass HTTP proxies for loopback addresses
        while True:
            if process.poll() is not None:  # before /health: another server may have taken the port
                raise StageError(f"server.command exited with code {process.returncode}: {_last_log_line(folder)}")
            with suppress(httpx.HTTPError):
                if client.get(f"{root}/health").status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise StageError(
                    f"server.command did not become ready within server.timeout={timeout:g} s: {_last_log_line(folder)}"
                )
            on_progress()
            time.sleep(0.5)


def _last_log_line(folder: Path) -> str:
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "no output"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server and its child processes: SIGTERM, then SIGKILL."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def served_folder(checkpoint: Path, folder: Path, template: Template, generation: GenerationInputs) -> Path:
    """Return a copy of the checkpoint, of symbolic links, whose generation_config.json has the configured sampling.

    Servers agree on that file, but not on how a request passes top-k.
    """
    target = folder / "served"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier attempt
    ignored = shutil.ignore_patterns("generation_config.json")
    shutil.copytree(checkpoint.absolute(), target, copy_function=os.symlink, ignore=ignored)
    settings: dict[str, Any] = {"do_sample": generation.temperature > 0, "max_new_tokens": generation.max_new_tokens}
    if generation.temperature > 0:
        settings |= {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    end_ids = [*template.end_ids]
    settings |= {"eos_token_id": end_ids if len(end_ids) > 1 else template.end_id, "pad_token_id": template.end_id}
    settings["bos_token_id"] = template.tokenizer.bos_token_id
    (target / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return target


def sample_through(
    url: str,
    concurrency: int,
    model: str,
    template: Template,
    prompts: dict[int, list[int]],
    seed: str,
    generation: GenerationInputs,
    on_result: Callable[[int, tuple[list[int], bool]], None],
    on_progress: Callable[[], None],
) -> None:
    """Call on_result(index, (response ids, finished)) for every prompt (index -> ids), in order of completion.

    index: as of `src.model.sampling.seed_of`.
    A server gets and returns text, so the ids are those of its text; a prompt that no text stands for is sent as ids,
    which not every server takes. Raises what ConcurrentClient.map_concurrent does.
    """
    from src.serving.openai_client import ConcurrentClient  # the client is an optional package

    contents = {index: _prompt_content(template, ids) for index, ids in prompts.items()}
    client = ConcurrentClient(url, None, REQUEST_TIMEOUT, MAX_RETRIES, concurrency, grace=0.0)

    def request(index: int, client: openai.OpenAI) -> Any:
        return client.completions.create(
            model=model,
            prompt=contents[index],
            max_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=seed_from_str(seed_of(seed, index, generation)) >> 32,  # not every server takes more than 32 bits
        )

    def parse(completion: Any) -> tuple[list[int], bool]:
        choice = completion.choices[0]
        finished = choice.finish_reason == "stop"
        ids = template.response_ids(choice.text, _ended_by(choice, template))
        return (ids if finished else ids[:-1]), finished

    client.map_concurrent(((index, partial(request, index)) for index in contents), parse, on_result, on_progress)


def _ended_by(choice: Any, template: Template) -> int:
    """Return the token that ended a sample. vLLM names it unless it is the tokenizer's end of sequence; others do not.

    Where it is not known, it is the token that is learned.
    """
    stop = getattr(choice, "stop_reason", template.end_id)
    token = template.tokenizer.eos_token_id if stop is None else stop
    return token if token in template.end_ids else template.end_id


def _prompt_content(template: Template, ids: Sequence[int]) -> str | list[int]:
    """Return the text that a server tokenizes to these ids, or the ids: text that spells a control token has none."""
    tokenizer = template.tokenizer
    for num_skipped in (0, 1):  # servers add a begin token where the tokenizer does
        text = tokenizer.decode(ids[num_skipped:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == list(ids):
            return text
    return list(ids)
