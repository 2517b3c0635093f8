"""A sweep with models, samples and judgements on disk, none computed: the embedded model stands for every point's."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from benchmarks.aggregation import make_sweep
from src.store.files import read_json, with_checksum, write_json, write_jsonl
from src.store.integrity import DONE, describe_files
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import best_yaml
from sweeps.analysis import reporting_split
from sweeps.analysis.results import collect
from sweeps.report.escapes import csv_text
from tests.support.chat_model import EMBEDDED
from tests.support.commands import run_in_process
from tests.support.configs import point as composed_point

METHODS = ("dpo", "nca")
SAMPLES = 3  # of each point
SFT = "sft-model"  # identity


def publishable_sweep(output_dir: Path, *overrides: str, setup: str = "mini_tldr", seeds: int = 1) -> SweepFolder:
    """Write two methods over three betas. overrides: of the config that the points were run with."""
    folder = make_sweep(output_dir, seeds=seeds, lrs=1, betas=3, methods=METHODS, setup=setup)
    record, store = folder.read(), folder.store.root
    config = json.loads(json.dumps(asdict(composed_point("method=dpo", f"output_dir={output_dir}", *overrides))))
    sft = copy_model(store / "sft" / SFT, {"rows": 64, "dropped": {}})
    write_json(sft / "stage.json", {"upstream": {}})
    finish(sft)
    for point in record["points"]:
        point["stages"]["sft"] = SFT
        align, generate, evaluate = (store / kind / point["stages"][kind] for kind in ("align", "generate", "evaluate"))
        copy_model(align, {"pairs": 32, "dropped": {"train": {"too long": 2}}})
        write_jsonl(align / "metrics.jsonl", [{"step": i, "loss": 0.5, "rewards/margins": 0.1} for i in range(2)])
        write_jsonl(align / "validation.jsonl", [{"prompt": 0, "loss": 0.5, "margin": 0.1, "logps": [-1.0, -2.0]}])
        generate.mkdir(parents=True)
        texts = [{"prompt": f"prompt {i}", "response": f"{point['method']} {i} \ud83d"} for i in range(SAMPLES)]
        rows = [{"index": i, **text, "finished": True, "tokens": 2, "kl": 0.1} for i, text in enumerate(texts)]
        (generate / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        verdicts = [{"index": i, "verdict": 1.0, "reason": "longer", "grade": 7} for i in range(SAMPLES)]
        write_jsonl(evaluate / "judgements.jsonl", verdicts)
        result = read_json(evaluate / "result.json")
        write_json(evaluate / "result.json", result | {"judge": {"name": "gold", "scores": {}}})
        write_json(evaluate / "run_config.json", config)
        write_json(align / "stage.json", {"upstream": {"init": SFT}})
        write_json(generate / "stage.json", {"upstream": {"checkpoint": align.name}})
        write_json(evaluate / "stage.json", {"upstream": {"align": align.name, "samples": generate.name}})
        for stage in (align, generate, evaluate):
            finish(stage)
    record["command"] = f"python -m src.train -m method=dpo,nca beta=grid output_dir={output_dir} judge.concurrency=2"
    folder.write(record | {"code": {"commit": "0123abc", "dirty": False}})
    write_points(folder)
    return folder


def write_points(folder: SweepFolder) -> None:
    """Write points.csv and best.yaml as an aggregation would, and an empty report, which nothing reads."""
    folder.tables.mkdir(exist_ok=True)
    folder.report.write_text("")
    results = collect([folder])
    folder.points_csv.write_bytes(csv_text(results.points))
    _, best = reporting_split.selected_points(results, "best")
    folder.best_yaml.write_text(best_yaml(best, results.settings))


def copy_model(stage: Path, data: dict[str, object]) -> Path:
    """Write what a stage that trains publishes."""
    shutil.copytree(EMBEDDED, stage)
    write_json(stage / "data.json", data)
    return stage


def finish(stage: Path) -> None:
    """Write DONE of a stage whose files are written."""
    (stage / DONE).unlink(missing_ok=True)
    versions = {"torch": "2.13.0"}
    done = {"identity": stage.name, "seconds": 1.0, "versions": versions, "files": describe_files(stage)}
    write_json(stage / DONE, with_checksum(done))


def publish_adapters(folder: SweepFolder, base: str) -> None:
    """Replace every aligned model by LoRA adapters that have changed it. base: what they name as their model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from src.model.adapters import adapter_of, save_adapter

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(EMBEDDED),
        LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"),
    )
    for point in folder.read()["points"]:
        stage = folder.store.root / "align" / point["stages"]["align"]
        for path in stage.iterdir():
            if path.name not in ("data.json", "metrics.jsonl", "validation.jsonl", "stage.json"):
                path.unlink()
        save_adapter(adapter_of(model), base, stage, torch.float32)
        finish(stage)


def push(folder, *arguments, to="me/demo"):
    return run_in_process(folder.path, "--to", to, *arguments, module="sweeps.push")


def refusal(done, code=2):
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    return done.stderr
