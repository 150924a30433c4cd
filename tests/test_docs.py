"""The documentation as a site: no warning, no page missing, no dead link; and the API page that lies in the tree."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import cuflash

ROOT = Path(__file__).parents[1]
for needed in ("furo", "myst_nb", "sphinx", "sphinx_markdown_builder"):
    pytest.importorskip(needed, reason='pip install "cuflash[docs]"')


def build(builder: str, source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Write pages of a folder to another one; warnings are errors, and all of them are shown."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, "-c", str(ROOT / ".ci/docs")]
    command += [*options, "-d", f"{folder}.doctrees", str(source), str(folder)]
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
    """With its public methods and properties, and in the list at the top of the page."""
    page = (site / "notebooks/api.html").read_text()
    public = [f"cuflash.{name}" for name in cuflash.__all__ if not name.startswith("__")]
    names = list(public)
    lists = page[: page.index('id="planning-and-attention"')]
    for name in public:
        assert f'href="#{name}"' in lists, f"{name}: .ci/docs/api.md"
        thing = getattr(cuflash, name.partition(".")[2])
        if inspect.isclass(thing):
            members = [key for key, value in vars(thing).items() if callable(value) or isinstance(value, property)]
            names += [f"{name}.{member}" for member in members if not member.startswith("_")]
    assert len(names) > 30
    for name in names:
        assert f'id="{name}"' in page, f"{name}: .ci/docs/api.md, or its docstring"


def test_no_docstring_is_taken_apart(site):
    """A colon in the first line of what a function returns makes a type of what stands before it."""
    page = (site / "notebooks/api.html").read_text()
    assert not re.findall(r"(?:Return type|>Type<).*", page)


def test_the_api_page_in_the_tree_is_the_same(tmp_path):
    """Word by word: marks and line breaks are those of the Sphinx that wrote it."""
    only = ("-D", "root_doc=notebooks/api", "-D", "include_patterns=notebooks/api.md")
    done = build("markdown", ROOT, tmp_path / "pages", *only)
    assert done.returncode == 0, done.stdout
    pages = tmp_path / "pages/notebooks/api.md", ROOT / "notebooks/api.md"
    built, committed = (re.findall(r"\w+", page.read_text()) for page in pages)
    command = f"{Path(sys.executable).parent}/sphinx-build -b markdown -c .ci/docs {' '.join(only)} . FOLDER"
    assert built == committed, f"{command} && cp FOLDER/notebooks/api.md notebooks/"


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
