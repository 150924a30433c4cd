"""Parser of PTX text: modules, functions, registers and instructions.

The parser knows the grammar, not the instructions: `decode.py` gives them their meaning. Text that it cannot place is
an error, never skipped, because a kernel that silently loses an instruction is another kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Function", "Imm", "Instr", "Loc", "Mem", "Module", "Name", "PtxError", "Reg", "Symbol", "Vec", "parse"]

WIDTHS = {
    "pred": 0,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class PtxError(ValueError):
    """The text is not PTX that this parser understands."""


@dataclass(frozen=True)
class Loc:
    """A place in the CUDA source: a file number of the module, a line, and where that line was inlined, if it was."""

    file: int
    line: int
    inlined_at: Loc | None = None


@dataclass(eq=False)
class Reg:
    """A virtual register. Two registers of one name in different scopes are different objects."""

    name: str
    width: int  # bytes; 0 is a predicate
    index: int  # position among the registers of the function


@dataclass(frozen=True)
class Imm:
    """A literal: an int, or a float with the bits it was written with."""

    value: int | float
    bits: int | None = None
    width: int = 0  # 4 for 0f..., 8 for 0d..., 0 for integers and decimal fractions


@dataclass(frozen=True)
class Name:
    """A symbol, label or special register."""

    text: str


@dataclass(frozen=True)
class Vec:
    """`{a, b, ...}`; also `a|b`, the two results of setp and shfl."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Mem:
    """`[base + offset]`; further addresses, as in `[a], [b]`, are operands of their own.

    `[base, {c, d}]` has coordinates: of a box, in the tensor whose map lies there.
    """

    base: Reg | Name | Imm
    offset: int = 0
    coordinates: Vec | None = None


@dataclass(frozen=True)
class Not:
    """`!p`: a predicate operand, inverted."""

    reg: Reg


Operand = Reg | Imm | Name | Vec | Mem | Not


@dataclass
class Instr:
    """One instruction. `op` is the opcode split at its dots."""

    op: tuple[str, ...]
    args: list[Operand]
    guard: Reg | None = None
    guard_not: bool = False
    ptx_line: int = 0
    loc: Loc | None = None
    text: str = ""


@dataclass
class Symbol:
    """A variable with an address: a parameter, shared, local, global or constant memory."""

    name: str
    space: str
    align: int
    size: int  # bytes; 0 for extern arrays of unknown length
    init: bytes | None = None
    relocations: tuple[tuple[int, str], ...] = ()
    type: str = "b8"


@dataclass
class Function:
    """An entry (kernel) or a device function."""

    name: str
    entry: bool
    params: list[Symbol]
    returns: list[Symbol] = field(default_factory=list)
    symbols: dict[str, Symbol] = field(default_factory=dict)
    regs: list[Reg] = field(default_factory=list)
    code: list[Instr | Name] = field(default_factory=list)  # a Name is a label
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ptx_line: int = 0


@dataclass
class Module:
    """A parsed PTX file."""

    functions: dict[str, Function]
    symbols: dict[str, Symbol]
    files: dict[int, str]
    declared: set[str]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_BLANK = re.compile(r"\s+")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+([^\n]*)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+\d+")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"[^\n]*')
_VAR = re.compile(r"(?:\.(?:extern|visible|weak|common)\s+)*\.(global|const|shared|local|param)\b\s*(.*)", re.S)
_VARNAME = re.compile(r"([A-Za-z_$%][\w$]*)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$", re.S)
_INT = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_ADDRESS = re.compile(r"([^+\-\s]+|-\d+)\s*(?:([+-])\s*(-?\w+))?$")
_RANGE = re.compile(r"([A-Za-z_$%][\w$]*?)<(\d+)>$")
_INDEXED = re.compile(r"(.*?)(\d+)$")


def _integer(text: str) -> int:
    body = text.rstrip("U")
    sign = -1 if body.startswith("-") else 1
    body = body.lstrip("+-")
    if len(body) > 1 and body[0] == "0" and body[1] not in "xXbB":
        return sign * int(body, 8)
    return sign * int(body, 0)


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    if "{" not in text and "(" not in text:  # an address has no commas
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    if last or parts:
        parts.append(last)
    return parts


class _Scope:
    """The registers and symbols declared between two braces."""

    def __init__(self) -> None:
        self.ranges: dict[str, tuple[int, int]] = {}
        self.names: dict[str, Reg | Name] = {}


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments become blanks of the same length so that positions keep naming the line of the original.
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
        self.pos = 0
        self.counted_pos = 0
        self.counted_line = 1
        self.module = Module({}, {}, {}, set())
        self.loc: Loc | None = None
        self.imm_cache: dict[str, Operand] = {}

    # -- positions and errors

    def line(self, pos: int) -> int:
        if pos < self.counted_pos:
            self.counted_pos, self.counted_line = 0, 1
        self.counted_line += self.text.count("\n", self.counted_pos, pos)
        self.counted_pos = pos
        return self.counted_line

    def fail(self, what: str, pos: int | None = None) -> PtxError:
        pos = self.pos if pos is None else pos
        snippet = self.text[pos : pos + 100].split("\n")[0]
        return PtxError(f"PTX line {self.line(pos)}: {what}: {snippet!r}")

    def blank(self) -> None:
        m = _BLANK.match(self.text, self.pos)
        if m:
            self.pos = m.end()

    def until(self, end: str) -> str:
        stop = self.text.find(end, self.pos)
        if stop < 0:
            raise self.fail(f"no {end!r} follows")
        body = self.text[self.pos : stop]
        self.pos = stop + len(end)
        return body

    # -- module level

    def parse(self) -> Module:
        while True:
            self.blank()
            if self.pos >= len(self.text):
                return self.module
            rest = self.text
            if rest.startswith((".version", ".target", ".address_size"), self.pos):
                self.until("\n")
            elif rest.startswith(".file", self.pos):
                m = _FILE.match(rest, self.pos)
                if not m:
                    raise self.fail("a .file directive that cannot be read")
                self.module.files[int(m.group(1))] = m.group(2)
                self.pos = m.end()
            elif rest.startswith(".loc", self.pos):
                self.location()
            elif rest.startswith(".pragma", self.pos):
                self.until(";")
            elif rest.startswith(".section", self.pos):
                self.until("{")
                self.until("}")
            elif re.compile(r"(\.(visible|extern|weak|common)\s+)*\.(entry|func)\b").match(rest, self.pos):
                self.function()
            elif re.compile(r"(\.(visible|extern|weak|common)\s+)*\.(global|const|shared)\b").match(rest, self.pos):
                for sym in self.variable(self.until(";")):
                    self.module.symbols[sym.name] = sym
            else:
                raise self.fail("not understood at module level")

    def location(self) -> None:
        m = _LOC.match(self.text, self.pos)
        if not m:
            raise self.fail("a .loc directive that cannot be read")
        self.pos = m.end()
        inlined = _INLINED.search(m.group(3))
        outer = Loc(int(inlined.group(1)), int(inlined.group(2))) if inlined else None
        if (
            int(m.group(2)) > 0 or self.loc is None
        ):  # line 0: the compiler has no line; the one before is the better guess
            self.loc = Loc(int(m.group(1)), int(m.group(2)), outer)

    def variable(self, body: str) -> list[Symbol]:
        start = self.pos
        m = _VAR.match(body.strip())
        if not m:
            raise self.fail(f"a variable that cannot be read: {body!r}", start)
        space, rest = m.groups()
        extern = ".extern" in body
        align, vector, type_ = 0, 1, ""
        while True:
            rest = rest.strip()
            word = re.match(r"\.(\w+)", rest)
            if not word:
                break
            key = word.group(1)
            rest = rest[word.end() :]
            if key == "align":
                number = re.match(r"\s*(\d+)", rest)
                assert number is not None
                align = int(number.group(1))
                rest = rest[number.end() :]
            elif key in ("v2", "v4"):
                vector = int(key[1])
            elif key in WIDTHS:
                type_ = key
            elif key in ("ptr", "global", "const", "shared", "local", "attribute", "managed"):
                continue
            else:
                raise self.fail(f"unknown attribute .{key} of a variable", start)
        out = []
        for one in _split(rest):
            name = _VARNAME.match(one)
            if not name or not type_:
                raise self.fail(f"a variable that cannot be read: {body!r}", start)
            count = vector
            for dim in re.findall(r"\[\s*(\d*)\s*\]", name.group(2)):
                count *= int(dim) if dim else 0
            width = WIDTHS[type_]
            init, relocations = self.initial(name.group(3), type_, count * width) if name.group(3) else (None, ())
            out.append(
                Symbol(
                    name.group(1),
                    space,
                    align or width * vector,
                    0 if extern and not name.group(2) else count * width,
                    init,
                    relocations,
                    type_,
                )
            )
        return out

    def initial(self, text: str, type_: str, size: int) -> tuple[bytes, tuple[tuple[int, str], ...]]:
        width = WIDTHS[type_]
        out, relocations = bytearray(), []
        for item in _split(text.strip().strip("{}").replace("{", "").replace("}", "")):
            if _INT.match(item):
                out += (_integer(item) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            elif re.match(r"0[fF][0-9a-fA-F]{8}$", item) or re.match(r"0[dD][0-9a-fA-F]{16}$", item):
                out += int(item[2:], 16).to_bytes(width, "little")
            else:
                m = re.match(r"(?:generic\()?([\w$]+)\)?$", item)
                if not m or width != 8:
                    raise self.fail(f"an initial value that cannot be read: {item!r}")
                relocations.append((len(out), m.group(1)))
                out += bytes(8)
        return bytes(out.ljust(size, b"\0")), tuple(relocations)

    # -- functions

    def params(self, text: str) -> list[Symbol]:
        return [s for one in _split(text) for s in self.variable(one)]

    def function(self) -> None:
        start = self.pos
        head_end = min(
            p for p in (self.text.find("{", self.pos), self.text.find(";", self.pos), len(self.text)) if p >= 0
        )
        head = self.text[self.pos : head_end]
        self.pos = head_end + 1
        m = re.match(
            r"\s*(?:\.(?:visible|extern|weak|common)\s+)*\.(entry|func)\s*(?:\(([^)]*)\))?"
            r"\s*([\w$]+)\s*(?:\(([^)]*)\))?(.*)",
            head,
            re.S,
        )
        if not m:
            raise self.fail("a function head that cannot be read", start)
        kind, returns, name, params, directives = m.groups()
        if self.text[head_end : head_end + 1] == ";":
            self.module.declared.add(name)
            return
        function = Function(
            name, kind == "entry", self.params(params or ""), self.params(returns or ""), ptx_line=self.line(start)
        )
        for key, values in re.findall(r"\.(\w+)([\d,\s]*)", directives):
            function.directives[key] = tuple(int(v) for v in re.findall(r"\d+", values))
        for sym in function.params + function.returns:
            function.symbols[sym.name] = sym
        self.body(function)
        self.module.functions[name] = function

    def body(self, fn: Function) -> None:
        self.loc = None
        scopes = [_Scope()]
        text = self.text
        labels: set[str] = set()
        while True:
            self.blank()
            if self.pos >= len(text):
                raise self.fail("the function does not end")
            c = text[self.pos]
            if c == "{":
                scopes.append(_Scope())
                self.pos += 1
            elif c == "}":
                scopes.pop()
                self.pos += 1
                if not scopes:
                    return
            elif c == ";":
                self.pos += 1
            elif c == ".":
                self.directive(fn, scopes)
            else:
                m = _LABEL.match(text, self.pos)
                if m:
                    self.pos = m.end()
                    label = m.group(1)
                    self.blank()
                    if text.startswith(".branchtargets", self.pos):
                        fn.branch_tables[label] = _split(self.until(";").replace(".branchtargets", ""))
                        continue
                    if text.startswith(".callprototype", self.pos):
                        self.until(";")
                        continue
                    if len(scopes) > 1:  # labels of an inner scope may repeat
                        unique = f"{label}#{len(labels)}"
                        scopes[-1].names[label] = Name(unique)
                        self.rename_labels(fn, label, unique)
                        label = unique
                    labels.add(label)
                    fn.code.append(Name(label))
                else:
                    self.instruction(fn, scopes)

    def rename_labels(self, fn: Function, label: str, unique: str) -> None:
        """A branch forward to a label of an inner scope was read before the label: give it the unique name as well."""
        for item in reversed(fn.code):
            if isinstance(item, Name):
                continue
            if item.op[0] == "bra" and item.args and item.args[0] == Name(label):
                item.args[0] = Name(unique)

    def directive(self, fn: Function, scopes: list[_Scope]) -> None:
        text, start = self.text, self.pos
        m = re.compile(r"\.(\w+)").match(text, self.pos)
        word = m.group(1) if m else ""
        if word == "loc":
            self.location()
        elif word == "file":
            f = _FILE.match(text, self.pos)
            if not f:
                raise self.fail("a .file directive that cannot be read")
            self.module.files[int(f.group(1))] = f.group(2)
            self.pos = f.end()
        elif word in ("pragma", "noreturn"):
            self.until(";")
        elif word == "reg":
            body = self.until(";").strip()
            r = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", body, re.S)
            if not r or r.group(1) not in WIDTHS:
                raise self.fail("registers that cannot be read", start)
            width = WIDTHS[r.group(1)]
            for one in _split(r.group(2)):
                many = _RANGE.match(one)
                if many:
                    scopes[-1].ranges[many.group(1)] = (int(many.group(2)), width)
                elif re.match(r"[\w$%]+$", one):
                    scopes[-1].names[one] = self.register(fn, one, width)
                else:
                    raise self.fail(f"a register that cannot be read: {one!r}", start)
        elif word in ("local", "shared", "param", "global", "const", "extern"):
            for sym in self.variable(self.until(";")):
                key = sym.name
                if sym.name in fn.symbols:  # param0 of each call sequence
                    key = f"{sym.name}#{len(fn.symbols)}"
                    sym.name = key
                scopes[-1].names[key.split("#")[0]] = Name(key)
                if sym.space in ("global", "const"):
                    self.module.symbols[key] = sym
                else:
                    fn.symbols[key] = sym
        else:
            raise self.fail("not understood in a function")

    @staticmethod
    def register(fn: Function, name: str, width: int) -> Reg:
        reg = Reg(name, width, len(fn.regs))
        fn.regs.append(reg)
        return reg

    def lookup(self, fn: Function, scopes: list[_Scope], name: str) -> Reg | Name:
        for scope in reversed(scopes):
            found = scope.names.get(name)
            if found is not None:
                return found
            m = _INDEXED.match(name)
            if m and m.group(1) in scope.ranges:
                count, width = scope.ranges[m.group(1)]
                if int(m.group(2)) < count:
                    reg = self.register(fn, name, width)
                    scope.names[name] = reg
                    return reg
        return Name(name)

    def instruction(self, fn: Function, scopes: list[_Scope]) -> None:
        start = self.pos
        text = self.until(";").strip()
        guard, guard_not = None, False
        body = text
        if body.startswith("@"):
            m = re.match(r"@\s*(!?)\s*([\w$%]+)\s+(.*)$", body, re.S)
            if not m:
                raise self.fail("a guard that cannot be read", start)
            guard_not = bool(m.group(1))
            reg = self.lookup(fn, scopes, m.group(2))
            if not isinstance(reg, Reg) or reg.width != 0:
                raise self.fail(f"the guard {m.group(2)} is no predicate", start)
            guard, body = reg, m.group(3)
        m = re.match(r"([a-z][\w.:]*)\s*(.*)$", body, re.S)
        if not m:
            raise self.fail("an instruction that cannot be read", start)
        opcode, rest = m.groups()
        op = tuple(opcode.split("."))
        args = [self.operand(fn, scopes, a, start) for a in _split(rest)]
        fn.code.append(Instr(op, args, guard, guard_not, self.line(start), self.loc, re.sub(r"\s+", " ", text)))

    def operand(self, fn: Function, scopes: list[_Scope], text: str, start: int) -> Operand:
        if not text:
            raise self.fail("an empty operand", start)
        c = text[0]
        if c in "{(":
            close = "}" if c == "{" else ")"
            if text[-1] != close:
                raise self.fail(f"an operand that cannot be read: {text!r}", start)
            return Vec(tuple(self.operand(fn, scopes, t, start) for t in _split(text[1:-1])))
        if c == "[":
            if text[-1] != "]":
                raise self.fail(f"an address that cannot be read: {text!r}", start)
            address, *others = _split(text[1:-1])
            coordinates = [self.operand(fn, scopes, other, start) for other in others]
            m = _ADDRESS.match(address.strip())
            if not m:
                raise self.fail(f"an address that cannot be read: {text!r}", start)
            base = self.operand(fn, scopes, m.group(1), start)
            offset = _integer(m.group(3)) if m.group(3) else 0
            if m.group(2) == "-":
                offset = -offset
            of_box = coordinates[0] if coordinates else None
            if not isinstance(base, (Reg, Name, Imm)) or len(coordinates) > 1 or not isinstance(of_box, Vec | None):
                raise self.fail(f"an address that cannot be read: {text!r}", start)
            return Mem(base, offset, of_box)
        if c == "!":
            reg = self.lookup(fn, scopes, text[1:].strip())
            if not isinstance(reg, Reg):
                raise self.fail(f"an operand that cannot be read: {text!r}", start)
            return Not(reg)
        if "|" in text:
            return Vec(tuple(self.operand(fn, scopes, t.strip(), start) for t in text.split("|")))
        if c.isdigit() or c in "+-":
            known = self.imm_cache.get(text)
            if known is None:
                known = self.imm_cache[text] = self.literal(text, start)
            return known
        if re.match(r"[A-Za-z_$%][\w$.:]*$", text):
            return self.lookup(fn, scopes, text)
        m = re.match(r"([A-Za-z_$%][\w$]*)\s*\+\s*(\d+)$", text)
        if m:
            base = self.lookup(fn, scopes, m.group(1))
            return Mem(base, int(m.group(2)))
        raise self.fail(f"an operand that cannot be read: {text!r}", start)

    def literal(self, text: str, start: int) -> Imm:
        if _INT.match(text):
            return Imm(_integer(text))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Imm(0.0, int(text[2:], 16), 4)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Imm(0.0, int(text[2:], 16), 8)
        try:
            return Imm(float(text))
        except ValueError:
            raise self.fail(f"a number that cannot be read: {text!r}", start) from None


def parse(text: str) -> Module:
    """Parses PTX text.

    Args:
        text: what NVRTC wrote.

    Returns:
        The module: its functions, variables and source files.

    Raises:
        PtxError: naming the line, for anything that is not understood.
    """
    return _Parser(text).parse()


def instructions(function: Function) -> Iterator[Instr]:
    """The instructions of a function, without its labels."""
    for item in function.code:
        if isinstance(item, Instr):
            yield item
