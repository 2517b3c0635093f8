"""What is in memory when a policy is validated, sampled and scored, all in the process that trained it."""

import gc
import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers.cache_utils import Cache

from src import hardware
from src.stages import align, generate
from src.training.engine import TrainingEngine
from tests.support.commands import SMALL, run_in_process


class Census:
    """Notes objects as they are made, and counts those still alive when certain functions are called."""

    def __init__(self, monkeypatch):
        self.patch, self.made, self.counts, self.events = monkeypatch.setattr, {}, {}, []

    def note(self, name, owner, function):
        """Note what owner.function makes: what it returns, or for a constructor its first argument."""
        original, made = getattr(owner, function), self.made.setdefault(name, [])

        def noted(*args, **kwargs):
            result = original(*args, **kwargs)
            made.append(weakref.ref(args[0] if function == "__init__" else result))
            return result

        self.patch(owner, function, noted)

    def count(self, name, owner, function):
        """Count when owner.function is called."""
        self.patch(owner, function, partial(self._counting, name, getattr(owner, function)))

    def _counting(self, name, original, *args, **kwargs):
        self.events.append(name)
        self.counts[name] = {kind: sum(r() is not None for r in made) for kind, made in self.made.items()}
        return original(*args, **kwargs)


@pytest.mark.slow
def test_nothing_of_training_is_held_while_sampling_and_no_cache_while_scoring(tmp_path, monkeypatch):
    census = Census(monkeypatch)
    census.note("optimizers", TrainingEngine, "_optimizer_of")
    census.note("models", generate, "load_for_inference")
    census.note("caches", Cache, "__init__")
    for name, module, function in (
        ("validation", align, "_validate"), ("sampling", generate, "sample"), ("scoring", generate, "iter_kl"),
    ):  # fmt: skip
        census.count(name, module, function)
    # Blocks of GPU memory that torch's allocator keeps are given back where garbage is collected.
    monkeypatch.setattr(hardware, "gc", SimpleNamespace(collect=lambda: census.events.append("release")))
    gc.disable()  # what is freed is freed by the stages
    try:
        done = run_in_process(
            *SMALL, "method=dpo", "beta=0.1", "trainer.sft.max_steps=1", "trainer.align.max_steps=2",
            "evaluation.num_prompts=4", "trainer.max_tokens_per_micro_batch=512", f"output_dir={tmp_path}",
        )  # fmt: skip
    finally:
        gc.enable()
    assert done.returncode == 0, done.stderr
    assert census.counts["validation"]["optimizers"] == 0
    assert census.counts["sampling"] == {"optimizers": 0, "models": 1, "caches": 0}
    assert census.counts["scoring"] == {"optimizers": 0, "models": 2, "caches": 0}
    before = {event: previous for previous, event in pairwise(census.events) if event != "release"}
    assert before == {"validation": "release", "sampling": "release", "scoring": "release"}
    # The control: there was something to free.
    assert {name: len(made) >= 2 for name, made in census.made.items()} == dict.fromkeys(census.made, True)
