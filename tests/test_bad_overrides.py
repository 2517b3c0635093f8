"""Every bad override is one line that begins with it, before anything is written; and every number has bounds."""

import os
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass

import pytest
import yaml

from launchers.slurm.options import SlurmOptions
from src.config.hydra_setup import override_text
from src.config.schema import Point
from src.config.validation import build_point
from sweeps.aggregate import BEST_YAML_KEYS, best_yaml
from sweeps.search.variants import variant_text, varying_settings
from tests.support.commands import ROOT, environment, run_in_process
from tests.support.configs import composed


def numeric_fields(schema, prefix=""):
    """Yield (dotted key, field) of every field of a schema that holds numbers, also in lists, tuples and dicts."""
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        kinds, todo = set(), [hints[f.name]]
        while todo:
            kind = todo.pop()
            kinds.add(kind)
            todo += typing.get_args(kind)
        for kind in kinds:
            if is_dataclass(kind):
                yield from numeric_fields(kind, f"{prefix}{f.name}.")
        if kinds & {int, float}:
            yield prefix + f.name, f


@pytest.mark.parametrize("schema", [Point, SlurmOptions])
def test_every_number_of_the_schema_has_finite_bounds(schema):
    numbers = dict(numeric_fields(schema))
    assert len(numbers) > 5
    for key, spec in numbers.items():
        assert "interval" in spec.metadata, key
        for odd in (float("nan"), float("inf"), float("-inf"), 1e308):
            assert odd not in spec.metadata["interval"], key


L = "1" * 5000
REFUSED = [
    (["trainer=null"], "trainer=null: must be trainer=NAME; there are mini_math, mini_tldr"),
    (["method=1"], "method=1: must be method=NAME"),
    (["+sweep=null"], "+sweep=null: must be sweep=NAME"),
    (["beta_grid=true"], "beta_grid=true: must be beta_grid=NAME"),
    ([f"seed={L}"], "seed=111"),
    (["-m", "seed=range(0,3,0)"], "seed=range(0,3,0): START, STOP and STEP"),
    (["~beta"], "beta has no value: add beta=VALUE"),
    (["seed=???"], "seed has no value: add seed=VALUE"),
    (
        ["dataset.preference=${setup}"],
        "dataset.preference: refers to a config of another type",
    ),
    (["sweep.rungs=${beta}"], "sweep.rungs=0.1: must be a list"),
    (["model.lora.targets=${setup.name}"], "model.lora.targets=mini_tldr: must be a list"),
    (["trainer.sft=${model}"], "trainer.sft: refers to a config of another type; set its keys one by one"),
    (["-m", "method=null,dpo"], "method=null,dpo: must be method=NAME,NAME; there are"),
    (["-m", "trainer=1,paper"], "trainer=1,paper: must be trainer=NAME,NAME; there are"),
    (["evaluation.prompts_file=README.md"], "evaluation.prompts_file: judge=gold knows only"),
    (
        ["evaluation.metric=accuracy"],
        "evaluation.metric=accuracy: judge=gold does not tell right from wrong",
    ),
    (["judge=math"], "evaluation.metric=win_rate: judge=math compares with no baseline; use accuracy"),
    (["judge=math", "evaluation=mini_math"], "judge=math needs problems with their answers: evaluation.prompts_file="),
    (["setup=mini_math", "judge.baseline=sft"], "judge.baseline: judge=math compares with no baseline; remove"),
    (
        ["setup=mini_math", "evaluation=math"],
        "evaluation.prompts_file is not set: evaluation=math needs the",
    ),
    (
        ["setup=mini_math", "evaluation.generation.top_k=1"],
        "evaluation.generation.samples_per_prompt=4: at evaluation.generation.top_k=1 they are all the same; use one",
    ),
    (
        ["setup=mini_math", "evaluation.generation.temperature=0"],
        "evaluation.generation.samples_per_prompt=4: at evaluation.generation.temperature=0 they are all the same",
    ),
    (["-m", "engine.gpu=null,a100"], "engine.gpu=a100: not in conf/gpus.yaml"),
    (["~trainer"], "trainer has no option: add trainer=NAME"),
    (["-m", "beta=range(0.1,inf)"], "beta=range(0.1,inf): START, STOP and STEP must be finite"),
    (["-m", "seed=range(1000000)"], "seed=range(1000000): expands to more than 10,000 values"),
    (["-m", "seed=range(500)", "beta=range(1,500)"], "seed=(500 values) beta=(499 values): 249,500 points"),
    (["-m", "beta=choice(choice(1,2),3)"], "beta=choice(choice(1,2),3): a sweep inside a sweep"),
    (["-m", "beta=interval(0,1)"], "beta=interval(0,1): an interval has no list of values; use choice"),
    *(
        (["-m", f"hydra.launcher.workers={w}"], f"hydra.launcher.workers={w}: must be")
        for w in ("1.5", "nan", "a", "[1]")
    ),
    *((["-m", f"hydra.sweeper.parts={p}"], "hydra.sweeper.parts=") for p in ("-0.0", "{beta:1}", "[]")),
    (["-m", "hydra.sweeper.parts=[3]"], "hydra.sweeper.parts: 3 must be a mapping"),
    (["-m", "hydra.sweeper.params=3"], "hydra.sweeper.params: 3 must be a mapping"),
    *((["-m", f"hydra.{p}=null"], f"hydra.{p}=null: choose one by hydra/{p}=NAME") for p in ("launcher", "sweeper")),
    (["-m", "+hydra.launcher.nosuch=1"], "+hydra.launcher.nosuch=1: there is no key hydra.launcher.nosuch"),
    (["-m", "hydra/launcher=slurm", "hydra.launcher.mem_gb=nan"], "hydra.launcher.mem_gb=nan: must be a finite"),
    (["-m", "hydra/launcher=slurm", "hydra.launcher.kinds.sft.mem_gb=-1"], "hydra.launcher.kinds.sft.mem_gb=-1: must"),
    (["trainer.sft.epochs=1e308"], "trainer.sft.epochs=1e+308: must be > 0 and <= 10000"),
    (["seed=2147483648"], "seed=2147483648: must be >= 0 and <= 2147483647"),
    (["beta=inf"], "beta=inf: must be a finite number > 0"),
    (["setup.best.ipo.lr=nan"], "setup.best.ipo.lr=nan: must be a finite number"),
    *(([f"beta={v}"], f"beta={v}: not in Hydra's syntax; close") for v in ("[0.1", "a=b", "é", "😀", "0.1]")),
    (["beta=1,2"], "beta=1,2: expands to several points: add -m"),
    (["foo"], "foo: must be KEY=VALUE or GROUP=NAME"),
    (
        ["model.template=nosuch"],
        "model.template=nosuch: must be one of plain, tokenizer, chatml, llama3, mistral, or a",
    ),
    (["model.template=nosuch.jinja"], "model.template=nosuch.jinja: no such file"),
    (["model.end_token=[]"], "model.end_token=[]: must be a token of the tokenizer or a list of them"),
    (["model=hf"], "model.path has no value: add model.path=VALUE"),
    (["model=mimi"], "model=mimi: model/mimi does not exist; did you mean mini?"),
    (["mehtod=dpo"], "mehtod=dpo: there is no key mehtod; did you mean method?"),
    (["trainer.algin.lr=1"], "trainer.algin.lr=1: there is no key trainer.algin; did you mean trainer.align?"),
    (["lr=gird"], "did you mean grid?"),
    (["+model._target_=os.system"], "+model._target_=os.system: names code to be run"),
    (["-m", "tracking=none,wandb"], "tracking.wandb.enabled: must be one value for a whole sweep"),
    (["-m", "setup.name=../../escaped"], "setup.name=../../escaped: becomes a folder name"),
    (["setup.name=a/b"], "setup.name=a/b: becomes a folder name"),
    (["-m", f"sweep.name={'a' * 101}"], "becomes a folder name"),
    (["output_dir="], "output_dir=: must be the path of a folder"),
    (["output_dir='a\x00b'"], "output_dir=a\\x00b: must be the path of a folder"),
    (["output_dir=/dev/null/x"], "output_dir=/dev/null/x: cannot be written (/dev/null is not a folder)"),
    (["hydra.run.dir=/dev/null/x"], "hydra.run.dir=/dev/null/x: cannot be written"),
    (["--nosuch"], "unrecognized arguments: --nosuch"),
    (["--resolve"], "--resolve: only together with"),
]
# Of these some are refused by the sweeper or the run, when Hydra has made a folder for its log.
REFUSED_LATER = [
    (["+foo=1"], "foo"),
    (["trainer.align.lr=1e-4"], "trainer.align.lr"),
    (["trainer.sft.adam_betas=[0.9,1.5]"], "trainer.sft.adam_betas[1]=1.5: must be >= 0 and < 1"),
    (["model.path=package://foo.bar/x"], "the package foo.bar is not installed"),
    (["setup=llama32_3b_tldr", "dataset.path=nosuchfolder"], "dataset.path=nosuchfolder: missing folder sft"),
    (["beta=abc"], "beta"),
    (["beta=0"], "beta=0: must be > 0"),
    (["beta=nan"], "beta=nan"),
    (["lr=0"], "lr=0: must be > 0"),
    (["seed=1.5"], "seed"),
    (["trainer.align.batch_size=0"], "trainer.align.batch_size=0: must be >= 1"),
    (["method=ppo"], "method/ppo"),
    (["setup=nosuch"], "setup/nosuch"),
    (["setup=mistral_7b_uf"], "setup=mistral_7b_uf init=sft has no best beta for method=dpo: set beta=VALUE"),
    (["method.gamma_beta_ratio=1"], "method=dpo has no such field"),
    (["method=simpo", "method.gamma_beta_ratio=null"], "method=simpo needs a value"),
    (["method=simpo", "method.gamma_beta_ratio=-1"], "method.gamma_beta_ratio=-1: must be >= 0"),
    (
        ["method=cal_dpo", "method.calibration_weight=nan"],
        "method.calibration_weight=nan: must be a finite number >= 0",
    ),
    (["beta_grid.dpo=[]"], "beta_grid.dpo=[]: an empty grid"),
    (["+lr_grid.ppo=[1]"], "lr_grid.ppo: no such method"),
    (["beta=grid"], "add -m"),
    (["method=all"], "add -m"),
    (["setup=smollm2_jsonl"], "dataset.path is not set"),
    (["setup=smollm2_jsonl", "dataset.path=/nowhere.json"], "dataset.path=/nowhere.json: no such file"),
    (["model.path=./nowhere"], "model.path=./nowhere: no such file"),
    (["dataset.max_prompt_tokens=160"], "must be below dataset.max_tokens"),
    (["judge=none"], "needs a judge"),
    (["-m", "beta=1,2", "sweep.name=../x"], "sweep.name=../x: becomes a folder name"),
    (["init=base", "method=orpo"], "init=base has no best beta"),
    (["engine.precision=fp8"], "must be one of fp32, bf16"),
    (["engine.strategy=zero4"], "must be one of none, ddp, fsdp, zero1, zero2, zero3, zero3_offload"),
    (["engine.precision=bf16"], "engine.strategy=none holds one copy of the weights"),
    (["engine=ddp", "engine.precision=bf16"], "choose engine=fsdp"),
    (["engine.activation_checkpointing=2"], "engine.activation_checkpointing=2"),
    (["engine.activation_checkpointing=some"], "some: must be one of auto, true, false"),
    (["dataset.sft_fraction=1.5"], "dataset.sft_fraction=1.5: must be >= 0 and <= 1"),
    (["evaluation.generation.top_p=0"], "evaluation.generation.top_p=0: must be > 0 and <= 1"),
    (["model.attention=varlen"], "model.attention=varlen requires engine.precision=bf16"),
    (["model.lora.rank=0"], "model.lora.rank=0: must be >= 1"),
    (["best_from=/nowhere.yaml"], "best_from=/nowhere.yaml"),
    (["-m", "method=dpo,ipo", "beta=0.1,-1"], "beta=-1: must be > 0"),
    (["-m", "method=dpo", "beta=grid", "~beta_grid.dpo"], "no list for method=dpo"),
    (["-m", "beta=choice()"], "beta"),
    (["-m", "hydra.launcher.workers=0", "beta=1,2"], "hydra.launcher.workers=0"),
    (["-m", "hydra/launcher=basic", "beta=1,2"], "hydra/launcher"),
    (["-m", "setup=mini_tldr,smollm2_jsonl", "beta=0.1,1"], "setup=smollm2_jsonl beta=0.1 output_dir="),
    (["-m", "sweep.name=a,b"], "sweep.name: must be one value for a whole sweep"),
    (["-m", "sweep.keep_fraction=0.3,0.5"], "sweep.keep_fraction: must be one value for a whole sweep"),
    (
        ["-m", "beta=0.1,1", "sweep.search=successive_halving", "sweep.rungs=[0.5]"],
        "sweep.rungs=[0.5]: must be an increasing list",
    ),
    (["sweep.search=successive_halving"], "sweep.search=successive_halving needs a sweep: add -m"),
    (["-m", "hydra/sweeper=basic", "beta=1,2"], "hydra/sweeper=grid"),
    (["+sweep=nosuch"], "sweep/nosuch"),
]


BAD = REFUSED + REFUSED_LATER


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_a_bad_override_is_one_line_and_leaves_nothing(arguments, message, tmp_path):
    output_dir = [] if any("output_dir=" in a for a in arguments) else [f"output_dir={tmp_path}/outputs"]
    done = run_in_process(*arguments, *output_dir)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line and len(line) < 1000
    assert "To append to your config" not in line, "Hydra's hint, which a typed config refuses as well"
    if (arguments, message) in REFUSED_LATER:
        assert not {"store", "sweeps"} & {path.name for path in tmp_path.glob("outputs/*")}
    else:
        assert not list(tmp_path.iterdir())


def test_points_that_differ_only_in_what_has_no_effect_are_named(tmp_path):
    done = run_in_process("-m", "dry_run=true", "beta=1", "engine.cpu_threads=1,2", f"output_dir={tmp_path}")
    assert "no result depends on engine.cpu_threads" in done.stdout and "1 points" in done.stdout
    assert "no result" not in run_in_process("-m", "dry_run=true", "beta=1,1.0", f"output_dir={tmp_path}").stdout


BAD_BEST = {
    "binary": b"\x00\xff\xfe\x80",
    "latin": "mini_tldr: {dpo: {beta: 1, lr: 1, caf\xe9: 1}}".encode("latin-1"),
    "list": b"mini_tldr: [1]",
    "method": b"mini_tldr: {dpo: 5}",
    "lr: abc": b"mini_tldr: {dpo: {beta: 1, lr: abc}}",
    "lr: [1]": b"mini_tldr: {dpo: {beta: 1, lr: [1]}}",
    "beta: nan": b"mini_tldr: {dpo: {beta: .nan, lr: 1}}",
    "variant": b"mini_tldr: {dpo: {beta: 1, lr: 1, variant: 5}}",
    "other setup": b"other: {dpo: {beta: 1, lr: 1}}",
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_BEST.values(), ids=BAD_BEST)
def test_a_damaged_best_yaml_is_named_with_the_cure(content, tmp_path):
    file = tmp_path / "best.yaml"
    file.write_bytes(content)
    done = run_in_process(f"best_from={file}", f"output_dir={tmp_path}/outputs")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(f"error: best_from={file}")
    assert not (tmp_path / "outputs").exists()


def test_best_from_takes_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        done = run_in_process(f"best_from={path}", f"output_dir={tmp_path}/outputs")
        assert done.returncode == 2 and "not a regular file" in done.stderr


def test_best_values_of_a_data_file_with_spaces_can_be_used(tmp_path):
    import pandas as pd

    files = [tmp_path / "a b" / f"x {n}.jsonl" for n in (1, 2)]
    files[0].parent.mkdir()
    for file in files:
        file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def data(n):
        return ["setup=smollm2_jsonl", "model=mini", override_for_hydra("dataset.path", str(files[n]))]

    points = [build_point(composed(*data(n))) for n in (0, 1)]
    settings = varying_settings(points)
    assert settings == [{"dataset.path": str(file)} for file in files]
    row = {
        **dict.fromkeys(BEST_YAML_KEYS),
        "setup": points[0].setup.name,
        "method": "dpo",
        "init": "sft",
        "beta": 0.3,
        "lr": 2e-5,
        "variant": variant_text(settings[0]),
        "quality_selection": 1.0,
        "identities": ["a"],
    }
    best = tmp_path / "best.yaml"
    best.write_text(best_yaml(pd.DataFrame([row]), {"a": settings[0]}))
    assert yaml.safe_load(best.read_text())[row["setup"]]["dpo"]["settings"] == settings[0]
    point = build_point(composed(*data(0), f"best_from={best}"))
    assert (point.beta, point.lr) == (0.3, 2e-5)
    done = run_in_process(*data(1), f"best_from={best}", f"output_dir={tmp_path}/outputs")
    assert done.returncode == 2 and f"add {override_text('dataset.path', str(files[0]))}" in done.stderr


def override_for_hydra(key, value):
    return f'{key}="{value}"'


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_that_is_no_number_is_named(name, tmp_path):
    command = [sys.executable, "-m", "src.train", f"output_dir={tmp_path}", "tracking=none", "beta=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment() | {name: "abc"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name}=abc: this environment variable must be")
    assert len(done.stderr.strip().splitlines()) == 1


def test_output_that_cannot_be_encoded_is_escaped(tmp_path):
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "src.train", "beta=é", f"output_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: beta=\\xe9: ")


def test_compilation_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run_in_process("engine.compile=true", "beta=1", "tracking=none", f"output_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith("error: engine.compile=true: on a CPU torch compiles")
