"""A store of version 0.1 is neither read as this version's nor in the way of it."""

import json
import re

import pytest

from src.config.validation import build_point
from src.planning.plan import make_plan
from src.store.files import with_checksum
from src.store.integrity import describe_files
from src.store.store import Store
from tests.support.commands import dry_run
from tests.support.configs import composed

RUN = ["method=dpo", "beta=0.1"]


def finished_align(folder, description, tokens=1000):
    """Write a finished align stage to the store, as far as estimates read it."""
    stage = folder / "store" / "align" / "0123456789abcdef01234567"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(json.dumps(description))
    done = {"stage": "align", "identity": stage.name, "seconds": 36.0, "tokens": tokens, "processes": 1}
    (stage / "DONE").write_text(json.dumps(with_checksum({**done, "files": describe_files(stage)})))


def description_of_align(folder):
    plan = make_plan([build_point(composed(*RUN, f"output_dir={folder}"))], Store(folder))
    return next(stage for stage in plan.stages.values() if stage.kind == "align").description


def old(description):
    """Return a stage.json as version 0.1 wrote it: one level of fields, under another name."""
    inputs = description["inputs"]
    fields = {**inputs, "model": inputs["model"]["path"], "method": {"name": inputs["method"]}}
    return {"stage": "align", "version": 6, "fields": fields, "upstream": description["upstream"]}


@pytest.mark.parametrize("is_old", [True, False])
def test_estimates_are_calibrated_by_stages_of_this_version_alone(is_old, tmp_path):
    description = description_of_align(tmp_path)
    finished_align(tmp_path, old(description) if is_old else description | {"upstream": {}})
    _, output = dry_run(*RUN, f"output_dir={tmp_path}")
    assert bool(re.search(r"^align +1 +1 k +0.01 +0 +0.01  measured$", output, re.M)) == (not is_old), output
