"""The documentation as a site: no warning, no page missing, no dead link; and the API page that lies in the tree."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType
from urllib.parse import unquote, urlsplit

import pytest

import cuflash
import cuflash.compat
import cuflash.simulator

ROOT = Path(__file__).parents[1]
for needed in ("furo", "myst_nb", "sphinx", "sphinx_markdown_builder"):
    pytest.importorskip(needed, reason='pip install -e ".[docs]"')


def build(builder: str, source: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Write pages of a folder to another one; warnings are errors, and all of them are shown."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, "-c", str(ROOT / ".ci/docs")]
    command += ["-d", f"{folder}.doctrees", str(source), str(folder), *more]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Page(HTMLParser):
    """What a page links to, and where links to it can point."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build("html", ROOT, folder)
    assert done.returncode == 0 and not done.stdout, done.stdout
    return folder


def test_no_link_is_dead(site):
    """Nor one that Sphinx does not follow: of raw HTML, of a notebook's outputs, to pictures and downloads."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 15
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            if to.fragment and target in pages:
                assert unquote(to.fragment) in pages[target].anchors, f"{path.relative_to(site)}: {link}"
            followed += 1
    assert followed > 1000


def test_every_page_of_the_tree_is_a_page_of_the_site(site):
    pages = {*ROOT.glob("*.md"), *ROOT.glob("notebooks/*.md"), *ROOT.glob("notebooks/*.ipynb")}
    pages |= {ROOT / "kernels_cu/README.md", *ROOT.glob("cuflash/**/README.md")}
    assert all((site / path.relative_to(ROOT)).with_suffix(".html").exists() for path in pages)


def test_every_public_name_is_documented(site):
    """With its public methods and properties; cuflash's own names also in the list at the top of the page."""
    page = (site / "notebooks/api.html").read_text()
    lists = page[: page.index('id="planning-and-attention"')]
    names = []
    for module in (cuflash, cuflash.compat, cuflash.simulator):
        for name in module.__all__:
            thing, full = getattr(module, name), f"{module.__name__}.{name}"
            if name == "__version__":
                continue
            names.append(full)
            assert module is not cuflash or f'href="#{full}"' in lists, f"{full}: .ci/docs/api.md"
            if inspect.isclass(thing):
                kinds = (FunctionType, classmethod, property, staticmethod)
                members = [key for key, value in vars(thing).items() if isinstance(value, kinds)]
                names += [f"{full}.{member}" for member in members if not member.startswith("_")]
    assert len(names) > 60
    for name in names:
        assert f'id="{name}"' in page, f"{name}: .ci/docs/api.md, or its docstring"


def test_every_field_of_a_public_class_is_described():
    for module in (cuflash, cuflash.compat, cuflash.simulator):
        for thing in filter(is_dataclass, (getattr(module, name) for name in module.__all__)):
            described = re.findall(r"^ +(\w+): ", inspect.getdoc(thing) or "", re.MULTILINE)
            given = {field.name for field in fields(thing) if field.init}
            assert given <= {*described}, f"{thing.__name__}: {given - {*described}}"


def test_no_docstring_is_taken_apart(site):
    """A colon in the first line of what a function returns makes a type of what stands before it."""
    page = (site / "notebooks/api.html").read_text()
    assert not re.findall(r"(?:Return type|>Type<).*", page)


def test_the_api_page_in_the_tree_is_the_same(tmp_path):
    """Word by word: marks and line breaks are those of the Sphinx that wrote it."""
    name, folder = "notebooks/api.md", tmp_path / "pages"
    done = build("markdown", ROOT, folder, name)
    assert done.returncode == 0, done.stdout
    built, committed = (re.findall(r"\w+", (tree / name).read_text()) for tree in (folder, ROOT))
    assert built == committed, f"sphinx-build -b markdown -c .ci/docs . FOLDER {name} && cp FOLDER/{name} {name}"


FAULTS = {
    "[a page](nowhere.md)": "nowhere.md",
    "[a heading](#no-heading)": "no-heading",
    "[a heading of a page](other.md#no-heading-there)": "no-heading-there",
    "![a picture](nowhere.png)": "nowhere.png",
    "{func}`cuflash.no_function`": "cuflash.no_function",
    "```{eval-rst}\n.. autofunction:: cuflash.no_name\n```": "no_name",
}


def test_faults_are_found(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "page.md").write_text("\n\n".join(["# A page", *FAULTS, "```{toctree}\nother\n```\n"]))
    (source / "other.md").write_text("# Another\n")
    done = build("html", source, tmp_path / "pages", "-D", "root_doc=page", "-D", "include_patterns=*.md")
    assert done.returncode
    for fault, warning in FAULTS.items():
        assert re.search(rf"WARNING:.*{re.escape(warning)}", done.stdout), fault
