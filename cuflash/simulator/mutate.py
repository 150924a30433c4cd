"""Mutation tests of kernels: change one PTX instruction at a time and see whether a set of problems notices.

A mutant that no problem kills says what the problems do not test: a boundary that no input sits on, a barrier whose
absence no order shows. Mutants cost no compilation, they are patches of the decoded program.

    python -m cuflash.simulator.mutate tests/mutation_problems.py:problems --kernel decode --sample 200

The problems are a function that returns pairs of a name and a callable; the callable runs one problem, raises if a
result is wrong, and may return the arrays that it computed. A mutant is killed by a finding of the simulator, by an
exception, by an array with other bits than the unchanged kernel's, or by other traffic: bytes read and written of each
array and, in fixed order, the wavefronts that all other instructions send to shared memory.

Some mutants no problem can kill, since they compute the same. The module of the problems may list them as
`EQUIVALENT`, each with the reason, and name in `SOURCES` the folders of the sources whose lines the list quotes. They
count neither as killed nor as alive.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .launch import Kernel, Launch, mutated, record, watch_kernels
from .program import BARRIER, BRANCH, LABEL, MEET, MEET_ALL, NONE, NOT_C, SIMPLE, Program
from .ptx import Loc

__all__ = ["Equivalent", "Mutant", "Report", "mutants", "survey"]

Problems = Sequence[tuple[str, Callable[[], Any]]]

_COMPARE = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
_OTHER_COMPARE = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8, 10: 11, 11: 10}
_OTHER_NAME = {"add": "sub", "sub": "add", "min": "max", "max": "min", "and": "or", "or": "and"}
_DROPPED = {
    "cp.async.wait_group": "a wait",
    "cp.async.wait_all": "a wait",
    "cp.async.bulk.wait_group": "a wait",
    "cp.async.commit_group": "a commit",
    "cp.async.bulk.commit_group": "a commit",
    "fence": "a fence",
    "fence.proxy": "a proxy fence",
    "wgmma.commit_group": "a commit",
    "wgmma.wait_group": "a wait",
    "wgmma.mma_async": "a product",
    "st": "a store",
    "cp.async": "a copy",
    "cp.async.bulk.tensor": "a copy",
    "mbarrier.expect_tx": "an expectation",
    "atom": "an atomic",
    "mbarrier.arrive": "an arrival",
    "griddepcontrol.wait": "a wait",
    "cp.async.mbarrier.arrive": "an arrival",
}


@dataclass(frozen=True)
class Mutant:
    """One changed instruction.

    Attributes:
        kernel: the kernel's name.
        key: identity of the PTX it belongs to.
        pc: the instruction's number.
        kind: such as "drop a barrier".
        file: source file.
        line: source line.
        inlined_at: file and line of the call, in a function that was inlined.
        instruction: the PTX instruction before the change.
        before: the four PTX instructions ahead of it.
        operands: the PTX instructions that write the registers it reads, wherever they are.
        patch: the fields of the instruction that change.
        threads: most threads of a block, as the kernel was compiled; 0: not stated.
        cluster: blocks of a cluster, as the kernel was compiled; 0: not stated.
        copy: how many mutants of the same kind and source line come before it: unrolled loops, inlined functions.
    """

    kernel: str
    key: str
    pc: int
    kind: str
    file: str
    line: int
    inlined_at: tuple[str, int]
    instruction: str
    before: tuple[str, ...]
    operands: tuple[str, ...]
    patch: tuple[tuple[str, Any], ...]
    threads: int = 0
    cluster: int = 0
    copy: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.instruction}"

    def apply(self, code: np.ndarray) -> np.ndarray:
        """The program's instructions with the change."""
        changed = code.copy()
        for name, value in self.patch:
            if name[1:].isdigit():
                changed[self.pc]["o"][int(name[1:])] = value
            else:
                changed[self.pc][name] = value
        return changed


def _changes(
    program: Program, pc: int, numbers: dict[str, int], offsets: list[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    row, name = program.code[pc], program.names[pc]
    ctl = int(row["ctl"])
    drop = {"op": numbers["nop"], "ctl": SIMPLE}
    stem, _, rest = name.partition(".")
    if ctl == BARRIER:
        yield "drop a barrier", drop
    elif name == "bar.warp.sync":
        yield "drop a warp barrier", drop
    elif name.startswith("mma."):
        yield "drop an mma", drop
    elif name in _DROPPED and program.classes[pc] not in ("st.local", "ld.param"):
        yield f"drop {_DROPPED[name]}", drop
        if name in ("cp.async.wait_group", "wgmma.wait_group"):
            yield "wait for one group less", {"imm": int(row["imm"]) + 1}
        if name == "wgmma.mma_async" and int(row["b"]) < 2:
            yield "transpose B or not", {"c": int(row["c"]) ^ 4}
    elif stem in ("setp", "set") and int(row["a"]) in _OTHER_COMPARE:
        other = _OTHER_COMPARE[int(row["a"])]
        yield f"{_COMPARE[int(row['a'])]} -> {_COMPARE[other]}", {"a": other}
    elif stem in _OTHER_NAME and f"{_OTHER_NAME[stem]}.{rest}" in numbers:
        yield f"{stem} -> {_OTHER_NAME[stem]}", {"op": numbers[f"{_OTHER_NAME[stem]}.{rest}"]}
    elif name == "shfl":
        mode = int(row["a"])
        if mode < 2:
            yield "shuffle the other way", {"a": 1 - mode}
        else:
            others = [slot for slot in offsets if slot != int(row["o"][3])]
            yield "shuffle from another lane", {"o3": others[0]} if others and mode == 2 else {"a": 5 - mode}
    elif name == "vote" and int(row["a"]) < 2:
        yield "all -> any" if int(row["a"]) == 0 else "any -> all", {"a": 1 - int(row["a"])}
    elif name == "ldmatrix":
        yield "transpose an ldmatrix or not", {"b": 1 - int(row["b"])}
    elif name == "selp.b32" or name == "selp.b64":
        yield "swap a selection", {"o1": int(row["o"][2]), "o2": int(row["o"][1])}
    if int(row["guard"]) != NONE and ctl != LABEL:
        if ctl == BRANCH:
            yield "invert a branch", {"guard_not": 1 - int(row["guard_not"])}
        elif ctl in (SIMPLE, MEET, MEET_ALL, BARRIER):
            yield "drop a predicate", {"guard": NONE}
    if int(row["flags"]) & NOT_C:
        yield "drop a not", {"flags": int(row["flags"]) & ~NOT_C}


def _registers(text: str) -> tuple[list[str], list[str]]:
    """The registers that an instruction writes and those that it reads."""
    guard, opcode, operands = re.fullmatch(r"(@!?%?\w+ )?(\S+) ?(.*)", text).groups("")  # type: ignore[union-attr]
    result = re.match(r"\{[^}]*\}|%?\w+(\|%?\w+)?(?=,|$)", operands)
    names = r"%?\b[a-z]+\d*\b"
    written = result.group() if result and not opcode.startswith(("bra", "bar", "fence")) else ""
    return re.findall(names, written), re.findall(names, guard + operands[len(written) :])


class _Flow:
    """Where the registers of a program are written and read."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._registers = [_registers(text) if text else ([], []) for text in texts]
        self._writers: dict[str, list[int]] = {}
        for pc, (written, _) in enumerate(self._registers):
            for name in written:
                self._writers.setdefault(name, []).append(pc)
        self._read = {name for _, read in self._registers for name in read}

    def operands(self, pc: int) -> tuple[str, ...]:
        """What writes the operands of an instruction: the last one above it, or else, in a loop, the first below."""
        found = []
        for name in dict.fromkeys(self._registers[pc][1]):
            writers = self._writers.get(name, [])
            found += [max((w for w in writers if w < pc), default=writers[0])] if writers else []
        return tuple(self._texts[w] for w in found)

    def is_unread(self, pc: int) -> bool:
        """Whether an instruction has results, of which no instruction reads any; compilers leave some."""
        written = self._registers[pc][0]
        return bool(written) and self._read.isdisjoint(written)


def _place(program: Program, loc: Loc | None) -> tuple[str, int]:
    return (PurePosixPath(program.files.get(loc.file, "?")).name, loc.line) if loc else ("?", 0)


def mutants(kernel: Kernel) -> list[Mutant]:
    """All mutants of a kernel, in the order of its instructions; none of those whose results are never read."""
    program = kernel.program
    numbers = {name: k for k, name in enumerate(kernel.handlers())}
    constants = {int(slot): int(value) for slot, _, value in program.constants}
    offsets = sorted(
        {int(program.code[pc]["o"][3]) for pc, n in enumerate(program.names) if n == "shfl"} & set(constants)
    )
    out = []
    copies: Counter[tuple[str, int, str]] = Counter()
    flow = _Flow(program.texts)
    for pc in range(len(program.code)):
        if flow.is_unread(pc) and not program.names[pc].startswith(("atom", "mbarrier")):
            continue
        loc = program.locs[pc]
        for kind, patch in _changes(program, pc, numbers, offsets):
            file, line = _place(program, loc)
            out.append(
                Mutant(
                    program.name,
                    kernel.key,
                    pc,
                    kind,
                    file,
                    line,
                    _place(program, loc.inlined_at if loc else None),
                    program.texts[pc],
                    tuple(program.texts[max(pc - 4, 0) : pc]),
                    flow.operands(pc),
                    tuple(patch.items()),
                    program.max_threads,
                    program.cluster[0],
                    copies[file, line, kind],
                )
            )
            copies[file, line, kind] += 1
    return out


@dataclass(frozen=True)
class Equivalent:
    """A class of mutants that compute what the unchanged kernel computes.

    Attributes:
        reason: why.
        file: regular expression of the name of the source file.
        source: regular expression, searched for in the source line.
        call: regular expression, searched for in the source line of the call, in a function that was inlined.
        kind: regular expression of the kind of change, the whole of it.
        instruction: regular expression, searched for in the PTX instruction.
        context: regular expression, searched for in the instruction and the four ahead of it, a line each.
        operands: regular expression, searched for in the instructions that write its operands, a line each.
        kernel: regular expression of the kernel's name.
        unreached: of instructions alone that no problem executes.
        variants: of kernels alone for which this is true.
    """

    reason: str
    file: str = ".*"
    source: str = ""
    call: str = ""
    kind: str = ".*"
    instruction: str = ""
    context: str = ""
    operands: str = ""
    kernel: str = ".*"
    unreached: bool = False
    variants: Callable[[Mutant], bool] = lambda mutant: True

    def matches(self, mutant: Mutant, line_of: Callable[[str, int], str], unreached: bool) -> bool:
        """Whether a mutant is one of the class; `line_of` is the text of a line of a source file."""
        return (
            unreached >= self.unreached
            and self.variants(mutant)
            and re.fullmatch(self.file, mutant.file) is not None
            and re.fullmatch(self.kernel, mutant.kernel) is not None
            and re.search(self.context, "\n".join((*mutant.before, mutant.instruction))) is not None
            and re.search(self.operands, "\n".join(mutant.operands)) is not None
            and re.search(self.source, line_of(mutant.file, mutant.line)) is not None
            and re.search(self.call, line_of(*mutant.inlined_at)) is not None
            and re.fullmatch(self.kind, mutant.kind) is not None
            and re.search(self.instruction, mutant.instruction) is not None
        )


@dataclass
class Report:
    """What became of the mutants.

    Attributes:
        killed: each with the problem that killed it and how.
        survivors: those that no problem killed.
        equivalent: those that no problem can kill, each with the reason.
        contradictions: those that are listed as equivalent and were killed: the list says too much.
        unreached: keys of kernels and numbers of instructions that no problem executes.
        seconds: time of the survey.
    """

    killed: list[tuple[Mutant, str, str]] = field(default_factory=list)
    survivors: list[Mutant] = field(default_factory=list)
    equivalent: list[tuple[Mutant, str]] = field(default_factory=list)
    contradictions: list[tuple[Mutant, str]] = field(default_factory=list)
    unreached: set[tuple[str, int]] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of the mutants that were killed, without those that are equivalent."""
        total = len(self.killed) + len(self.survivors)
        return len(self.killed) / total if total else 1.0

    def __str__(self) -> str:
        total = len(self.killed) + len(self.survivors) + len(self.equivalent)
        lines = [
            f"killed {len(self.killed)} of {total} mutants ({100 * len(self.killed) / max(total, 1):.1f} %), "
            f"{len(self.equivalent)} equivalent, {len(self.survivors)} alive; "
            f"without the equivalent ones {100 * self.share:.1f} % in {self.seconds:.0f} s"
        ]
        lines += _counted("by ", [reason for _, _, reason in self.killed])
        lines += ["equivalent:"] if self.equivalent else []
        lines += _counted("", [reason for _, reason in self.equivalent])
        lines += ["listed as equivalent, but killed:"] if self.contradictions else []
        lines += sorted(f"  {m}  ({reason})" for m, reason in self.contradictions)
        lines += ["alive:"] if self.survivors else []
        for m in sorted(self.survivors, key=lambda m: (m.kernel, m.file, m.line, m.pc)):
            never = " (never executed)" if (m.key, m.pc) in self.unreached else ""
            lines.append(f"  {m.kernel} {m.key[:4]} {m.pc}  {m}{never}")
        return "\n".join(lines)


def _counted(before: str, reasons: Sequence[str]) -> list[str]:
    """Each reason with how often it came, the most frequent first."""
    return [f"  {n:5d} {before}{reason}" for reason, n in Counter(reasons).most_common()]


def _is_fixed(number: int) -> bool:
    """Every third problem runs in fixed order, in which every counter is exact; the others run in random order."""
    return number % 3 == 2


@contextlib.contextmanager
def _settings(number: int, time_limit: float) -> Iterator[list[Launch]]:
    """How a problem runs: copies come early in every other one."""
    seed = None if _is_fixed(number) else number
    with record(seed=seed, cp_async=("late", "early")[number % 2], time_limit=time_limit) as launches:
        yield launches


def _traffic(launches: Sequence[Launch]) -> list[tuple[Any, ...]]:
    """What launches read and wrote."""
    out: list[tuple[Any, ...]] = []
    for launch in launches:
        out += [(name, c.read_bytes, c.write_bytes) for name, c in sorted(launch.counters.arrays.items())]
    return out


@dataclass(frozen=True)
class _Run:
    """What a problem showed; wavefronts by instruction, of each launch, if it ran in fixed order."""

    bits: list[bytes]
    traffic: list[tuple[Any, ...]]
    wavefronts: list[tuple[str, np.ndarray]]
    launches: list[Launch] = field(repr=False)

    def differs(self, other: _Run, mutant: Mutant | None = None) -> str | None:
        """How another run differs from this one; what the mutant itself sends to shared memory does not count."""
        if self.bits != other.bits:
            return "other bits"

        def sums(run: _Run) -> list[int]:
            return [
                int(counts.sum() - (counts[mutant.pc] if mutant and mutant.kernel == name else 0))
                for name, counts in run.wavefronts
            ]

        return "other traffic" if self.traffic != other.traffic or sums(self) != sums(other) else None


def _run(problem: Callable[[], Any], number: int, time_limit: float) -> _Run:
    with _settings(number, time_limit) as launches:
        results = problem()
    bits = [] if results is None else [np.ascontiguousarray(array).tobytes() for array in results]
    counted = launches if _is_fixed(number) else []
    wavefronts = [(launch.kernel, launch.counters._pcs["shared_real"].astype(np.int64)) for launch in counted]
    return _Run(bits, _traffic(launches), wavefronts, launches)


def _try(mutant: Mutant, users: Sequence[int]) -> tuple[int, str] | None:
    """The problem that kills a mutant, and how; None if none does."""
    for k in users:
        try:
            with mutated(mutant.key, mutant.apply):
                run = _run(_state["problems"][k][1], k, max(5.0, 20 * _state["seconds"][k]))
        except AssertionError:
            return k, "wrong values"
        except Exception as error:
            finding = getattr(error, "finding", None)
            return k, f"check {finding.check}" if finding is not None else type(error).__name__
        difference = _state["runs"][k].differs(run, mutant)
        if difference is not None:
            return k, difference
    return None


_state: dict[str, Any] = {}


def _unreached(kernels: dict[str, Kernel], runs: Sequence[_Run]) -> set[tuple[str, int]]:
    executed = {key: np.zeros(len(kernel.program.code), bool) for key, kernel in kernels.items()}
    for run in runs:
        for launch in run.launches:
            for key, kernel in kernels.items():
                if launch.counters._program is kernel.program:
                    executed[key] |= launch.counters._pcs["executed"] > 0
        run.launches.clear()
    return {(key, int(pc)) for key, done in executed.items() for pc in np.flatnonzero(~done)}


def _work(index: int) -> tuple[int, tuple[int, str] | None]:
    mutant, kills, seconds = _state["mutants"][index], _state["kills"], _state["seconds"]
    # What killed most for its time comes first.
    killed = _try(mutant, sorted(_state["users"][mutant.key], key=lambda k: -(1 + kills[k]) / seconds[k]))
    if killed is not None:
        kills[killed[0]] += 1
    return index, killed


def survey(
    problems: Problems,
    kernel: str = ".*",
    sample: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    min_problems: int = 1,
    progress: Callable[[str], None] | None = None,
    equivalent: Sequence[Equivalent] = (),
    sources: Sequence[Path] = (),
) -> Report:
    """Finds the mutants of the kernels that the problems launch, and which of them live.

    Args:
        problems: pairs of a name and a callable that raises if a result is wrong.
        kernel: regular expression of the kernels' names.
        sample: how many mutants to try, at random; all of them if None.
        seed: of the sample.
        jobs: processes.
        min_problems: leaves out kernels that fewer problems launch; they need problems of their own first.
        progress: called with a line of text now and then.
        equivalent: mutants that no problem can kill.
        sources: folders of the sources that `equivalent` quotes.

    Returns:
        The report.

    Raises:
        RuntimeError: If a problem gives other results when it runs again.
    """
    start = time.perf_counter()
    users: dict[str, list[int]] = {}
    kernels: dict[str, Kernel] = {}
    seconds, runs = [], []
    for k, (name, problem) in enumerate(problems):
        with watch_kernels() as seen:
            runs.append(_run(problem, k, 600.0))
        begun = time.perf_counter()
        if runs[-1].differs(_run(problem, k, 600.0)) is not None:
            raise RuntimeError(f"{name} gives other results when it runs again")
        seconds.append(time.perf_counter() - begun)
        for one in seen:
            if re.fullmatch(kernel, one.name):
                kernels[one.key] = one
                users.setdefault(one.key, [])
                if k not in users[one.key]:
                    users[one.key].append(k)
        if progress:
            progress(f"{name}: {seconds[-1]:.2f} s, {', '.join(sorted({s.name for s in seen}))}")
    everyone = [m for key, one in kernels.items() if len(users[key]) >= min_problems for m in mutants(one)]
    if sample is not None and sample < len(everyone):
        everyone = random.Random(seed).sample(everyone, sample)
    report = Report(unreached=_unreached(kernels, runs))
    kills = [0] * len(problems)
    _state.update(mutants=everyone, problems=problems, users=users, seconds=seconds, runs=runs, kills=kills)
    lines = _Lines(sources)
    done = 0
    with contextlib.ExitStack() as stack:
        results: Iterable[tuple[int, tuple[int, str] | None]]
        if jobs > 1:
            import multiprocessing

            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")))
            results = pool.map(_work, range(len(everyone)), chunksize=4)
        else:
            results = map(_work, range(len(everyone)))
        for index, killed in results:
            mutant = everyone[index]
            unreached = (mutant.key, mutant.pc) in report.unreached
            reason = next((e.reason for e in equivalent if e.matches(mutant, lines, unreached)), None)
            if killed is not None:
                report.killed.append((mutant, problems[killed[0]][0], killed[1]))
                if reason is not None:
                    report.contradictions.append((mutant, reason))
            elif reason is not None:
                report.equivalent.append((mutant, reason))
            else:
                report.survivors.append(mutant)
            done += 1
            if progress and done % 50 == 0:
                progress(f"{done} of {len(everyone)}, {len(report.survivors)} alive")
    report.seconds = time.perf_counter() - start
    return report


class _Lines:
    """The lines of sources."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._files: dict[str, list[str]] = {}

    def __call__(self, file: str, line: int) -> str:
        if file not in self._files:
            paths = [folder / file for folder in self._folders if (folder / file).is_file()]
            self._files[file] = paths[0].read_text().splitlines() if paths else []
        lines = self._files[file]
        return lines[line - 1] if 0 < line <= len(lines) else ""


def _load(target: str) -> tuple[Problems, Sequence[Equivalent], Sequence[Path]]:
    """The problems, the mutants that they cannot kill, and where the sources are."""
    where, _, name = target.partition(":")
    if where.endswith(".py"):
        path = Path(where).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return (
        list(getattr(module, name or "problems")()),
        getattr(module, "EQUIVALENT", ()),
        getattr(module, "SOURCES", ()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cuflash.simulator.mutate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("problems", help="module:function or file.py:function that returns (name, callable) pairs")
    parser.add_argument("--kernel", default=".*", help="regular expression of kernel names")
    parser.add_argument("--only", default="", help="regular expression of the names of the problems to use")
    parser.add_argument("--sample", type=int, help="number of mutants to try, at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--min-problems", type=int, default=1, help="leave out kernels that fewer problems launch")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit with 1 if a smaller share is killed")
    options = parser.parse_args(argv)
    problems, equivalent, sources = _load(options.problems)
    report = survey(
        [(name, problem) for name, problem in problems if re.search(options.only, name)],
        options.kernel,
        options.sample,
        options.seed,
        options.jobs,
        options.min_problems,
        lambda line: print(line, flush=True),
        equivalent,
        sources,
    )
    print(report)
    return int(report.share < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
