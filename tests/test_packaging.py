"""What is published says the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cuflash

ROOT = Path(__file__).parents[1]


def test_the_conda_recipe_is_the_package():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    recipe = (ROOT / ".ci" / "conda" / "recipe.yaml").read_text()
    assert f'version: "{cuflash.__version__}"' in recipe
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    for line in needed:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", line).groups()
        assert f"- {name} {bound}\n" in recipe, line
    assert f'summary: "{project["project"]["description"]}"' in recipe
    (command,) = project["project"]["scripts"].items()
    assert f"- {' = '.join(command)}\n" in recipe


def test_the_long_description_has_nothing_of_the_pictures_that_it_leaves_out():
    tomllib = pytest.importorskip("tomllib")
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text()
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert "![" not in text
    assert not re.findall(r"^\*[^*].*", text, re.MULTILINE), "a caption"
    assert not re.findall(r"^(#+ .*)\n+#", text, re.MULTILINE), "a heading of nothing"
    assert "**You want this if**" in text


def test_the_release_checks_first():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert ".ci/run" in text and "needs: build" in text and "id-token: write" in text and "password" not in text


def test_the_wheel_packages_exist():
    """A name that is no folder would be left out without a word."""
    tomllib = pytest.importorskip("tomllib")
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    paths = [*targets["wheel"]["packages"], *targets["wheel"]["force-include"], *targets["sdist"]["include"]]
    assert [path for path in paths if not (ROOT / path.lstrip("/")).exists()] == []
