"""Machine code of a kernel as a graph: its main loop, and the path through it when nothing special happens."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Instructions that move or multiply keys, on tensor cores or without: the steady path is the one with the most of them.
_TENSOR_WORK, _FLOAT_WORK = ("LDGSTS", "LDSM", "HMMA"), ("LDGSTS", "LDS", "FFMA")
CLASSES = ("LDGSTS", "LDSM", "HMMA", "FFMA", "MUFU", "SHFL", "BAR")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: As disassembled, predicate included.
        line: Source line as "file:line", or "".
    """

    text: str
    line: str = ""

    @property
    def opcode(self) -> str:
        """The opcode without its modifiers."""
        return self.words[0].split(".")[0]

    @property
    def words(self) -> list[str]:
        """Opcode with modifiers and operands; no predicate."""
        words = self.text.split()
        return words[1:] if words[0].startswith("@") else words

    @property
    def is_predicated(self) -> bool:
        """Whether it may do nothing."""
        return self.text.startswith("@")


@dataclass
class Program:
    """A kernel's instructions and where each may go next."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)


def disassemble(code: bytes) -> Program:
    """Disassemble the one kernel of a cubin.

    Raises:
        FileNotFoundError: Without nvdisasm.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_nvdisasm(), "-c", "-g", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Program:
    """Read what nvdisasm writes."""
    program, labels, line = Program(), {}, ""
    for row in text.splitlines():
        if match := re.match(r"\s*(\.L\w+):", row):
            labels[match[1]] = len(program.instructions)
        elif match := re.search(r'//## File "([^"]+)", line (\d+)', row):
            line = f"{Path(match[1]).name}:{match[2]}"
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", row):
            program.instructions.append(Instruction(match[1], line))
    last = len(program.instructions) - 1
    for i, instruction in enumerate(program.instructions):
        target = re.search(r"`\((\.L\w+)\)", instruction.text)
        following = []
        conditional = instruction.is_predicated
        # A call of a label within the kernel never returns: it is a jump that ptxas found shorter.
        if instruction.opcode == "BRA" or (instruction.opcode == "CALL" and target):
            # BRA.DIV and BRA.U depend on a register that follows the opcode, others on a predicate at most.
            conditional |= not instruction.words[1].startswith("`")
            if target:
                following.append(labels[target[1]])
        elif instruction.opcode not in ("EXIT", "RET", "BRX"):
            conditional = True
        if conditional and i < last:
            following.append(i + 1)
        program.successors.append(following)
    return program


@dataclass(frozen=True)
class MainLoop:
    """One turn of a kernel's main loop when no block of it that is seldom needed is entered.

    Attributes:
        path: The instructions, loops inside taken once.
        inner_loops: Number of loops that the path takes.
    """

    path: list[Instruction]
    inner_loops: int

    def count(self, opcode: str) -> int:
        """Count the instructions with an opcode."""
        return sum(instruction.opcode == opcode for instruction in self.path)

    def classes(self) -> dict[str, int]:
        """Count instructions by class: those of ``CLASSES``, and "other"."""
        counts = Counter(i.opcode if i.opcode in CLASSES else "other" for i in self.path)
        return {name: counts[name] for name in (*CLASSES, "other")}


def main_loop(program: Program) -> MainLoop:
    """Find the main loop, and the path through it when nothing special happens.

    The main loop is the smallest one that both copies keys and computes with them. Its steady path is the one from its
    head back to its head with the most copies and products, of those the shortest: masks, rescaling, the next item and
    divergence are left aside.

    Raises:
        ValueError: If there is no such loop.
    """
    loops = _loops(program)
    candidates = []
    for head, body in loops.items():
        opcodes = {program.instructions[i].opcode for i in body}
        if "LDGSTS" in opcodes and ("HMMA" in opcodes or "FFMA" in opcodes):
            candidates.append((len(body), head, "HMMA" in opcodes))
    if not candidates:
        raise ValueError("no loop copies keys and computes with them")
    _, head, tensor = min(candidates)
    body = loops[head]
    inner = {
        (i, j) for j, other in loops.items() if j in body and j != head for i in other if j in program.successors[i]
    }
    path = _steady_path(program, head, body, inner, _TENSOR_WORK if tensor else _FLOAT_WORK)
    turned = {j for i, j in inner if i in path and j in path}
    return MainLoop([program.instructions[i] for i in path], len(turned))


def odd_descriptors(program: Program) -> int:
    """Count memory accesses whose descriptor is an odd uniform register: illegal, a known bug of ptxas."""
    return sum(bool(re.search(r"desc\[UR\d*[13579]\]", i.text)) for i in program.instructions)


def _nvdisasm() -> str:
    """Find nvdisasm: of the wheel, or on the path."""
    for folder in sys.path:
        for path in Path(folder or ".").glob("nvidia/*/bin/nvdisasm"):
            return str(path)
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise FileNotFoundError("this needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return on_path


def _loops(program: Program) -> dict[int, set[int]]:
    """Return the bodies of all natural loops by their heads; loops with one head are one."""
    predecessors: list[list[int]] = [[] for _ in program.instructions]
    for i, following in enumerate(program.successors):
        for j in following:
            predecessors[j].append(i)
    dominates = _dominators(program, predecessors)
    bodies: dict[int, set[int]] = {}
    for i, following in enumerate(program.successors):
        for head in following:
            if dominates(head, i):
                body = bodies.setdefault(head, {head})
                stack = [i]
                while stack:
                    node = stack.pop()
                    if node not in body:
                        body.add(node)
                        stack += predecessors[node]
    return bodies


def _postorder(program: Program, start: int, allowed: Callable[[int, int], bool] = lambda i, j: True) -> list[int]:
    order, seen, stack = [], {start}, [(start, iter(program.successors[start]))]
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following not in seen and allowed(node, following):
                seen.add(following)
                stack.append((following, iter(program.successors[following])))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _dominators(program: Program, predecessors: list[list[int]]) -> Callable[[int, int], bool]:
    """Immediate dominators after Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm"."""
    order = _postorder(program, 0)
    number = {node: n for n, node in enumerate(order)}
    above: dict[int, int] = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [p for p in predecessors[node] if p in above]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while number[best] < number[other]:
                        best = above[best]
                    while number[other] < number[best]:
                        other = above[other]
            if above.get(node) != best:
                above[node] = best
                changed = True

    def dominates(upper: int, lower: int) -> bool:
        if lower not in above:
            return False
        while lower != upper and lower != 0:
            lower = above[lower]
        return lower == upper

    return dominates


def _steady_path(
    program: Program, head: int, body: set[int], inner: set[tuple[int, int]], work: tuple[str, ...]
) -> list[int]:
    """Return the path from a loop's head to its end that does the most work, and is the shortest of those."""
    order = _postorder(program, head, lambda i, j: j in body and j != head and (i, j) not in inner)
    best: dict[int, tuple[int, int, int]] = {}  # node -> (work from here on, -length, next node)
    for node in order:
        following = program.successors[node]
        ways = [(best[j][0], best[j][1], j) for j in following if j != head and (node, j) not in inner and j in best]
        if head in following:
            ways.append((0, 0, head))
        if ways:
            done, length, chosen = max(ways)
            best[node] = done + (program.instructions[node].opcode in work), length - 1, chosen
    path = [head]
    while best[path[-1]][2] != head:
        path.append(best[path[-1]][2])
    return path
