"""Random overrides: values of every kind for every key of the schema, groups, Hydra's own keys and unknown ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from src.config.schema import CONF_DIR, HubTable, Point, typed_leaves
from tests.fuzz.invariants import check_artifacts, check_command, check_secrets, check_written, files_below
from tests.fuzz.sandbox import TYPED_CANARY, Sandbox
from tests.support.artifacts import results

# The smallest run that has every stage. It follows the random overrides, so that those cannot make it long.
SMALLEST = [
    *("dataset.sft_size=8", "dataset.train_size=8", "dataset.validation_size=4", "evaluation.num_prompts=4"),
    *("evaluation.generation.max_new_tokens=4", "trainer.align.batch_size=4", "trainer.sft.batch_size=8"),
    *("trainer.sft.epochs=1", "trainer.align.epochs=1", "trainer.sft.max_steps=1", "trainer.align.max_steps=2"),
    *("trainer.save_steps=1", "judge.max_retries=0", "judge.timeout=2", "server.timeout=2"),
]

LEAVES = {
    key: field
    for node, prefix in ((Point(), ""), (HubTable(), "dataset.sft."), (HubTable(), "dataset.preference."))
    for key, field, _ in typed_leaves(node, prefix)
}
OPTIONS = {
    str(folder.relative_to(CONF_DIR)): sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in sorted(CONF_DIR.rglob("*"))
    if folder.is_dir() and any(folder.glob("*.yaml"))
}
HYDRA_KEYS = [
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir", "hydra.launcher.workers"),
    *("hydra.launcher._target_", "hydra.sweeper.params", "hydra.sweeper.parts", "hydra.sweeper._target_"),
    *("hydra.job.name", "hydra.job.chdir", "hydra.job.env_set.KEY", "hydra.job_logging", "hydra.verbose"),
    *("hydra.launcher.partition", "hydra.launcher.mem_gb", "hydra.launcher.setup", "hydra.launcher.environment.KEY"),
    *("hydra.launcher.kinds.align.nodes", "hydra.mode", "hydra.runtime.cwd", "hydra.searchpath", "hydra.nope", "hydra"),
]

NUMBERS = [
    *("0", "1", "2", "-1", "+1", "0.5", "1e-5", "1e-320", "1e308", "1e400", "-1e400", "inf", "+inf", "-inf", "nan"),
    *(
        "-nan",
        "NaN",
        ".5",
        "5.",
        "1e",
        "1_000",
        "0x10",
        "0b1",
        "1,5",
        "2147483647",
        "2147483648",
        "9223372036854775808",
    ),
    *("9" * 400, "9" * 5000, "1.0000000000000002", "0.999999999999", "true", "false", "-0", "-0.0", "000", "١٢"),
]
EXPRESSIONS = [
    *("choice(0.1,0.2)", "choice(a,b)", "choice()", "choice(1,null,'x',[1],{a:1})", "range(1,4)", "range(4,1)"),
    *("range(0,3,0)", "range(0.1,inf)", "range(-inf,inf)", "range(nan,1)", "range(0,1,step=nan)", "interval(0,1)"),
    *("glob(*)", "glob([a*,b*],exclude=*c)", "sort(3,1,2)", "shuffle(1,2,3)", "tag(a,choice(1,2))", "int(1.5)"),
    *(
        "float(abc)",
        "str([1])",
        "bool(x)",
        "json_str({a:1})",
        "extend_list(1)",
        "abs(1)",
        "1,2",
        "1,1",
        "1,null",
        "0.1,x",
    ),
    *("[1,2],[3]", "{a:1},{b:2}", "grid", "all", "grid,0.1", "choice(grid)", "1,", ",1", ",", "range(1,4", "choice(1,"),
]
INTERPOLATIONS = [
    *("${beta}", "${seed}", "${nope}", "${setup}", "${setup.name}", "${..x}", "${.}", "${", "$", "$$", "\\${beta}"),
    *("${best:beta}", "${best:}", "${best:nope}", "${best}", "${oc.env:HOME}", "${oc.env:NOPE}", "${oc.env:NOPE,1}"),
    *("${oc.env:OPENAI_API_KEY}", "${oc.decode:'['}", "${oc.select:beta}", "${now:%Y}", "${now:}", "${output_dir}/x"),
    *(
        "${oc.create:{a:1}}",
        "${oc.deprecated:beta}",
        "${hydra:runtime.cwd}",
        "${hydra:nope}",
        "${${seed}}",
        "${eval:1}",
    ),
]
TEXTS = [
    *("", " ", "null", "None", "~", "???", "yes", "'quoted'", '"double"', "'open", '"open', "''", "[", "]", "[]", "{}"),
    *("{", "}", "[1,2", "[[1],[2]]", "[null]", "[,]", "{a:1}", "{a:{b:[1,null]}}", "{1:2}", "{a}", "(", ")", "()"),
    *("a=b", "=", "==", "a,b", "x y", " x", "x ", "\\", "\\\\", "\\,", "$HOME", "$(touch pwned)", "`touch pwned`"),
    *(
        "%s%n",
        "%(asctime)s",
        "%j",
        "{0}",
        "{checkpoint.foo} {port}",
        "{checkpoint}",
        "\t",
        "\n",
        "a\nb",
        "\r",
        "\x1b[31mred",
    ),
    *(
        "\x07",
        "\x7f",
        "\u2028",
        "\u202e",
        "é",
        "\U0001f98a",
        "\U0001f98a" * 40,
        "\udcff",
        "مرحبا",
        "ﬃ",
        "../..",
        "/",
        ".",
    ),
    *(
        "..",
        "/dev/null",
        "/proc/self/mem",
        "/nope/x",
        "~/x",
        "~nobody/x",
        "-",
        "--help",
        "@",
        "a@b",
        "!",
        "*",
        "?",
        "#",
    ),
    *("x" * 300, "x" * 6000, "[" * 300, "nope/nope", "a/b/c", "package://src.data/mini_tldr_base", "package://", "a:b"),
    *(
        "package://.x/y",
        "package://os",
        "file:///etc/passwd",
        "http://127.0.0.1:9/v1",
        "_target_: os.system",
        "<b>x</b>",
    ),
    *("=cmd|x", "+1+1", "@SUM(1)", "a$x_{$", "$\\frac{$", "&amp;", "'; --", "con", "nul", ".hidden", "x" * 200 + "/y"),
]
SECRETS = [
    f"https://user:{TYPED_CANARY}@host/v1",
    f"https://user:pa/{TYPED_CANARY}@host/v1",
    f"https://host/v1?api-key={TYPED_CANARY}",
    f"'https://host/v1?x=1&token={TYPED_CANARY}'",
    f"sk-proj-{TYPED_CANARY}{'7' * 20}",
    f"hf_{TYPED_CANARY}{'7' * 16}",
    f"[a,sk-{TYPED_CANARY}{'7' * 30}]",
]

values = st.one_of(
    *(st.sampled_from(NUMBERS), st.sampled_from(EXPRESSIONS), st.sampled_from(INTERPOLATIONS)),
    *(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.sampled_from(NUMBERS)),
    st.floats().map(repr),
    st.integers(-5, 5).map(str),
    # What a shell cannot pass: NUL, and surrogates other than those that stand for bytes.
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(NUMBERS[:12]), max_size=3).map(lambda v: f"[{','.join(v)}]"),
)


@dataclass(frozen=True)
class Overrides:
    arguments: tuple[str, ...]
    multirun: bool
    dry_run: bool

    @property
    def command_line(self) -> list[str]:
        fixed = ["tracking=none"] * (not any("tracking" in a for a in self.arguments))
        fixed += ["output_dir=out"] * (not any("output_dir=" in a for a in self.arguments))
        last = ["dry_run=true"] if self.dry_run else SMALLEST
        return ["-m"] * self.multirun + [*fixed, *self.arguments, *last]


def _usual(field: Any) -> st.SearchStrategy[str]:
    """Return values that a key may have, by its type; few of them are out of bounds."""
    kind = str(field.type)
    if choices := field.metadata.get("choices"):
        return st.sampled_from(["null" if choice is None else str(choice) for choice in choices])
    if kind.startswith("bool"):
        return st.sampled_from(["true", "false"])
    if kind.startswith("int"):
        return st.sampled_from(["0", "1", "2", "3", "8", "64", "1,2", "range(1,3)"])
    if kind.startswith("float"):
        return st.sampled_from(["0", "1e-3", "0.1", "0.5", "1.0", "2", "0.1,0.5", "1e-5,1e-3", "choice(0.2,1)"])
    if kind.startswith("str"):
        return st.sampled_from([text for text in TEXTS if "'" not in text and "\\" not in text]).map("'{}'".format)
    return st.sampled_from(["null", "[]", "{}", "[0.5,1.0]", "[0.25,0.5,1]", "{a:b}", "[q_proj]"])


@st.composite
def _assignment(draw: Any, hostile: bool = True) -> str:
    key = draw(st.sampled_from(sorted(LEAVES)))
    if not hostile:
        return f"{key}={draw(_usual(LEAVES[key]))}"
    prefix = draw(st.sampled_from(["", "", "", "", "", "", "+", "++", "~"]))
    if prefix == "~" and draw(st.booleans()):
        return f"~{key}"
    secret = draw(st.integers(0, 19)) == 19
    value = draw(st.sampled_from(SECRETS) if secret else values)
    quoted = "'" not in value and "\\" not in value and draw(st.integers(0, 2)) == 0
    return f"{prefix}{key}='{value}'" if quoted else f"{prefix}{key}={value}"


@st.composite
def _option(draw: Any) -> str:
    group = draw(st.sampled_from(sorted(OPTIONS)))
    return f"{group}={draw(st.sampled_from(OPTIONS[group]))}" if group != "sweep" else "+sweep=demo"


@st.composite
def _group(draw: Any) -> str:
    group = draw(st.sampled_from(sorted(OPTIONS)))
    option = draw(st.one_of(st.sampled_from(OPTIONS[group]), st.sampled_from(OPTIONS[group]), values))
    # Without a cluster a launcher of jobs can only be planned with; `slurm` is refused in a single run.
    form = draw(
        st.sampled_from(["{}={}"] * 6 + ["+{}={}", "++{}={}", "~{}", "~{}={}", "{}@x={}", "{}@x:y={}", "+{}@:{}"])
    )
    return form.format(group, option)


@st.composite
def _other(draw: Any) -> str:
    key = draw(
        st.one_of(
            st.sampled_from(HYDRA_KEYS),
            st.sampled_from(
                ["nope", "a.b.c", "beta.x", "seed.0", "method", "", ".", "beta ", "Beta", "beta[0]", "_target_"]
            ),
            st.sampled_from(["beta_grid.dpo", "lr_grid.nope", "setup.best.dpo.beta", "setup.best.nope", "setup.best"]),
            st.sampled_from(["dataset.sft.columns.prompt", "dataset.sft.rows.train", "trainer", "dataset.sft"]),
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
        )
    )
    secret = draw(st.integers(0, 9)) == 9
    value = draw(st.sampled_from(SECRETS) if secret else values)
    return draw(st.sampled_from(["{}={}", "{}={}", "+{}={}", "++{}={}", "~{}", "{}"])).format(key, value)


FLAGS = [
    *(
        "--help",
        "--hydra-help",
        "--info",
        "--info all",
        "--cfg job",
        "--cfg all",
        "--cfg hydra",
        "--cfg nope",
        "--resolve",
    ),
    *(
        "--config-name nope",
        "--config-path /nope",
        "--config-dir /nope",
        "--package x",
        "--nope",
        "-m",
        "--version",
        "--run",
    ),
    *("--cfg job --resolve", "--experimental-rerun nope", "--shell-completion x", "-c"),
]


@st.composite
def cases(draw: Any) -> Overrides:
    hostile = st.one_of(_assignment(), _assignment(), _assignment(), _group(), _other())
    ordinary = st.one_of(_assignment(hostile=False), _assignment(hostile=False), _option())
    arguments = draw(st.lists(hostile, min_size=1, max_size=draw(st.sampled_from([1, 1, 1, 2, 4])), unique=True))
    arguments += draw(st.lists(ordinary, max_size=3, unique_by=lambda a: a.partition("=")[0]))
    if draw(st.integers(0, 5)) == 0:
        arguments = [draw(ordinary), draw(ordinary)]
    if draw(st.integers(0, 24)) == 24:
        arguments += draw(st.sampled_from(FLAGS)).split()
    multirun = draw(st.booleans())
    dry_run = draw(st.integers(0, 5)) > 0 or any("slurm" in argument for argument in arguments)
    return Overrides(tuple(arguments), multirun, dry_run)


def check(case: Overrides, sandbox: Sandbox, bases: object = None) -> list[str]:
    """Run the command, and once more when it computed something: that must change nothing."""
    before = files_below(sandbox.root)
    done = sandbox.run(*case.command_line, timeout=60 if case.dry_run else 120)
    broken = check_command(done)
    named = any("output_dir=" in argument or "hydra." in argument for argument in case.arguments)
    allowed = [sandbox.home, sandbox.tmp, sandbox.work if named else sandbox.out]
    outputs = {sandbox.root / "stdout", sandbox.root / "stderr"}
    broken += check_written(before | outputs, sandbox.root, allowed) + check_secrets(done, sandbox.root)
    if case.dry_run or done.code not in (0, 1):
        if (sandbox.out / "store").exists() and any((sandbox.out / "store").rglob("DONE")):
            broken.append("something was computed")
        return broken
    first = results(sandbox.out)
    again = sandbox.run(*case.command_line, timeout=120)
    broken += [f"the same command again: {b}" for b in check_command(again)]
    if again.code != done.code:
        broken.append(f"exit code {done.code}, then {again.code}: {again.stderr.strip()[-300:]}")
    return broken + check_artifacts(sandbox.out, first)


def smaller(case: Overrides) -> Iterator[Overrides]:
    """Yield the case with one override less."""
    for i in range(len(case.arguments) if len(case.arguments) > 1 else 0):
        yield replace(case, arguments=case.arguments[:i] + case.arguments[i + 1 :])
    if case.multirun:
        yield replace(case, multirun=False)


def prepare(folder: Path) -> None:
    """Return nothing: overrides need no finished store."""
