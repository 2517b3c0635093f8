"""A sample belongs to its prompt: not to the batch it was drawn in, nor to settings nobody sees."""

import pytest
import torch
from transformers import GenerationConfig

from src.config.schema import Generation
from src.model.sampling import sample
from tests.support.small_models import make_model


class Template:
    """As much of a template as sampling needs."""

    end_id = 2

    class tokenizer:
        bos_token_id = 1


PROMPTS = [[1, *range(3, 3 + n)] for n in (4, 9, 2, 30, 7, 7, 15)]


def draw(generation, model=None, seed="s"):
    model = model or make_model(initializer_range=0.02)
    return {i: ids for i, ids, _ in sample(model, Template(), PROMPTS, seed, generation)}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_samples_do_not_depend_on_the_batch(options):
    one = draw(Generation(max_new_tokens=12, batch_size=1, **options))
    assert one == draw(Generation(max_new_tokens=12, batch_size=3, **options))
    assert one == draw(Generation(max_new_tokens=12, batch_size=64, **options))


def test_another_seed_draws_other_samples():
    generation = Generation(max_new_tokens=12)
    assert draw(generation) == draw(generation) != draw(generation, seed="t")


def test_a_checkpoints_own_generation_settings_change_nothing():
    generation = Generation(max_new_tokens=12)
    model = make_model(initializer_range=0.02)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert draw(generation, model) == draw(generation)


def test_tokens_are_drawn_with_the_models_own_probabilities():
    model = make_model(initializer_range=0.3)
    prompts, generation = [[1, 5, 6]] * 4000, Generation(max_new_tokens=1, batch_size=4000)
    drawn = torch.tensor([ids[0] for _, ids, _ in sample(model, Template(), prompts, "s", generation)])
    with torch.no_grad():
        expected = model(torch.tensor([[1, 5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    error = (expected * (1 - expected) * 4000).sqrt().clamp(min=1)
    assert ((counts - expected * 4000).abs() / error).max() < 5
    greedy = Generation(max_new_tokens=1, temperature=0.0)
    assert next(sample(model, Template(), [[1, 5, 6]], "s", greedy))[1] == [int(expected.argmax())]
    top = Generation(max_new_tokens=1, top_k=3, batch_size=4000)
    kept = {ids[0] for _, ids, _ in sample(model, Template(), prompts, "s", top)}
    assert kept <= set(expected.topk(3).indices.tolist())
