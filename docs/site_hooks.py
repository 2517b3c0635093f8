"""What mkdocs does beside its own work: pages from outside docs/, links between these and docs/, and formulas.

The pages are written to be read in the repository, too. README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the
site; a notebook becomes a page with its cells, another file that a page links, such as a config, one with its text.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".yaml": "yaml", ".cff": "yaml", ".py": "python", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside docs/, and a page for every other file of the repository that a page links."""
    root = Path(config.config_file_path).parent
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(root / name).read_text(encoding="utf-8")))
    for path in sorted((root / "docs").glob("*.ipynb")):
        files.append(File.generated(config, f"{path.name}.md", content=_cells(path)))
    for source in [file.src_uri for file in files.documentation_pages()]:
        text = _file(files, source).content_string
        for _, target, _ in LINK.findall(text):
            path = _in_repository(source, target)
            if not path.startswith("docs/") and path not in ROOT_PAGES and (root / path).is_file():
                _add_file_page(files, config, root / path, f"{path}.md")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their targets are in the site; one without a target stays, and mkdocs refuses it."""

    def rewritten(match: re.Match[str]) -> str:
        start, target, end = match.groups()
        path = _in_repository(page.file.src_uri, target)
        for candidate in (f"{path.removeprefix('docs/')}.md", path.removeprefix("docs/")):
            if "://" not in target and files.get_file_from_path(candidate) is not None:
                up = "../" * page.file.src_uri.count("/")
                return f"{start}{up}{candidate}{end}"
        return match[0]

    return LINK.sub(rewritten, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers show without a script."""
    return FORMULA.sub(
        lambda match: convert(html.unescape(match[2]), display="inline" if match[1] == "span" else "block"), content
    )


def _file(files: Files, source: str) -> File:
    file = files.get_file_from_path(source)
    assert file is not None
    return file


def _in_repository(source: str, target: str) -> str:
    """Return the path, from the repository's root, that a link of a page means there. source: the page in the site."""
    folder = PurePosixPath("." if source in ROOT_PAGES else "docs") / PurePosixPath(source).parent
    parts: list[str] = []
    for part in (folder / target).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _cells(notebook: Path) -> str:
    """Return the cells of a notebook, without outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts)


def _add_file_page(files: Files, config: MkDocsConfig, path: Path, source: str) -> None:
    """Add a page with the text of a file, not in the navigation; of one that is no text the file itself."""
    name = source.removesuffix(".md")
    if any(files.get_file_from_path(one) is not None for one in (source, name)):
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        files.append(File.generated(config, name, abs_src_path=str(path)))
        return
    fence = f"````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n"
    page = File.generated(config, source, content=f"# {name}\n\n{fence}", inclusion=InclusionLevel.NOT_IN_NAV)
    files.append(page)
