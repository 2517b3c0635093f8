"""TRL's side of benchmarks.against_trl: its trainers on the same token ids in the same order."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.our_side import BETA, PAIRS, STEPS, Clock, benchmark_model, tokenizer
from benchmarks.pairs import make_pairs
from src.model.logprobs import SparseOutputLayer


def unpatch(model: Any) -> Any:
    """Return the model with the modules that TRL's users have, in place."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = torch.nn.Linear
        elif isinstance(module, SparseOutputLayer):
            module.__class__ = type(module).__bases__[1]  # type: ignore[assignment]
    assert not any(type(module).__module__.startswith("src.") for module in model.modules())
    model.set_attn_implementation("sdpa")
    return model


def trl_trainer(
    job: dict[str, Any], model: Any, tokenizer: Any, examples: list[Any], steps: int, **changes: Any
) -> Any:
    """Return TRL's trainer on these token ids in this order, with precomputed reference log-probs by default."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    rows = [
        {"prompt_ids": list(e.prompt), "chosen_ids": list(e.responses[0]), "rejected_ids": list(e.responses[1])}
        for e in examples
    ]
    method, micro_batch = job.get("method", "dpo"), job.get("micro_batch", 1)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.get("pairs", PAIRS) // micro_batch,
        "max_steps": steps,
        "bf16": job.get("precision") == "bf16",
        "gradient_checkpointing": job.get("checkpointing", False),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None if method == "dpo" else 4096,
        "use_cpu": job.get("device", "cpu") == "cpu",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.95,
        "max_grad_norm": 2.0,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "beta": BETA,
        **changes,
    }

    class InOrder:
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "row": i} for i in range(len(rows))])
    common = {"model": model, "train_dataset": texts, "processing_class": tokenizer}
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        online = job.get("reference") == "online"
        references = job.get("references", [(-100.0, -100.0)] * len(rows))

        class Dpo(InOrder, DPOTrainer):
            def _prepare_dataset(self, *_: Any, **__: Any) -> Any:
                return Dataset.from_list(rows)

            def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
                for column, values in zip(
                    ("ref_chosen_logps", "ref_rejected_logps"), zip(*references, strict=True), strict=True
                ):
                    dataset = dataset.add_column(column, list(values))
                return dataset

        return Dpo(args=DPOConfig(precompute_ref_log_probs=not online, **options), **common)

    def unpadded(feature: dict[str, Any]) -> dict[str, Any]:
        row, out = rows[feature["row"]], {}
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            out[f"{side}_input_ids"], out[f"{side}_attention_mask"] = ids, [1] * len(ids)
            out[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        return {**out, "prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}

    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class Orpo(InOrder, ORPOTrainer):
            def tokenize_row(self, feature: Any, model: Any = None) -> Any:
                return unpadded(feature)

        return Orpo(args=ORPOConfig(**options), **common)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Simpo(InOrder, CPOTrainer):
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return unpadded(feature)

    return Simpo(args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5 * BETA, **options), **common)


def trl(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    examples = make_pairs(job["shape"], PAIRS * STEPS)
    clock = Clock()

    class StepTimer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer = trl_trainer(job, unpatch(benchmark_model()), tokenizer(), examples, STEPS)
    trainer.add_callback(StepTimer())
    trainer.train()
    return {"seconds": clock.seconds()}
