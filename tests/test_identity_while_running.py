"""A result is published under the identity of what was read, also where files change between planning and the end."""

import json
import shutil
import signal

import pytest

from src.data.rows import NO_EXPECTATION
from src.data.tokenization import load_examples
from src.errors import StageError
from src.model.loading import load_template
from src.planning.content import content_paths
from src.planning.stage import stages_of
from src.stages import runner
from src.store.store import Store
from tests.support.artifacts import results
from tests.support.commands import ROOT, SMALL, start, train
from tests.support.configs import TINY, point
from tests.support.kills import stopping_at, wait_until_stopped
from tests.support.waiting import wait_until

MINI_BASE = ROOT / "src" / "data" / "mini_tldr_base"


def pairs(word, count=12):
    rows = [{"prompt": f"question {i}", "chosen": f"{word} {i}", "rejected": f"bad {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path):
    """Write one of every kind of file that a config can name."""
    shutil.copytree(MINI_BASE, tmp_path / "model")
    shutil.copytree(MINI_BASE, tmp_path / "reward")
    (tmp_path / "pairs.jsonl").write_text(pairs("good"))
    (tmp_path / "prompts.jsonl").write_text(json.dumps([{"instruction": "one"}, {"instruction": "two"}]))
    (tmp_path / "answers.jsonl").write_text('{"instruction": "a question", "output": "an answer"}\n')
    template = {"system_prompt": "judge", "prompt_template": ["{question_1} {answer_1} {answer_2}"]}
    (tmp_path / "judge.yaml").write_text(json.dumps(template))
    for name in ("sft", "preference"):
        for split in ("train", "test"):
            (tmp_path / "table" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "table" / name / f"{split}.jsonl").write_text(pairs("good"))
    return tmp_path


JSONL = [
    "dataset=jsonl",
    "dataset.max_tokens=160",
    "dataset.max_prompt_tokens=112",
    "judge=none",
    "evaluation=preference",
    "dataset.path={files}/pairs.jsonl",
]
ARENA = [
    *("evaluation=arena_hard", "evaluation.prompts_file={files}/prompts.jsonl", "evaluation.num_prompts=2"),
    *("judge=arena_hard", "judge.model=m", "judge.baseline={files}/answers.jsonl"),
    "judge.prompt_file={files}/judge.yaml",
]
REWARD = ["judge=reward_model", "judge.model={files}/reward", "judge.baseline=sft", "evaluation.metric=win_rate"]
TABLE = [
    *("setup=llama32_3b_tldr", "model.path={files}/model", "dataset.path={files}/table"),
    *("judge=none", "evaluation.metric=reward_accuracy"),
]

# config key -> overrides that name the file, the file that is changed, and the stages that must not run then
ALL = {"sft", "reference", "align", "generate", "evaluate"}
CASES = {
    "dataset.path": (JSONL, "pairs.jsonl", ALL),
    "model.path": (["model.path={files}/model"], "model/model.safetensors", ALL - {"evaluate"} | {"baseline"}),
    "model.path, its tokenizer": (["model.path={files}/model"], "model/tokenizer.json", ALL - {"evaluate"}),
    "dataset.path, a table": (TABLE, "table/preference/train.jsonl", ALL),
    "evaluation.prompts_file": (ARENA, "prompts.jsonl", {"generate", "evaluate"}),
    "judge.baseline": (ARENA, "answers.jsonl", {"evaluate"}),
    "judge.prompt_file": (ARENA, "judge.yaml", {"evaluate"}),
    "judge.model": (REWARD, "reward/model.safetensors", {"evaluate"}),
}


def stages(files, overrides):
    return {s.role: s for s in stages_of(point(*TINY, *(o.format(files=files) for o in overrides)))}


def edit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("case", CASES)
def test_a_stage_does_not_run_when_a_file_changed_since_it_was_planned(files, case, monkeypatch):
    overrides, name, refused = CASES[case]
    if case.startswith(("judge.", "evaluation.")):
        overrides = [*JSONL, *overrides]
    ran = []
    monkeypatch.setattr(runner, "_run", lambda stage, *_: ran.append(stage.role))
    before, store = stages(files, overrides), Store(files / "undisturbed")
    for stage in before.values():
        runner.compute_or_wait(stage, store)
    assert ran == list(before), "undisturbed, every stage runs"
    edit(files / name)
    key = case.partition(",")[0]
    for role, stage in before.items():
        if role in refused:
            with pytest.raises(StageError, match=rf"^{key}=\S+ changed since this run was planned: run the same"):
                runner.compute_or_wait(stage, Store(files / "disturbed"))
    assert refused.isdisjoint(ran[len(before) :]), "not one of them began"
    assert refused <= before.keys()


def test_the_stages_of_a_point_read_all_files_that_its_config_names(files):
    overrides = [*JSONL, *ARENA, "model.path={files}/model"]
    keys = {path.key for stage in stages(files, overrides).values() for path in content_paths(stage.inputs)}
    named = {"dataset.path", "model.path", "evaluation.prompts_file", "judge.baseline", "judge.prompt_file"}
    assert keys == named
    sft = stages(files, JSONL)["sft"]
    assert "dataset.path" in {path.key for path in content_paths(sft.resources.pairs)}


@pytest.mark.parametrize("meanwhile", ["nothing", "replaced and put back", "replaced"])
def test_a_file_that_is_replaced_while_a_stage_reads_it_publishes_nothing(files, meanwhile, monkeypatch):
    stage, store, file = stages(files, JSONL)["sft"], Store(files / "outputs"), files / "pairs.jsonl"

    def run(*_):
        if meanwhile != "nothing":
            content = file.read_text()
            file.write_text(pairs("evil"))
            if meanwhile == "replaced and put back":
                file.write_text(content)

    monkeypatch.setattr(runner, "_run", run)
    if meanwhile == "nothing":
        runner.compute_or_wait(stage, store)
        assert store.is_done(stage)
    else:
        with pytest.raises(StageError, match=r"^dataset\.path=\S+pairs\.jsonl .*: run the same command again$"):
            runner.compute_or_wait(stage, store)
        assert not store.is_done(stage)


@pytest.mark.parametrize("overrides, name", [(JSONL, "pairs.jsonl"), (TABLE, "table/preference/train.jsonl")])
def test_tokens_of_other_rows_are_never_kept_under_a_file_s_key(files, overrides, name):
    """Rows are read once per process, so nothing that was read while the file was another may stay in memory either."""
    stage, file = stages(files, overrides)["align"], files / name
    original = file.read_text()

    class Attempt:
        output_dir = files / "outputs"

        @staticmethod
        def track(rows, description):
            return rows

    def texts():
        template = load_template(stage.inputs.model)
        data = load_examples(stage.inputs.data, stage.inputs.model, "train", template, Attempt, NO_EXPECTATION)
        return {template.text(list(response)) for example in data.examples for response in example.responses}

    file.write_text(pairs("evil"))
    with pytest.raises(StageError, match=r"^dataset\.path=\S+ changed since this run was planned"):
        texts()
    assert not list((files / "outputs").rglob("*.arrow"))
    file.write_text(original)
    assert "good" in str(texts()) and "evil" not in str(texts())


def published(folder):
    return {key: value for key, value in results(folder).items() if not key.endswith("result.json")}


@pytest.mark.slow
def test_a_sweep_whose_files_are_replaced_before_they_are_read_publishes_nothing_wrong(files):
    output_dir, file = files / "outputs", files / "model/model.safetensors"
    sweep = ["-m", *SMALL, f"model.path={files}/model", "beta=0.1,1", "sweep.name=s"]
    original = file.read_bytes()
    # Its record is written once it is planned, before any stage runs.
    process = start(*sweep, f"output_dir={output_dir}", env=stopping_at("sweeps/s/sweep.json"))
    wait_until_stopped(process)
    edit(file)
    process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1, printed
    assert f"model.path={files}" in printed and "changed since this run was planned" in printed
    assert not list((output_dir / "store").glob("*/*/DONE"))
    file.write_bytes(original)
    train(*sweep, f"output_dir={output_dir}")
    train(*sweep, f"output_dir={files / 'undisturbed'}")
    assert published(output_dir) == published(files / "undisturbed")


@pytest.mark.slow
def test_jobs_that_wait_in_the_queue_do_not_read_a_file_that_was_replaced(files, slurm):
    from tests.support.on_slurm import SLURM, START_LATER, is_finished, queue, sweep, wait_queue_empty

    output_dir, file = files / "outputs", files / "pairs.jsonl"
    file.write_text(original := pairs("good", 64))
    small = [o for o in SMALL if not o.startswith("dataset.")]
    points = ["-m", *small, *(o.format(files=files) for o in JSONL), "beta=0.1,1", "dataset.validation_size=8"]
    points += ["sweep.name=s", f"output_dir={output_dir}"]
    train(*points, *SLURM, START_LATER)
    file.write_text(pairs("evil", 64))
    for job in queue(slurm):
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    wait_queue_empty(slurm)
    wait_until(lambda: is_finished(sweep(output_dir, "s")), 60, "the sweep to finish")
    failures = [p["error"] for p in sweep(output_dir, "s").read()["points"]]
    assert all("changed since this run was planned" in str(error) for error in failures), failures
    assert not list((output_dir / "store").glob("*/*/DONE"))
    file.write_text(original)
    train(*points)
    train(*points[:-1], f"output_dir={files / 'undisturbed'}")
    assert published(output_dir) == published(files / "undisturbed")
