"""AlpacaEval 2: the package alpaca-eval annotates, and computes win rate and length-controlled win rate.

`python -m src.judges.alpaca_eval ANNOTATIONS` computes both from existing annotations.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import openai

from src.data.rows import read_rows
from src.errors import ConfigError, StageError, report_errors
from src.judges import Comparison, Judged, Verdict
from src.judges.answers import is_number
from src.judges.difficulties import FILE, NUM_INSTRUCTIONS, NoDifficulties, check_difficulties, difficulties
from src.judges.judge_client import JudgeClient, Question, usage_of
from src.planning.content import ContentPath, reading
from src.planning.identity import EvaluateInputs, JudgeInputs
from src.planning.resources import Resources
from src.serving.http_client import EndpointHttpClient, MalformedResponse
from src.store.attempt import Attempt
from src.store.files import write_json

log = logging.getLogger(__name__)

OUTPUTS_FILE = "model_outputs.json"
ANNOTATIONS_FILE = "annotations.json"
COLUMNS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
PRICE_COLUMN = "preference_price_per_example"  # the number of tokens, at a price of 1 per token
MAX_ATTEMPTS = 2  # at an annotation without a preference


def alpaca_eval(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Annotate all comparisons: a verdict is the preference (1 to 2) minus one, a tie when there is none.

    Raises StageError when a sample is missing, the endpoint fails or the budget is spent.
    """
    judge = inputs.judge
    assert judge is not None and isinstance(judge.model, ContentPath)
    annotator = judge.model_name
    if len(comparisons) != inputs.prompts.num_prompts and inputs.judged == "all":
        raise StageError(
            f"{len(comparisons)} of {inputs.prompts.num_prompts} instructions have a sample: none may be missing"
        )
    generator = f"{inputs.setup} {attempt.label}"
    rows = [
        {
            "instruction": c.prompt.text,
            "output_1": c.baseline["response"],
            "output_2": c.response["response"],
            "generator_1": c.baseline.get("generator", "baseline"),
            "generator_2": generator,
            "dataset": "alpaca_eval",
        }
        for c in comparisons
    ]
    outputs = [
        {"dataset": "alpaca_eval", "instruction": row["instruction"], "output": row["output_2"], "generator": generator}
        for row in rows
    ]
    write_json(attempt.out / OUTPUTS_FILE, outputs)
    client = JudgeClient(judge, resources.judge, attempt.output_dir, {"preference": is_preference})
    keys, questions = [], {}
    for row in rows:
        texts = row["instruction"], row["output_1"], row["output_2"]
        keys.append(client.key(judge.model.fingerprint, *texts))
        questions[keys[-1]] = Question(partial(_annotate, judge, row), sum(map(len, texts)))
    _load_annotator(judge)  # in the main thread: the package changes the root logger while it is imported
    for _ in range(MAX_ATTEMPTS):
        client.ask_missing(questions, partial(_parse_annotation, client), attempt)
    for key, row in zip(keys, rows, strict=True):
        row |= {"preference": client.answers.known.get(key, {}).get("preference"), "annotator": annotator}
    write_json(attempt.out / ANNOTATIONS_FILE, rows)

    missing = sum(row["preference"] is None for row in rows)
    if missing == len(rows):
        raise StageError(f"judge.model={annotator}: not one of {len(rows)} annotations has a preference")
    usage = usage_of(resources.judge, [client.answers.known.get(key) for key in keys], attempt, missing)
    scores = {}
    if inputs.judged == "all":  # they are of the whole benchmark
        with reading(judge.difficulties):
            scores = win_rates(rows, judge.difficulties.location if judge.difficulties else None)
    return Judged([_verdict(row["preference"]) for row in rows], usage, scores)


def _verdict(preference: float | None) -> Verdict:
    if preference is None:
        return Verdict(0.5, "no preference")
    if preference == 0:  # as some annotators write a tie
        return Verdict(0.5, "preference 0, a tie")
    return Verdict(preference - 1, f"preference {preference:.3f}")


def is_preference(value: Any) -> bool:
    """Return whether the package's win rates count the value: from 1, the baseline wins, to 2; 0 is a tie."""
    return is_number(value) and (value == 0 or 1 <= value <= 2)


def _load_annotator(judge: JudgeInputs) -> Any:
    package, annotator = _import_alpaca_eval(), judge.model
    assert isinstance(annotator, ContentPath)
    with reading(annotator):
        try:
            loaded = package.annotators.PairwiseAnnotator(
                annotators_config=annotator.location, caching_path=None, is_avoid_reannotations=False
            )
            for single in loaded.annotators.values() if judge.asked is not None else ():
                # The package takes a model with "instruct" in its name for one that cannot chat.
                single.completions_kwargs |= {"model_name": judge.asked_name, "requires_chatml": True}
            return loaded
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise StageError(
                f"judge.model={annotator.location}: alpaca-eval cannot load this annotator ({reason})"
            ) from None


def _annotate(judge: JudgeInputs, row: dict[str, Any], client: openai.OpenAI) -> dict[str, Any]:
    """Return the row with its preference, the name of the model, and as its price the number of tokens.

    Raises what the client does, and MalformedResponse for what the package cannot read.
    One row at a time: of many rows the package returns none before all are annotated. Its objects are not safe to share
    between threads, and it would cache the answers in its own folder.
    """
    annotate = _load_annotator(judge)
    http_client = client._client
    assert isinstance(http_client, EndpointHttpClient)
    try:
        (annotation,) = annotate(
            [row],
            openai_api_keys=[client.api_key],
            openai_organization_ids=[None],
            openai_api_base=str(client.base_url),
            client_config_path=os.devnull,  # its own file of clients, OPENAI_CLIENT_CONFIG_PATH, names other endpoints
            client_kwargs={"timeout": client.timeout, "max_retries": client.max_retries, "http_client": http_client},
            num_procs=1,
            price_per_token=1.0,
        )
    except (openai.OpenAIError, MalformedResponse):
        raise
    except Exception as error:  # whatever the package stumbles over
        raise MalformedResponse(f"alpaca-eval cannot use the response ({type(error).__name__})") from None
    latest = http_client.latest
    return annotation | {"model": latest.get("model") if isinstance(latest, dict) else None}


def _parse_annotation(client: JudgeClient, annotation: dict[str, Any]) -> dict[str, Any] | None:
    preference = _to_float(annotation["preference"])
    if not is_preference(preference):
        return None  # then the package gives no price either
    tokens = _to_float(annotation[PRICE_COLUMN])
    usage = {"prompt_tokens": tokens if is_number(tokens) and tokens >= 0 else 0, "completion_tokens": 0}
    return {"preference": preference, **usage, "model": client.read_model(annotation["model"])}


def _to_float(value: Any) -> float:
    return math.nan if value is None else float(value)


def win_rates(rows: Sequence[dict[str, Any]], file: str | None) -> dict[str, dict[str, float]]:
    """Return win_rate and length_controlled_win_rate, each with value and se, in percent.

    rows: annotations in the order of the evaluation set, which is how the package finds an instruction's difficulty.
    file: with the table of difficulties; None: the hub's. The win rate ignores rows without a preference. The
    length-controlled one is left out, with a warning, unless there are 805 rows and the table can be loaded.
    """
    import pandas as pd

    package = _import_alpaca_eval()
    table = pd.DataFrame(rows)
    metrics = package.metrics.get_winrate(table)
    rates = {"win_rate": {"value": float(metrics["win_rate"]), "se": float(metrics["standard_error"])}}
    warning = "no length-controlled win rate: %s"
    if len(rows) != NUM_INSTRUCTIONS:
        log.warning(warning, f"it is fitted to all {NUM_INSTRUCTIONS} instructions, there are {len(rows)}")
        return rates
    try:
        with difficulties(file):
            metrics = package.metrics.get_length_controlled_winrate(table, save_weights_dir=None)
    except NoDifficulties as error:
        log.warning(warning, f"{error}; judge.difficulties=FILE, or --difficulties FILE, names the table {FILE}")
        return rates
    except Exception as error:  # of huggingface_hub, or of a table that is damaged: the annotations are paid for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(warning, f"the table of difficulties could not be loaded: {reason}")
        return rates
    controlled = {"value": float(metrics["length_controlled_winrate"]), "se": float(metrics["lc_standard_error"])}
    return rates | {"length_controlled_win_rate": controlled}


def check_annotations(rows: Sequence[tuple[str, dict[str, Any]]], instructions: Sequence[str]) -> list[dict[str, Any]]:
    """Return the annotations of (where, annotation) pairs once they fit `win_rates`.

    instructions: those of the evaluation set, in its order. Raises ConfigError for a row that is missing, repeated, out
    of order or not an annotation.
    """
    for where, row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise ConfigError(f"{where}: not an annotation, {missing[0]} is missing; it has {', '.join(row)}")
        if not_text := [name for name in COLUMNS if name != "preference" and not isinstance(row[name], str)]:
            raise ConfigError(f"{where}: {not_text[0]} is not text")
        value = row["preference"]
        if value is not None and value == value and not is_preference(value):
            raise ConfigError(f"{where}: preference={value}: must be from 1 to 2, 0 for a tie, or null")
    for name in ("generator_1", "generator_2"):
        if len(generators := {row[name] for _, row in rows}) > 1:
            raise ConfigError(f"{rows[0][0]}: {name} is {' and '.join(sorted(map(repr, generators)))}; must be one")
    if len(rows) != len(instructions):
        raise ConfigError(f"{rows[-1][0]}: ends after {len(rows)} annotations of {len(instructions)} instructions")
    for (where, row), instruction in zip(rows, instructions, strict=True):
        if row["instruction"] != instruction:
            raise ConfigError(
                f"{where}: expected the instruction {instruction[:60]!r}; the package finds difficulties by position, "
                "so annotations must be in the order of the evaluation set"
            )
    return [row for _, row in rows]


@cache
def _import_alpaca_eval() -> Any:
    """Import alpaca_eval without its side effects on logging.

    It sets the root logger's level when imported, and logs every request to it.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import alpaca_eval
        import alpaca_eval.annotators  # noqa: F401
        import alpaca_eval.metrics  # noqa: F401

    root.setLevel(level)
    folder = os.path.dirname(alpaca_eval.__file__)
    root.addFilter(lambda record: not record.pathname.startswith(folder))
    return alpaca_eval


def main(arguments: Sequence[str] | None = None) -> None:
    """Print win rate and length-controlled win rate of annotations, after a check of their number and order."""
    parser = argparse.ArgumentParser(prog="python -m src.judges.alpaca_eval", description=main.__doc__)
    parser.add_argument("annotations", help="annotations.json of alpaca-eval, or of judge=alpaca_eval")
    parser.add_argument("--difficulties", help="the benchmark's df_gamed.csv, instead of the hub's")
    parser.add_argument("--questions", required=True, help="the evaluation set, alpaca_eval_gpt4_baseline.json")
    args = parser.parse_args(arguments)
    with report_errors():
        if args.difficulties is not None:
            check_difficulties(args.difficulties, "--difficulties")
        questions = [row for _, row in read_rows(args.questions, "--questions")]
        if not all("instruction" in row for row in questions):
            raise ConfigError(f"--questions {args.questions}: an entry has no instruction")
        instructions = [row["instruction"] for row in questions]
        rows = check_annotations(read_rows(args.annotations, "annotations"), instructions)
        num_preferences = sum(not math.isnan(_to_float(row["preference"])) for row in rows)
        print(f"{rows[0]['generator_2']} against {rows[0]['generator_1']}, {num_preferences} preferences")
        for name, score in win_rates(rows, args.difficulties).items():
            print(f"{name:26} {score['value']:.2f} ± {score['se']:.2f}")


if __name__ == "__main__":
    main()
