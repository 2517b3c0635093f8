"""Checks before anything runs or is submitted: files and models, packages, programs, and hub names. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from src.config.judge_rules import BASELINES, ENDPOINT_JUDGES, by_judge, naming_judge, served_model, split_annotator
from src.config.packages import require_package
from src.config.schema import Model, Point
from src.config.template_rules import end_tokens_of, is_template_file
from src.data.evaluation_prompts import read_answers, read_prompts
from src.data.lm_eval_tasks import check_tasks
from src.data.prompt_rules import check_prompts
from src.data.rows import name_of
from src.data.sources import open_source
from src.data.table_size import num_dataset_pairs
from src.data.templates import missing_token, read_template, tokens_of
from src.data.training_prompts import training_prompts
from src.errors import ConfigError
from src.hardware import check_num_threads, visible_gpus
from src.judges.annotators import read_annotators
from src.judges.difficulties import check_difficulties
from src.judges.prompt_file import LOADERS
from src.model.files import check_model_files, local_tokens, why_not_supported, why_too_long
from src.planning.content import locate
from src.planning.gpus import find_gpu
from src.planning.identity import DataInputs
from src.planning.inputs import pair_data, prompt_inputs, sft_data, training_prompt_inputs
from src.planning.model_shape import hub_config, model_shape
from src.planning.resources import max_sequence_tokens, splits_validation_prompts

HUB_TIMEOUT = 5.0  # seconds

# (config key, repository, kind of repository, revision)
HubName = tuple[str, str, str, str | None]


def check_input_files(points: Sequence[Point]) -> None:
    """Read every row of the local files that points name, and what their models say about themselves.

    Raises ConfigError naming file and line, or model and file; also for a GPU that conf/gpus.yaml does not have.
    """
    for gpu in dict.fromkeys(point.engine.gpu for point in points):
        if gpu is not None:
            find_gpu(gpu)
    for path in dict.fromkeys(point.model.path for point in points):
        check_model_files(path)
    for model in {(p.model.path, p.model.template, repr(p.model.end_token)): p.model for p in points}.values():
        _check_template(model)
    judged = [(key, of_one) for point in points for key, of_one in by_judge(point)]
    for key, name in dict.fromkeys((key, p.judge.model) for key, p in judged if p.judge.name == "reward_model"):
        if name is not None:
            check_model_files(name, f"{key}.model", causal=False)
    for key, name in dict.fromkeys((key, served_model(p.judge)) for key, p in judged):
        if name is not None:
            check_model_files(name, f"{key}.model")
    for name in dict.fromkeys(p.pairs.model for p in points if p.pairs.judge == "reward_model"):
        if name is not None:
            check_model_files(name, "pairs.model", causal=False)
    for point in {repr(p.dataset): p for p in points}.values():
        for data in (sft_data(point), pair_data(point)):
            open_source(data).check()
    for key, point in {repr((p.dataset, p.evaluation, p.judge)): (key, p) for key, p in judged}.values():
        with naming_judge(key):
            _check_judge_files(point)
    for point in {repr((p.dataset, p.pairs.num_prompts)): p for p in points if p.pairs.num_prompts}.values():
        if point.dataset.source != "hub":
            training_prompts(training_prompt_inputs(point))
        else:
            _check_num_prompts(point)
    for path, revision in dict.fromkeys((point.model.path, point.model.revision) for point in points):
        _fetch_config(path, revision)
        _check_hub_config(path, revision)
    for point in {(p.model.path, p.model.revision, max_sequence_tokens(p)): p for p in points}.values():
        _check_sequence_length(point)


def _check_judge_files(point: Point) -> None:
    """Read the prompts of the evaluation, and the files of its judge."""
    if point.dataset.source == "jsonl" and splits_validation_prompts(point):
        _check_two_prompts(pair_data(point))
    judge = point.judge
    if judge.prompt_file is not None:
        LOADERS[judge.name](judge.prompt_file)
    if judge.difficulties is not None:
        check_difficulties(judge.difficulties, "judge.difficulties")
    baseline = None if judge.name == "none" or judge.baseline in BASELINES else judge.baseline
    # Prompts of the hub are not fetched here: planning needs no network.
    if point.evaluation.prompts_file is not None or (baseline is not None and point.dataset.source != "hub"):
        prompts = read_prompts(prompt_inputs(point))
        check_prompts(point, prompts)
        if baseline is not None:
            read_answers(baseline, prompts, "judge.baseline")


def _check_num_prompts(point: Point) -> None:
    """Refuse more prompts than there are pairs; how many of these are of one prompt, the stage that reads them says."""
    count, num_pairs = point.pairs.num_prompts, num_dataset_pairs(point)
    if count is not None and count > num_pairs:  # never more than NaN
        raise ConfigError(
            f"pairs.num_prompts={count}: the dataset has at most {num_pairs:.0f} training pairs; give at most as many, "
            "or null for all"
        )


def _check_template(model: Model) -> None:
    """Refuse a template file that cannot be read, and tokens that a local tokenizer shows not to have."""
    if is_template_file(model.template):
        read_template(model.template)
    needed = dict.fromkeys(tokens_of(model.template), f"template={model.template}")
    needed |= dict.fromkeys(end_tokens_of(model), "end_token")
    known = local_tokens(model.path) if needed else None
    for token, key in needed.items():
        if known is not None and token not in known:
            raise ConfigError(missing_token(key, token))


def _fetch_config(location: str, revision: str | None) -> None:
    """Bring the config.json of a model of the hub into its cache, where nothing here has it.

    Without the hub it is not checked. A name that does not exist is refused later.
    """
    from huggingface_hub import constants, hf_hub_download

    if locate(location) is None and not constants.HF_HUB_OFFLINE and hub_config(location, revision) is None:
        with suppress(Exception):  # of the network, in any library
            hf_hub_download(location, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT)
            model_shape.cache_clear()


def _check_hub_config(location: str, revision: str | None) -> None:
    """Refuse a model of the hub whose log-probs are not supported, as `check_model_files` does with a local one."""
    config = hub_config(location, revision) if locate(location) is None else None
    if config is not None and (reason := why_not_supported(config)):
        raise ConfigError(f"model.path={location}: {reason}")


def _check_sequence_length(point: Point) -> None:
    """Refuse a model that cannot read a whole sequence, where its config can be read on this machine."""
    shape, num_tokens = model_shape(point.model.path, point.model.revision), max_sequence_tokens(point)
    if shape is not None and (reason := why_too_long(shape.config, num_tokens)):
        raise ConfigError(
            f"model.path={point.model.path}: {reason} (the larger of dataset.max_tokens, and dataset.max_prompt_tokens "
            "+ evaluation.generation.max_new_tokens): use smaller ones, or another model"
        )


def _check_two_prompts(data: DataInputs) -> None:
    pairs = open_source(data).pairs("validation")
    if len({pair.prompt.stripped_key for pair in pairs}) < 2:
        raise ConfigError(
            f"{name_of(data)}: all {len(pairs)} validation pairs have the same prompt; selection and reporting need "
            "one each: raise dataset.validation_size, or give pairs of more prompts"
        )


def check_packages(points: Iterable[Point]) -> None:
    """Raise ConfigError when an optional package that a point needs is not installed, or lacks what it names there."""
    for point in points:
        engine, server, capability = point.engine, point.server, point.capability
        if capability.name != "none":
            require_package("lm_eval", f"capability={capability.name}")
            check_tasks(capability.tasks, capability.metrics, capability.task_files)
        if engine.strategy.startswith("zero"):
            require_package("deepspeed", f"engine.strategy={engine.strategy}")
        if point.model.attention == "flash_attention_2":
            require_package("flash_attn", "model.attention=flash_attention_2")
        if engine.fused is True:
            require_package("liger_kernel", "engine.fused=true")
        if server.name != "none":
            require_package("openai", f"server={server.name}")
        if point.pairs.judge == "math":
            require_package("math_verify", "pairs.judge=math")
        for key, of_one in by_judge(point):
            judge = of_one.judge
            with naming_judge(key):
                if judge.name in ENDPOINT_JUDGES:
                    require_package("openai", f"judge={judge.name}")
                if judge.name == "math":
                    require_package("math_verify", "judge=math")
                if judge.name == "alpaca_eval":
                    read_annotators(split_annotator(str(judge.model))[0])


def check_programs(points: Sequence[Point]) -> None:
    """Raise ConfigError when this machine, which runs the points, lacks a server's program or torch's compiler."""
    compiles = any(p.engine.compile and (p.engine.device == "cpu" or not visible_gpus()) for p in points)
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if compiles and shutil.which(compiler) is None:
        raise ConfigError(
            f"engine.compile=true: on a CPU torch compiles with a C++ compiler, and {compiler} is not on PATH; install "
            "it, set CXX, or use engine.compile=false"
        )
    for command in dict.fromkeys(point.server.command for point in points):
        if command is not None and shutil.which(program := shlex.split(command)[0]) is None:
            raise ConfigError(f"server.command: {program} is not on PATH; install it, or give its absolute path")


def check_cpu_threads(points: Iterable[Point]) -> None:
    """Raise ConfigError when a point asks for more CPU threads than this machine, which computes it, has cores."""
    for point in points:
        check_num_threads(point.engine.cpu_threads)


def check_hub(points: Iterable[Point]) -> list[str]:
    """Ask the hub for the models and tables that points name.

    Returns a warning for names that could not be checked. Raises ConfigError for a name that does not exist.
    """
    from huggingface_hub import constants

    names = dict.fromkeys(name for point in points for name in _hub_names(point))
    absent = [name for name in names if not _is_cached(name, Path(constants.HF_HUB_CACHE))]
    for number, name in enumerate(absent):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _query_hub(name)
        if reason is not None:
            settings = ", ".join(f"{key}={repository}" for key, repository, _, _ in absent[number:])
            return [f"could not verify {settings} on the Hub ({reason}); compute nodes need Hub access or a warm cache"]
    return []


def _hub_names(point: Point) -> Iterable[HubName]:
    if locate(point.model.path) is None:
        yield "model.path", point.model.path, "model", point.model.revision
    for key, of_one in by_judge(point):
        judge_model = of_one.judge.model if of_one.judge.name == "reward_model" else served_model(of_one.judge)
        if judge_model is not None and locate(judge_model) is None:
            yield f"{key}.model", judge_model, "model", None
    if point.pairs.judge == "reward_model" and point.pairs.model is not None and locate(point.pairs.model) is None:
        yield "pairs.model", point.pairs.model, "model", None
    data = point.dataset
    if data.source == "hub" and data.path is None:
        for key, table in (*data.tables("sft"), *data.tables("preference")):
            yield f"dataset.{key}.path", table.path, "dataset", None


def _is_cached(name: HubName, cache: Path) -> bool:
    """Return whether the hub's cache on this machine has a table, or a model's weights: planning fetches configs."""
    _, repository, kind, _ = name
    snapshots = cache / f"{kind}s--{repository.replace('/', '--')}" / "snapshots"
    patterns = ("*/*.safetensors", "*/pytorch_model*.bin") if kind == "model" else ("*",)
    return any(any(snapshots.glob(pattern)) for pattern in patterns)


def _query_hub(name: HubName) -> str | None:
    """Return why the hub could not be asked; None when the name exists. Raises ConfigError when it does not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    key, repository, kind, revision = name
    api = HfApi()
    refusals = {
        GatedRepoError: "gated on the hub: request access there and `hf auth login`, or give a local path",
        RepositoryNotFoundError: "neither a local path nor on the hub (or private: `hf auth login`)",
        RevisionNotFoundError: f"the hub has no revision {revision}",
    }
    try:
        info = api.repo_info(repository, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT)
        if getattr(info, "gated", False):
            api.auth_check(repository, repo_type=kind)
    except tuple(refusals) as error:
        raise ConfigError(f"{key}={repository}: {refusals[type(error)]}") from None
    except Exception as error:  # no network on this machine says nothing about the compute nodes
        return type(error).__name__
    return None
