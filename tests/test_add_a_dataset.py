"""docs/add-a-dataset.md, worked through."""

import json
import random
import re

import pandas as pd
import pytest

from tests.support.commands import SMALL
from tests.support.worked_example import WorkedExample

SCORES = [3.0, 8.5, 1.0, 6.0]


def copy_of_ultrafeedback(folder, rows=100):
    """Write a table like openbmb/UltraFeedback: one split, four scored completions; the second table links to it."""
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(["the", "cat", "sat", "on", "a", "mat", "again"], k=draw.randint(3, 12)))

    table = []
    for number in range(rows):
        answers = [{"model": f"m{s}", "response": f"{text()} {s}", "overall_score": s} for s in SCORES]
        table.append({"source": "x", "instruction": f"{text()} {number}", "models": ["m"], "completions": answers})
    (folder / "sft").mkdir(parents=True)
    pd.DataFrame(table).to_json(folder / "sft" / "train.jsonl", orient="records", lines=True)
    (folder / "preference").symlink_to("sft")


@pytest.mark.slow
def test_the_page_adds_a_dataset_up_to_the_report(tmp_path):
    example = WorkedExample("add-a-dataset.md", tmp_path / "project")
    named = ("dataset=ultrafeedback_scored", "dataset.path=copy", "judge=none", "evaluation=preference")
    refused = example.run("src.train", *named, "dry_run=true")
    assert refused.returncode == 2 and "dataset/ultrafeedback_scored" in refused.stderr  # without the page
    example.apply()
    refused = example.run("src.train", *named)
    assert refused.returncode == 2 and "dataset.path=copy: missing folder sft" in refused.stderr

    copy_of_ultrafeedback(example.folder / "copy")
    small = [option for option in SMALL if not option.startswith("dataset.")]
    more = {
        "src.train": [*small, "dataset.validation_size=3", "evaluation.num_prompts=2", f"output_dir={tmp_path}"],
        "pytest": ["-k", "ultrafeedback_scored or every_key_of_every_config_has_a_comment or choices_of_the_schema"],
    }
    _, tests, plan, sweep = example.run_commands(more)
    assert "3 passed" in tests and "1 points: 0 done" in plan
    assert re.search(r"│ DPO +│", sweep) and re.search(r"│ ASFT +│", sweep)
    assert (tmp_path / "sweeps" / "scored" / "report.html").exists()

    # Rows with too few answers or other columns are named.
    lines = (example.folder / "copy/sft/train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    single = json.dumps(row | {"completions": row["completions"][:1]})
    for text, message in (
        (single, "train[:97%], row 0: 1 completions; a pair needs two"),
        (json.dumps({"instruction": "x"}), "train[:97%], row 0: adapter=scored cannot read it ("),
    ):
        (example.folder / "copy/sft/train.jsonl").write_text("\n".join([text, *lines[1:]]))
        refused = example.run("src.train", *named)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
