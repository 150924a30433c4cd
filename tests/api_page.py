"""The API reference, ``notebooks/api.md``, made of the docstrings: ``python tests/api_page.py``.

A page of Markdown, that a repository's viewer shows as it is: no tool to install, none to run before one can read it.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import cuflash

PAGE = Path(__file__).parents[1] / "notebooks" / "api.md"
_TITLES = {
    "Planning and attention": (
        "get_scheduler_metadata",
        "flash_attn_with_kvcache",
        "flash_attn_varlen_func",
        "SchedulerMetadata",
        "compile",
    ),
    "Merging": ("merge_attn_states", "shared_prefix_attention"),
    "Serving": ("PagedKVCache", "DecodeStep", "OutOfPages"),
    "Several GPUs": ("ContextParallel", "ContextParallelError"),
}
_LISTS = ("Args:", "Attributes:", "Raises:")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Examples):$")


def page() -> str:
    """Return the text of the page.

    Raises:
        ValueError: If a public name has no place on it.
    """
    placed = {name for names in _TITLES.values() for name in names}
    missing = [name for name in cuflash.__all__ if name not in placed and not name.startswith("__")]
    missing = [name for name in missing if not inspect.ismodule(getattr(cuflash, name))]
    if missing:
        raise ValueError(f"tests/api_page.py must have a place for {', '.join(missing)}")
    lines = ["# API reference", "", "Made of the docstrings by `python tests/api_page.py`.", ""]
    for title, names in _TITLES.items():
        lines += [f"- {title}: " + ", ".join(f"[{name}](#{name.lower()})" for name in names)]
    for title, names in _TITLES.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += _entry(name, getattr(cuflash, name))
    return "\n".join(lines) + "\n"


def _entry(name: str, thing: Any) -> list[str]:
    lines = ["", f"### {name}", "", *_code(f"cuflash.{name}", thing), *_text(thing)]
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            public = not member.startswith("_") or (member == "__call__" and name == "DecodeStep")
            value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if public and (inspect.isfunction(value) or isinstance(value, property)) and inspect.getdoc(value):
                lines += ["", f"#### {name}.{member}", ""]
                lines += _text(value) if isinstance(value, property) else [*_code(member, value), *_text(value)]
    return lines


def _code(name: str, thing: Any) -> list[str]:
    """Return the signature, a parameter a line if it is long; annotations as they are written."""
    try:
        signature = inspect.signature(inspect.unwrap(thing))
    except ValueError:  # an exception's
        return []
    parameters = [str(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    # A module by its name, not by where it lies.
    parameters = [re.sub(r"<module '(\w+)' from .*>", r"\1", parameter) for parameter in parameters]
    keyword = [p.kind is p.KEYWORD_ONLY for p in signature.parameters.values() if p.name != "self"]
    if True in keyword:
        parameters.insert(keyword.index(True), "*")
    parameters = [
        re.sub(r"'", "", p) if "=" not in p else re.sub(r"(:\s*)(['\"])([^=]*)\2( =|$)", r"\1\3\4", p)
        for p in parameters
    ]
    one = f"{name}({', '.join(parameters)})"
    text = [one] if len(one) < 100 else [f"{name}(", *(f"    {p}," for p in parameters), ")"]
    return ["```python", *text, "```", ""]


def _text(thing: Any) -> list[str]:
    """Return a docstring of Google's style as Markdown."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if _SECTION.match(line):
            if section.startswith("Example"):
                lines.append("```")
            section = line
            lines += ["", f"**{line.removesuffix(':')}**", ""]
            if section.startswith("Example"):
                lines.append("```python")
        elif section.startswith("Example"):
            lines.append(line.removeprefix("    "))
        else:
            line = re.sub(r":(?:func|class|meth):`~?\.?(?:cuflash\.)?([\w.]+)`", r"`\1`", line).replace("``", "`")
            found = re.match(r"    (\w[\w*]*|\*\*\w+): (.*)", line) if section in _LISTS else None
            if found:
                lines.append(f"- `{found[1]}`: {found[2]}")
            elif section in _LISTS:
                lines.append(f"  {line.strip()}" if line.strip() else "")
            else:
                lines.append(line.strip())
    while lines and not lines[-1]:
        lines.pop()
    return [*lines, "```"] if section.startswith("Example") else lines


if __name__ == "__main__":
    PAGE.write_text(page())
