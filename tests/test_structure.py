"""Properties of the source tree: imports without circles, one owner per file format."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT

PACKAGES = ("src", "sweeps", "launchers")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


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
