"""A sample depends on its prompt and seed, not on its batch or the checkpoint's generation_config."""

import pytest
import torch
from transformers import GenerationConfig

from src.model.sampling import sample
from src.planning.identity import GenerationInputs
from tests.support.small_models import make_model


class Template:
    """The attributes of a template that sampling reads."""

    end_id = 2

    class tokenizer:
        bos_token_id = 1


PROMPTS = [[1, *range(3, 3 + n)] for n in (4, 9, 2, 30, 7, 7, 15)]


def generation_of(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0):
    return GenerationInputs(temperature, top_k, top_p, max_new_tokens, seed=0, server=None)


def draw(generation, model=None, seed="s", batch_size=64):
    model = model or make_model(initializer_range=0.02)
    samples = sample(model, Template(), PROMPTS, seed, generation, batch_size=batch_size)
    return {i: ids for i, ids, _ in samples}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_samples_do_not_depend_on_the_batch(options):
    generation = generation_of(**options)
    single = draw(generation, batch_size=1)
    assert single == draw(generation, batch_size=3) == draw(generation, batch_size=64)


def test_another_seed_draws_other_samples():
    generation = generation_of()
    assert draw(generation) == draw(generation) != draw(generation, seed="t")


def test_a_checkpoints_generation_config_changes_nothing():
    generation = generation_of()
    model = make_model(initializer_range=0.02)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert draw(generation, model) == draw(generation)


def test_tokens_are_drawn_with_the_models_own_probabilities():
    model = make_model(initializer_range=0.3)
    prompts = [[1, 5, 6]] * 4000

    def first_tokens(**options):
        samples = sample(model, Template(), prompts, "s", generation_of(1, **options), batch_size=4000)
        return [ids[0] for _, ids, _ in samples]

    with torch.no_grad():
        expected = model(torch.tensor([[1, 5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(first_tokens()), minlength=len(expected)).double()
    error = (expected * (1 - expected) * 4000).sqrt().clamp(min=1)
    assert ((counts - expected * 4000).abs() / error).max() < 5
    assert set(first_tokens(temperature=0.0)) == {int(expected.argmax())}
    assert set(first_tokens(top_k=3)) <= set(expected.topk(3).indices.tolist())
