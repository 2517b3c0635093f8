"""Properties of the source tree: imports without circles, one owner per file format, no names of version 0.1."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from tests.support.commands import ROOT

PACKAGES = ("src", "sweeps", "launchers")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Identifiers of version 0.1, replaced since by the field's word for each. Those that are also ordinary words
# (`partition`, `score`, `width`) are not listed.
OLD_NAMES = set(
    """
    AGAIN About ClusterSilent DIED EXPECTED Family Following Found FreedMemory GRID_WORDS HEAVY Inbox KERNELS LEAST
    LETTERS Lost MOST ON_CPU Objective Over Picture Place REACH SCORING SHARE SLAB STALLS Standing StepSize TOGETHER
    TOLD TRIMMED Taken Tokenised World _CAREFUL _Draw _LOOK_AT _OURS _PATIENCE _REMEMBER _TERMS _View _explained
    _follow _found _kin _last_words _left _make_room _meet _of_weight _on_their_way _passes _patiently _said _shown
    _slabs _tell _told abandon accounted against_highest answering as_sweeps as_typed beat careful chosen_anywhere
    chosen_at_random chosen_points compute_of conclude elsewhere fitting foreseen found give_back its kept
    key_starts normaliser number_of objective_of of_bias of_gate of_p of_scores of_x once_more optimiser over_seeds
    own part_of per_beta point_from predict_from query_starts read_words run_of said seen silently speaking
    spent_before split_step strays telling_apart tidy tip_of to_come tokenised tokens_depend_on told turned
    unconcluded vain
    """.split()
)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below `node`, without what is guarded by TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runtime_nodes(child)


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return which of `modules` a file imports, inside functions too."""
    names: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & modules or {node.module}
    return names & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return a path for every import that leads back to where the path began (depth-first search)."""
    state: dict[str, int] = {}
    paths: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(graph[module]):
            if state.get(target) == 1:
                paths.append([*path[path.index(target) :], target])
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in graph:
        if module not in state:
            visit(module, [module])
    return paths


def identifiers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (identifier, line) of everything a file defines, assigns, imports or reads."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            yield str(node.arg), line
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, line
        elif isinstance(node, ast.alias):
            yield from ((part, line) for part in (node.asname or node.name).split("."))


def literals(tree: ast.Module) -> Iterator[str]:
    """Yield the strings of a file that are not docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) if is_string(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def is_string(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


def test_no_file_imports_itself_through_others():
    modules = {module_name(path): path for path in SOURCES}
    graph = {name: imports(parse(path), set(modules)) - {name} for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 300, "the graph has edges"
    assert not circles(graph)


@pytest.mark.parametrize("graph", [{"a": {"b"}, "b": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}])
def test_a_circle_is_found(graph):
    assert circles(graph)
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_only_the_sweep_folder_names_sweep_json():
    owners = [module_name(path) for path in SOURCES if any("sweep.json" in text for text in literals(parse(path)))]
    assert owners == ["src.store.sweep_folder"]


def test_no_path_is_guessed_from_a_grandparent():
    users = [str(path.relative_to(ROOT)) for path in SOURCES if "parent.parent" in path.read_text()]
    assert not users


def test_stages_training_and_models_receive_no_point():
    rooms = [ROOT / "src" / room for room in ("stages", "training", "model")]
    users = [str(p.relative_to(ROOT)) for room in rooms for p in room.rglob("*.py") if "point: Point" in p.read_text()]
    assert not users


def test_no_identifier_of_version_0_1_is_left():
    uses = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in [*SOURCES, *TESTS]
        for name, line in identifiers(parse(path))
        if name in OLD_NAMES
    ]
    assert not uses, "\n".join([f"{len(uses)} uses", *uses])


def test_no_config_key_of_version_0_1_is_left():
    old = [rf"(?<![\w.]){re.escape(key)}(?=[=.`\s])" for key in RENAMED_KEYS if "." in key]
    old += [r"(?<![\w.-])keep=(all|best|none)\b", *(rf"{re.escape(value)}\b" for value in RENAMED_VALUES)]
    pattern = re.compile("|".join(old))
    about_old_keys = ("src/config/renamed_keys.yaml", "tests/test_renamed_keys.py", "tests/test_docs.py")
    exempt = {Path(__file__), *(ROOT / name for name in about_old_keys)}
    places = ("conf", "docs", "benchmarks", "tests", *PACKAGES)
    files = [path for place in places for path in (ROOT / place).rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    uses = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        if path not in exempt
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and "is called" not in line
    ]
    assert not uses, "\n".join(uses)
