"""AlpacaEval 2: the package alpaca-eval annotates; win rate and length-controlled win rate are its own.
`python -m src.judges.alpaca_eval ANNOTATIONS` computes them from annotations that are there."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from src.data.rows import read_rows
from src.errors import USER_FACING_ERRORS, ConfigError, StageError, describe_failure
from src.judges import Comparison, Judged, Verdict
from src.judges.answers import Answers
from src.judges.judge_client import JudgeClient, Question, usage
from src.planning.identity import ContentPath, EvaluateInputs, digest
from src.planning.resources import JudgeEndpoint, Resources
from src.store.files import write_json
from src.store.store import Store

if TYPE_CHECKING:
    import openai

    from src.store.attempt import Attempt

log = logging.getLogger(__name__)

QUESTIONS = 805  # of the evaluation set
OUTPUTS_FILE = "model_outputs.json"
ANNOTATIONS_FILE = "annotations.json"
COLUMNS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
TOKENS = "preference_price_per_example"  # at a price of 1
PASSES = 2  # over the comparisons without a preference


def alpaca_eval(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """A verdict is the annotator's preference less one, a tie where it has none after two attempts. Raises StageError
    when the endpoint fails or the budget is spent."""
    judge = inputs.judge
    assert judge is not None and isinstance(judge.model, ContentPath)
    name = judge.model_name
    if len(comparisons) != inputs.prompts.num_prompts:
        raise StageError(
            f"{len(comparisons)} of {inputs.prompts.num_prompts} questions have a sample: none may be missing"
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
        {
            "dataset": row["dataset"],
            "instruction": row["instruction"],
            "output": row["output_2"],
            "generator": generator,
        }
        for row in rows
    ]
    write_json(attempt.out / OUTPUTS_FILE, outputs)
    answers = Answers(Store(attempt.output_dir).answers("alpaca_eval", name))
    annotator = judge.model.fingerprint
    keys = [digest([annotator, row["instruction"], row["output_1"], row["output_2"]]) for row in rows]
    endpoint, annotate = JudgeClient(judge, resources.judge, answers), _Annotator(name, resources.judge)
    parts = ("instruction", "output_1", "output_2")
    questions = {
        key: Question(partial(annotate, row), sum(len(row[part]) for part in parts))
        for key, row in zip(keys, rows, strict=True)
    }
    for _ in range(PASSES):
        endpoint.gather(questions, _read, attempt)
    for key, row in zip(keys, rows, strict=True):
        row |= {"preference": answers.known.get(key, {}).get("preference"), "annotator": name}
    write_json(attempt.out / ANNOTATIONS_FILE, rows)

    missing = sum(row["preference"] is None for row in rows)
    if missing == len(rows):
        raise StageError(f"judge.model={name}: not one of {len(rows)} annotations has a preference")
    took = usage(resources.judge, [answers.known[key] for key in keys if key in answers.known], attempt, missing)
    if missing:
        level = logging.WARNING if 10 * missing > len(rows) else logging.INFO
        log.log(level, "%s: %d of %d annotations have no preference", attempt.label, missing, len(rows))
    verdicts = [
        Verdict(0.5, "no preference")
        if row["preference"] is None
        else Verdict(row["preference"] - 1, f"preference {row['preference']:.3f}")
        for row in rows
    ]
    return Judged(verdicts, took | {"answers": len(rows)}, win_rates(rows))


class _Annotator:
    """One row after the other through the package, from several threads; each answer is kept here as it comes, where
    the package would write many at once, and into itself."""

    def __init__(self, name: str, endpoint: JudgeEndpoint) -> None:
        self._name, self._endpoint, self._own = name, endpoint, threading.local()
        _package()  # imported by one thread

    def __call__(self, row: dict[str, Any], client: openai.OpenAI) -> dict[str, Any]:
        """The row with its preference, and as its price the number of tokens. Raises what the client does."""
        if not hasattr(self._own, "pairwise"):
            self._own.pairwise = _package().annotators.PairwiseAnnotator(
                annotators_config=self._name, caching_path=None, is_avoid_reannotations=False
            )
        settings = {"timeout": self._endpoint.timeout, "max_retries": 0, "http_client": client._client}
        (found,) = self._own.pairwise(
            [row],
            openai_api_keys=[client.api_key],
            openai_api_base=str(client.base_url),
            client_kwargs=settings,
            num_procs=1,
            price_per_token=1.0,
        )
        return found


def _read(found: dict[str, Any]) -> dict[str, float] | None:
    preference = _number(found["preference"])
    if math.isnan(preference):
        return None
    return {"preference": preference, "prompt_tokens": _number(found[TOKENS]), "completion_tokens": 0}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def win_rates(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """win_rate and length_controlled_win_rate, each value and se, percent; rows without a preference have no part in
    the first. The second is left out when there are not 805 rows, or the package cannot have its table of difficulties.

    rows: in the order of the evaluation set, which is how the package finds a row's difficulty.
    """
    import pandas as pd

    package = _package()
    table = pd.DataFrame(rows)
    found = package.metrics.get_winrate(table)
    rates = {"win_rate": {"value": float(found["win_rate"]), "se": float(found["standard_error"])}}
    if len(rows) != QUESTIONS:
        log.warning(
            "no length-controlled win rate: it is fitted to all %d questions, here are %d", QUESTIONS, len(rows)
        )
        return rates
    try:
        found = package.metrics.get_length_controlled_winrate(table, save_weights_dir=None)
    except OSError as error:  # also of huggingface_hub, without a network
        log.warning("no length-controlled win rate: the table of difficulties cannot be had: %s", _first_line(error))
        return rates
    controlled = {"value": float(found["length_controlled_winrate"]), "se": float(found["lc_standard_error"])}
    return rates | {"length_controlled_win_rate": controlled}


def checked(rows: Sequence[tuple[str, dict[str, Any]]], questions: Sequence[str]) -> list[dict[str, Any]]:
    """(where, annotation) as a file has them -> what win_rates may have. questions: the instructions of the evaluation
    set in its order. Raises ConfigError for a row that is missing, twice, elsewhere or no annotation."""
    for where, row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise ConfigError(f"{where}: no {missing[0]}, so no annotation; it has {', '.join(row)}")
        value = row["preference"]
        if value is not None and not (isinstance(value, int | float) and (math.isnan(value) or 0 <= value <= 2)):
            raise ConfigError(f"{where}: preference={value} is none; it is from 1 to 2, 0 for a tie, or null")
    for name in ("generator_1", "generator_2"):
        if len(found := {row[name] for _, row in rows}) > 1:
            raise ConfigError(f"{rows[0][0]}: {name} is {' and '.join(sorted(map(repr, found)))}; one model a file")
    if len(rows) != len(questions):
        raise ConfigError(f"{rows[-1][0]}: ends after {len(rows)} annotations of {len(questions)} questions")
    for (where, row), instruction in zip(rows, questions, strict=True):
        if row["instruction"] != instruction:
            raise ConfigError(
                f"{where}: the question at this place is {instruction[:60]!r}; difficulty goes by place, so "
                "annotations in another order give another length-controlled win rate"
            )
    return [row for _, row in rows]


def _instructions(file: str | None) -> list[str]:
    """Of the evaluation set, from a file of it or from the hub."""
    if file is not None:
        rows = [row for _, row in read_rows(file, "--questions")]
    else:
        try:
            rows = list(_package().constants.ALPACAEVAL_REFERENCE_OUTPUTS())
        except Exception as error:  # datasets and huggingface_hub raise many kinds; all mean it cannot be had
            raise ConfigError(
                f"the evaluation set cannot be had from the hub ({_first_line(error)}): give --questions FILE, "
                "alpaca_eval_gpt4_baseline.json"
            ) from error
    if not all("instruction" in row for row in rows):
        raise ConfigError(f"--questions {file}: a question has no instruction")
    return [row["instruction"] for row in rows]


@cache
def _package() -> Any:
    """alpaca_eval, which on import sets the root logger's level, and then logs to it all that it does and meets: here
    attempt.step says how far it is, errors what is wrong, and what has no preference is counted."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import alpaca_eval
        import alpaca_eval.annotators
        import alpaca_eval.constants
        import alpaca_eval.metrics

    root.setLevel(level)
    home = os.path.dirname(alpaca_eval.__file__)
    root.addFilter(lambda record: not record.pathname.startswith(home))
    return alpaca_eval


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Win rate and length-controlled win rate of annotations, whose number and order are checked first."""
    parser = argparse.ArgumentParser(prog="python -m src.judges.alpaca_eval", description=main.__doc__)
    parser.add_argument("annotations", help="annotations.json of alpaca-eval, or of judge=alpaca_eval")
    parser.add_argument("--questions", help="the evaluation set, alpaca_eval_gpt4_baseline.json; else from the hub")
    given = parser.parse_args(arguments)
    try:
        rows = checked(read_rows(given.annotations, "annotations"), _instructions(given.questions))
        with_one = sum(not math.isnan(_number(row["preference"])) for row in rows)
        print(f"{rows[0]['generator_2']} against {rows[0]['generator_1']}, {with_one} preferences")
        for name, score in win_rates(rows).items():
            print(f"{name:26} {score['value']:.2f} ± {score['se']:.2f}")
    except USER_FACING_ERRORS as error:
        sys.exit(f"error: {describe_failure(error)}")


if __name__ == "__main__":
    main()
