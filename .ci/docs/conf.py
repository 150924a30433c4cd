"""The documentation as a site: the tree's own pages, and the API reference out of the docstrings.

``sphinx-build -c .ci/docs . FOLDER`` writes it. The pages lie where a repository's viewer shows them and link to each
other by their paths, which Sphinx checks; the tree has no second copy of them. Two files here are what a viewer has no
use for: ``contents.md`` is the sidebar, ``api.md`` says what stands in the API reference and in which order.

``notebooks/api.md`` is that reference for those who read the repository: what the builder "markdown" makes of the same
source. ``tests/test_docs.py`` builds both, compares the page, and says how to bring it up to date.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

import cuflash

HERE = Path(__file__).parent
API = "notebooks/api"

project = "cuflash"
version = release = cuflash.__version__
author = "The cuflash authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_markdown_builder"]
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.md", "notebooks/*.ipynb", "kernels_cu/README.md", "cuflash/**/README.md"]
exclude_patterns = [".*"]  # a virtual environment in the tree need not be searched
nitpicky = True  # a name in a docstring that nothing has is a warning, and every warning an error
highlight_language = "none"  # drawings stand in blocks without a language
smartquotes_action = "D"  # dashes alone: what a text quotes can be copied

myst_heading_anchors = 4  # links to headings as a repository's viewer makes them
nb_execution_mode = "off"  # outputs are those that are committed
nb_mime_priority_overrides = [("markdown", "image/png", 10), ("markdown", "text/plain", 20)]

autoclass_content = "both"  # of the class, and of how to make one
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # they stand in the code block that _dress adds
napoleon_use_ivar = True
napoleon_attr_annotations = False
markdown_anchor_signatures = True
markdown_flavor = "github"

html_theme = "furo"
html_title = f"cuflash {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "README":
        source[0] += (HERE / "contents.md").read_text()
    elif page == API:
        source[0] = (HERE / "api.md").read_text()


def _shorten(app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, *_: Any) -> Any:
    return ("(...)" if signature and signature != "()" else signature), None


def _dress(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put the signature into a code block, a parameter a line if it is long: some have forty, with types."""
    # Napoleon makes headings of examples, which in Markdown would stand beside the functions' own.
    lines[:] = [line.replace(".. rubric:: Example", "**Example**") for line in lines]
    if what not in ("class", "function", "method"):
        return
    signature = inspect.signature(thing)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    name = name.rpartition(".")[2] if what == "method" else name
    code = name + stringify_signature(signature.replace(parameters=parameters))
    if len(code) > 100:
        each = [stringify_signature(inspect.Signature([p]))[1:-1].removeprefix("*, ") for p in parameters]
        keyword = [p.kind is p.KEYWORD_ONLY for p in parameters]
        if True in keyword:
            each.insert(keyword.index(True), "*")
        code = "\n".join([f"{name}(", *(f"    {text}," for text in each), code[code.rindex(")") :]])
    lines[:0] = [".. code-block:: python", "", *(f"   {line}" for line in code.splitlines()), ""]


def _begin(app: Sphinx, failed: Exception | None) -> None:
    if app.builder.name == "html" and not failed:
        shutil.copy(app.outdir / f"{app.config.root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Connect what Sphinx's settings cannot say."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-process-docstring", _dress)
    app.connect("build-finished", _begin)
