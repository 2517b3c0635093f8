"""Random overrides: values of every kind for every key of the schema, groups, Hydra's own keys and unknown ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from src.config.fields import typed_leaves
from src.config.schema import CONF_DIR, HubTable, Point
from tests.fuzz.hostile_values import EXPRESSIONS, FLAGS, HYDRA_KEYS, INTERPOLATIONS, NUMBERS, SECRETS, TEXTS
from tests.fuzz.invariants import check_artifacts, check_command, check_secrets, check_written, files_below
from tests.fuzz.sandbox import Sandbox
from tests.support.artifacts import results

# The smallest run that has every stage. It follows the random overrides, so that those cannot make it long.
SMALLEST = [
    *("dataset.sft_size=8", "dataset.train_size=8", "dataset.validation_size=4", "evaluation.num_prompts=4"),
    *("evaluation.generation.max_new_tokens=4", "trainer.align.batch_size=4", "trainer.sft.batch_size=8"),
    *("trainer.sft.epochs=1", "trainer.align.epochs=1", "trainer.sft.max_steps=1", "trainer.align.max_steps=2"),
    *(
        "dataset.sft_validation_size=2",
        "trainer.checkpoint_minutes=0",
        "judge.max_retries=0",
        "judge.timeout=2",
        "server.timeout=2",
    ),
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
