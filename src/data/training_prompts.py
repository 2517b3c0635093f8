"""The prompts of training pairs, to which the SFT model responds where pairs are on-policy."""

from __future__ import annotations

from src.data.row_samples import sample_indices
from src.data.rows import NO_EXPECTATION, ExpectedRows, ProgressFn, Prompt, name_of, no_progress
from src.data.sources import open_source
from src.errors import ConfigError
from src.planning.content import reading
from src.planning.identity import TrainingPromptInputs


def training_prompts(
    inputs: TrainingPromptInputs, expected_rows: ExpectedRows = NO_EXPECTATION, track: ProgressFn = no_progress
) -> list[Prompt]:
    """Return the prompts of the training pairs, each once, in the order of the pairs.

    A smaller num_prompts is a subset of every larger one. Raises ConfigError when there are fewer.
    """
    data, count = inputs.data, inputs.num_prompts
    by_key: dict[tuple[str, ...], Prompt] = {}
    with reading(data.path):
        for pair in track(open_source(data, expected_rows).pairs("train", track), "prompts of training pairs"):
            by_key.setdefault(pair.prompt.stripped_key, pair.prompt)
    prompts = list(by_key.values())
    if count is not None and count > len(prompts):
        raise ConfigError(
            f"pairs.num_prompts={count}: the training pairs of {name_of(data)} have {len(prompts)} prompts; give at "
            f"most pairs.num_prompts={len(prompts)}, or null for all"
        )
    return [prompts[i] for i in sample_indices(len(prompts), count, f"{data.seed}/prompts")]
