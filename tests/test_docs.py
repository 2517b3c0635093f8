"""What the documentation names exists: files, functions, modules, config keys, versions."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import src
from launchers.slurm.options import SlurmOptions
from src.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from src.config.schema import Point
from src.planning.identity import VERSIONS
from tests.support.commands import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
ROOMS = "src|sweeps|launchers|conf|tests|docs|benchmarks|hydra_plugins"


def created(text: str) -> set[str]:
    """Return the files that a worked example tells its reader to create."""
    return set(re.findall(r"[Aa] new file `([^`]+)`", text))


@cache
def definitions(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def missing_files(text: str) -> list[str]:
    named = set(re.findall(rf"(?<![\w/.])((?:{ROOMS})/[\w./-]*\w\.(?:py|md|yaml|cpp|h|html|png|jinja))\b", text))
    # NAME and the like stand for any name.
    return sorted(n for n in named - created(text) if not re.search(r"\b[A-Z]{2,}\b", n) and not (ROOT / n).exists())


def missing_functions(text: str) -> list[str]:
    named = re.findall(rf"\b((?:{ROOMS})/[\w/]+\.py):([A-Za-z_]\w*)", text)
    return [f"{f}:{name}" for f, name in named if (ROOT / f).exists() and name not in definitions(ROOT / f)]


def missing_modules(text: str) -> list[str]:
    named = set(re.findall(rf"-m ((?:{ROOMS})(?:\.\w+)*)", text))
    paths = {name: ROOT / name.replace(".", "/") for name in named}
    return sorted(n for n, p in paths.items() if not (p.with_suffix(".py").exists() or (p / "__main__.py").exists()))


def missing_links(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_functions_modules_and_links_of_a_page_exist(page):
    text = page.read_text()
    assert not missing_files(text)
    assert not missing_functions(text)
    assert not missing_modules(text)
    assert not missing_links(page, text)


def test_what_does_not_exist_is_found():
    assert missing_files("`src/plan.py`, `src/train.py`") == ["src/plan.py"]
    assert missing_functions("`src/errors.py:answering`, `src/errors.py:report_errors`") == ["src/errors.py:answering"]
    assert missing_modules("python -m src.kernels; python -m src.train; python -m src.toy") == ["src.kernels"]
    assert missing_links(ROOT / "README.md", "[a](docs/no.md) [b](docs/slurm.md#x)") == ["docs/no.md"]


@cache
def schema_keys() -> set[str]:
    """Return every key of the config and every group, dotted."""
    keys: set[str] = set()

    def walk(node: DictConfig, prefix: str) -> None:
        for name in node:
            keys.add(f"{prefix}{name}")
            value = node._get_node(name)
            if isinstance(value, DictConfig) and not OmegaConf.is_missing(node, name):
                # A group that may be absent, as `pairs.generation`, has the keys of its class.
                walk(OmegaConf.structured(value._metadata.ref_type) if value._is_none() else value, f"{prefix}{name}.")

    walk(OmegaConf.structured(Point), "")
    launcher = OmegaConf.structured(SlurmOptions)
    walk(launcher, "hydra.launcher.")
    return keys | {"hydra.launcher.workers"}


def unknown_keys(text: str) -> list[str]:
    """Return the dotted keys of overrides that neither the schema nor one of its free dictionaries has."""
    free = ("beta_grid", "lr_grid", "setup.best", "dataset.sft", "dataset.preference", "hydra.launcher.kinds")
    # Only keys that begin with a group of the schema: `pd.x=` is none.
    groups = {key.partition(".")[0] for key in schema_keys() if "." in key}
    named = set(re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_]+)=", text)) | set(
        re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)`", text)
    )
    return sorted(
        key
        for key in named
        if key.partition(".")[0] in groups
        and key not in schema_keys()
        and not key.startswith(tuple(f"{name}." for name in free))
        and not key.endswith((".json", ".jsonl", ".yaml", ".arrow"))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_of_a_page_are_in_the_schema(page):
    text = page.read_text()
    added = {"method.focal_gamma"} if page.name == "add-a-method.md" else set()
    assert not set(unknown_keys(text)) - added


def test_a_key_that_was_renamed_is_found():
    assert unknown_keys("`trainer.checkpoint_steps=1` `trainer.checkpoint_minutes`") == ["trainer.checkpoint_steps"]
    assert unknown_keys("`pairs.generation.top_p=1` `pairs.generation.beams`") == ["pairs.generation.beams"]


def test_the_glossary_has_at_most_thirty_words():
    rows = re.findall(r"^\| (.+?) \| .+ \|$", (ROOT / "docs/glossary.md").read_text(), re.M)
    assert 20 <= len(rows) - 1 <= 30


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == src.__version__
    assert re.search(rf"^## {re.escape(src.__version__)}\b", CHANGELOG, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(hook["rev"] for hook in hooks if "ruff" in hook["repo"])
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_changelog_lists_stage_versions_and_renamed_keys():
    newest = CHANGELOG.split("\n## ")[1]
    for kind, version in VERSIONS.items():
        assert re.search(rf"^\| `{kind}` \|.*\b{version}\b", newest, re.M), kind
    for old, new in {**RENAMED_KEYS, **RENAMED_VALUES}.items():
        assert f"| `{old}` | `{new}` |" in CHANGELOG


def pages_of(nav: list[dict[str, Any]]) -> set[str]:
    """Return the files that the navigation of mkdocs.yml names, in all of its sections."""
    entries = [entry for item in nav for entry in item.values()]
    return {e for e in entries if isinstance(e, str)}.union(*(pages_of(e) for e in entries if isinstance(e, list)))


def test_every_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    named = pages_of(yaml.safe_load(text.partition("\nnav:\n")[2].partition("\nvalidation:")[0]))
    missing = sorted({page.name for page in PAGES} - named)
    assert not missing, f"add to a section of `nav` in mkdocs.yml: {'; '.join(f'- TITLE: {name}' for name in missing)}"
    assert pages_of([{"Home": "a.md"}, {"Use": [{"One": "b.md"}, {"More": [{"Two": "c.md"}]}]}]) == {
        "a.md",
        "b.md",
        "c.md",
    }
