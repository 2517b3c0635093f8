"""`make docs` builds the documentation as a site in which every page can be reached and every link has a target."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.commands import ROOT, environment

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv-docs" / ".done").exists(), reason="no .venv-docs (make docs sets it up)"),
]


class Links(HTMLParser):
    """The targets of a page's links and images, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets, self.ids = set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.targets |= {values[name] for name in ("href", "src") if values.get(name)}
        self.ids |= {values["id"]} if values.get("id") else set()


def broken_links(site: Path) -> list[str]:
    """Return the links between pages of a site, to files and to ids, that have no target."""
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            linked = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not parts.scheme and not (
                linked.exists() and (not parts.fragment or linked not in pages or parts.fragment in pages[linked].ids)
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    return broken


def copy_pages(target: Path) -> None:
    """Copy what the site is made of."""
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, target)
    for name in ("docs", "conf"):
        shutil.copytree(ROOT / name, target / name)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The recipe of `make docs` itself."""
    folder = tmp_path_factory.mktemp("site")
    command = ["make", "-o", ".venv-docs/.done", "docs", f"ARGS=--site-dir {folder}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_and_every_file_that_one_links_is_in_the_site(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index.html", "CONTRIBUTING.html", "CHANGELOG.html", "CITATION.cff.html"} <= pages
    assert "conf/judge/tldr.yaml.html" in pages, "a config that docs/judges.md links"
    assert "max_calls" in (site / "conf/judge/tldr.yaml.html").read_text()
    assert not list(site.rglob("*.py"))


def test_a_linked_file_that_is_no_text_is_in_the_site_as_it_is(tmp_path):
    copy_pages(tmp_path)
    (tmp_path / "conf" / "study.zip").write_bytes(b"PK\xff")
    with (tmp_path / "docs" / "gpu.md").open("a") as page:
        page.write("\n[a](../conf/study.zip)\n")
    done = subprocess.run([MKDOCS, "build"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "conf" / "study.zip").read_bytes() == b"PK\xff"
    assert 'href="conf/study.zip"' in (tmp_path / "site" / "gpu.html").read_text()


def test_every_link_in_the_site_has_a_target(site, tmp_path):
    assert len(list(site.rglob("*.html"))) > 25
    assert not broken_links(site)
    page = tmp_path / "page.html"
    page.write_text(
        '<a href="page.html#here" id="here"></a><a href="#no"></a><img src="no.png"><a href="https://x"></a>'
    )
    assert sorted(broken_links(tmp_path)) == ["page.html: #no", "page.html: no.png"]


def test_pages_ask_no_other_server_for_anything(site):
    loaded = re.compile(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="?https?://(?!127\.)', re.I)
    assert [path.name for path in site.rglob("*.html") if loaded.search(path.read_text())] == []


def test_formulas_are_mathml(site):
    methods = (site / "methods.html").read_text()
    assert methods.count("<math") > 50 and "arithmatex" not in methods


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[a](no.md)", "contains a link 'no.md', but the target is not found"),
        ("[a](../conf/no.yaml)", "contains a link '../conf/no.yaml', but the target"),
        ("[a](slurm.md#no)", "contains a link 'slurm.md#no', but the doc 'slurm.md' does not contain an anchor '#no'"),
        (None, 'not included in the "nav" configuration:\n  - another.md'),
    ],
    ids=["page", "file", "heading", "nav"],
)
def test_a_broken_link_or_a_page_out_of_the_navigation_fails(change, message, tmp_path):
    copy_pages(tmp_path)
    page = tmp_path / "docs" / ("gpu.md" if change else "another.md")
    page.write_text((page.read_text() if change else "# Another\n") + f"\n{change}\n")
    done = subprocess.run([MKDOCS, "build"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
