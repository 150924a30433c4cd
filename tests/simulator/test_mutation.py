"""The problems of mutation_problems.py kill the mutants of the library's kernels; those that live are equivalent."""

from __future__ import annotations

import os
import re

import mutation_problems
import pytest

from cuflash.simulator.mutate import Equivalent, Mutant, survey

AT_LEAST = 0.95


def test_a_class_of_equivalent_mutants() -> None:
    texts = ("mov.u32 %r1, 0", "ld.global.u32 %r1, [%rd1]")  # the instruction before it, what it reads
    mutant = Mutant(
        "kernel", "key", 7, "lt -> le", "a.cu", 3, ("b.cu", 9), "setp.lt.s32 %p1, %r1, 1", texts[:1], texts[1:], ()
    )

    def line_of(file: str, line: int) -> str:
        return {("a.cu", 3): "if (n > 0) return;", ("b.cu", 9): "leave(m);"}[file, line]

    assert Equivalent("why").matches(mutant, line_of, False)
    same = {
        "file": r"a\.cu",
        "source": "n > 0",
        "call": "leave",
        "kind": "lt -> le",
        "instruction": ", 1$",
        "context": r"mov.*\nsetp",
        "operands": r"ld.* \[%rd1\]",
        "kernel": "k.*",
    }
    assert Equivalent("why", **same).matches(mutant, line_of, False)
    for name in same:
        assert not Equivalent("why", **{**same, name: "other"}).matches(mutant, line_of, False), name
    assert Equivalent("why", unreached=True).matches(mutant, line_of, True)
    assert not Equivalent("why", unreached=True).matches(mutant, line_of, False)
    assert not Equivalent("why", variants=lambda m: m.cluster > 1).matches(mutant, line_of, False)


def test_equivalent_mutants_are_of_lines_that_there_are() -> None:
    """An entry whose line is gone hides nothing today, and a mutant of another line tomorrow."""
    files = [file for folder in mutation_problems.SOURCES for file in folder.glob("*.cu*")]
    lines = {file.name: file.read_text(encoding="utf-8").splitlines() for file in files}
    for entry in mutation_problems.EQUIVALENT:
        own = [line for name, text in lines.items() if re.fullmatch(entry.file, name) for line in text]
        assert any(re.search(entry.source, line) for line in own), entry
        assert any(re.search(entry.call, line) for text in lines.values() for line in text), entry


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "only"), [("decode", "attention|negative"), ("plan", ".*plan "), ("merge", "merge")]
)
def test_at_least_95_percent_are_killed(kernel: str, only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed sample; of decode in three variants. Equivalent mutants do not count."""
    for name in ("CUFLASH_BACKEND", "CUFLASH_NUM_SM"):  # the problems set them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    problems = [(name, problem) for name, problem in mutation_problems.problems() if re.match(only, name)]
    report = survey(
        problems,
        kernel,
        sample=200,
        min_problems=16,
        equivalent=mutation_problems.EQUIVALENT,
        sources=mutation_problems.SOURCES,
    )
    assert report.share >= AT_LEAST, str(report)
    assert not report.contradictions, str(report)
