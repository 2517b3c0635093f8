"""The other side of benchmarks.against_trl: TRL's trainers on the same token ids in the same order."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from benchmarks.our_side import BETA, PAIRS, STEPS, between, model_of, tokenizer
from benchmarks.pairs import make_pairs


def plain(model: Any) -> Any:
    """The model as TRL's users have it."""
    import torch

    from src.model.cpu.linear import Linear
    from src.model.last_layer import GatedMLP, LastLayer, RMSNorm

    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = torch.nn.Linear
        elif isinstance(module, GatedMLP | LastLayer | RMSNorm):
            module.__class__ = type(module).__bases__[1]
    assert not any(type(module).__module__.startswith("src.") for module in model.modules())
    model.set_attn_implementation("sdpa")
    return model


def trl_trainer(
    job: dict[str, Any], model: Any, tokenizer: Any, examples: list[Any], steps: int, **changes: Any
) -> Any:
    """TRL's trainer on the same token ids in the same order, its reference log-probs at hand unless asked otherwise."""
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
        "use_cpu": True,
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

    def padded_later(feature: dict[str, Any]) -> dict[str, Any]:
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
                return padded_later(feature)

        return Orpo(args=ORPOConfig(**options), **common)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Simpo(InOrder, CPOTrainer):
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return padded_later(feature)

    return Simpo(args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5 * BETA, **options), **common)


def trl(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    examples = make_pairs(job["shape"], PAIRS * STEPS)
    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    trainer = trl_trainer(job, plain(model_of()), tokenizer(), examples, STEPS)
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": between(times)}
