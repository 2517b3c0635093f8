"""Packed shared-prefix pairs against padded rows, one DPO step each, same model: `python -m benchmarks.log_probs`.

Median of five, in turn, CPU seconds of one thread; shapes: TL;DR (prompt : response about 11 : 1) and
UltraFeedback (about 0.42 : 1). Gradients are compared in the same run. TRL is not part of it.
"""

from __future__ import annotations

import random
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from src.logprobs import sequence_logps
from src.pairs import Example, pack
from tests.padded import padded_logps

SHAPES = {"tldr": (381, 35), "ultrafeedback": (121, 288)}  # prompt and response tokens, medians
PAIRS = 4


def make_model() -> LlamaForCausalLM:
    """SmolLM2-135M's layers, six of its thirty, random weights: time is proportional to layers, head apart."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_hidden_layers=6, tie_word_embeddings=True, **shape))


def make_pairs(prompt: int, response: int) -> list[Example]:
    """Log-normal lengths, sigma 0.3."""
    rng = random.Random(0)

    def tokens(median: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 49152) for _ in range(max(2, round(median * rng.lognormvariate(0, 0.3)))))

    return [Example(tokens(prompt), (tokens(response), tokens(response))) for _ in range(PAIRS)]


def packed(model: LlamaForCausalLM, pairs: list[Example]) -> torch.Tensor:
    return sequence_logps(model, pack(pairs, range(len(pairs))))[0]


def padded(model: LlamaForCausalLM, pairs: list[Example]) -> torch.Tensor:
    return padded_logps(model, pairs, "sdpa")


def main() -> None:
    torch.set_num_threads(1)
    model = make_model()
    for name, (prompt, response) in SHAPES.items():
        pairs = make_pairs(prompt, response)
        taken: dict[str, list[float]] = {"packed": [], "padded": []}
        gradients = {}
        for _ in range(5):
            for way, compute in (("packed", packed), ("padded", padded)):
                model.zero_grad()
                begun = time.process_time()
                logps = compute(model, pairs).view(-1, 2)
                (-F.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1]))).mean().backward()
                taken[way].append(time.process_time() - begun)
                gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        a, b = (statistics.median(taken[way]) for way in ("packed", "padded"))
        difference = (gradients["packed"] - gradients["padded"]).norm() / gradients["padded"].norm()
        print(
            f"{name:14} packed {PAIRS / a:5.2f} pairs/s, padded {PAIRS / b:5.2f}: {b / a:.2f} times as fast, "
            f"gradients differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
