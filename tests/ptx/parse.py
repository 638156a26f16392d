"""PTX text to instructions. Knows the form of a line, not what it means."""

from __future__ import annotations

import re
from typing import NamedTuple

Operand = "str | tuple[str, ...] | Address"


class Address(NamedTuple):
    """[base + offset]: a register, a parameter or `global_smem`, and bytes."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        guard: the predicate register without which a lane does not take part, or "".
        negated: whether a lane takes part where `guard` is false.
        op: the whole opcode, "ld.global.v4.b32".
        operands: a register or literal as text, several in braces as a tuple, or an `Address`.
        text: as printed.
        source: the line of Triton code it comes from, "forward.py:126".
    """

    guard: str
    negated: bool
    op: str
    operands: tuple[Operand, ...]
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text!r} of {self.source}"


class Program(NamedTuple):
    """A kernel. `parameters`: bytes of each. `registers`: bits of each family of names, "%rd" -> 64, predicates 1.
    `labels`: the number of the instruction that follows each."""

    name: str
    parameters: dict[str, int]
    registers: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(?:@(?P<not>!?)(?P<guard>[%\w]+)\s+)?(?P<op>[a-z][\w.:]*)\s*(?P<rest>.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{}").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[]").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def _label(name: str, scope: int) -> str:
    """A label of the kernel, or one of the inline assembly that is scope number `scope`."""
    return name if name.startswith("$") else f"{name} {scope}"


def parse(text: str) -> Program:
    """The one kernel in `text`."""
    head, _, body = text.partition(".visible .entry")[2].partition("{")
    name = head[: head.index("(")].strip()
    parameters = {found[1]: int(found[0]) // 8 for found in re.findall(r"\.param \.[usbf](\d+)[^,)]*?\s(\w+)\s*[,)\n]", head)}
    registers: dict[str, int] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = name
    scope = 0  # pieces of inline assembly with labels of their own so far; their registers are set before they are read
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".section"):
            break  # debug information follows
        if code.startswith(".loc"):
            source = ":".join(comment.split()[0].split(":")[:2])
            continue
        if code.startswith(".reg"):
            bits, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+);", code).groups()
            width = 1 if bits == "pred" else int(bits[1:])
            registers |= {re.sub(r"<\d+>", "", part.strip()): width for part in names.split(",")}
            continue
        if label := re.match(r"([$\w]+):", code):
            labels[_label(label[1], scope)] = len(instructions)
            code = code[label.end() :].strip()
        scope += code == "{"
        if not code.startswith("{ %"):
            code = code.strip("{}")  # a scope
        for statement in filter(None, map(str.strip, code.split(";"))):
            if statement.startswith("."):
                continue
            found = _STATEMENT.fullmatch(statement)
            if found is None:
                raise ValueError(f"not an instruction: {statement!r}")
            operands = tuple(map(_operand, _OPERAND.findall(found["rest"])))
            if found["op"].startswith("bra"):
                operands = (_label(found["rest"], scope),)
            instructions.append(
                Instruction(
                    found["guard"] or "", found["not"] == "!", found["op"], operands, " ".join(statement.split()), source
                )
            )
    return Program(name, parameters, registers, instructions, labels)
