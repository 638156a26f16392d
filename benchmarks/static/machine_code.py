"""Reads the machine code of a compiled kernel and counts its instructions. It takes text and compiles nothing.

The largest cycle of the control flow is the loop over time steps of a persistent kernel, or the loop over the summed axis of a
step kernel. A loop inside it that contains strong loads is a poll. The code has the loads of a poll once, in its loop, or
twice: before its loop, for the first try, and in its loop, for each further try.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx
import triton

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: its predicate or "", its opcode with suffixes, its operands."""

    predicate: str
    opcode: str
    operands: str

    def is_a(self, *names: str) -> bool:
        return self.opcode.split(".")[0] in names

    @property
    def strong(self) -> bool:
        return "STRONG" in self.opcode

    @property
    def bytes(self) -> int:
        """The bytes that one thread accesses."""
        if self.is_a("LDSM", "STSM"):
            return 4 * int(self.opcode.split(".")[-1]) if self.opcode[-1] in "24" else 4
        width = re.search(r"\.(?:[US])?(8|16|64|128)\b", self.opcode)
        return int(width[1]) // 8 if width else 4


class Products(NamedTuple):
    """The matrix products in a loop, of all warps of a program together."""

    instructions: int  # counted for a warp (HMMA), a warp group (HGMMA) or the program (UTCHMMA)
    multiplies: int  # without tensor cores those of FFMA and FFMA2, which include the cell's own few
    read_bytes: int  # bytes that HGMMA and UTCHMMA read from shared memory: 32 of each row of A and of B
    deep: int  # the most HMMA one after another on one accumulator


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers and bytes of stack of a thread (spills go there), and the machine code, by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([f"{BIN}/cuobjdump", "--dump-resource-usage", file.name], [f"{BIN}/nvdisasm", "-c", "-ndf", file.name])
        usage, code = (subprocess.run(each, capture_output=True, text=True, check=True).stdout for each in commands)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2]), code


class Code:
    """The instructions of a kernel, and which can follow which.

    BRA.DIV jumps to code for a warp whose threads have diverged, and BRA.CONV to code for a warp whose threads have not. At the
    end of a poll they never have, but the compiler cannot know this. The code for a diverged warp is therefore left out.
    """

    LABEL = r"\s*(\.L_x_\d+):"
    LINE = r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    TARGET = r"`\((\.L_x_\d+)\)"

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(self.LABEL, line):
                labels[label[1]] = len(self.instructions)
            elif code := re.match(self.LINE, line):
                self.instructions.append(Instruction(code[1] or "", code[2], code[3]))
        graph: nx.DiGraph = nx.DiGraph()
        for at, each in enumerate(self.instructions):
            target = re.search(self.TARGET, each.operands)
            # a call to a label of the kernel is a jump that may return
            jumps = target and each.is_a("BRA", "CALL", "bra") and each.opcode != "BRA.DIV"
            leaves = each.is_a("EXIT", "RET", "ret") or (each.is_a("BRA", "bra") and re.match(self.TARGET, each.operands))
            falls = bool(each.predicate) or not (leaves or each.opcode == "BRA.CONV")
            followers = ([labels[target[1]]] if jumps else []) + [at + 1] * falls
            graph.add_node(at)
            graph.add_edges_from((at, follower) for follower in followers if follower < len(self.instructions))
        self.graph = graph.subgraph({0, *nx.descendants(graph, 0)})  # what is reached

    def cycles(self, within: Iterable[int]) -> list[list[int]]:
        """The strongly connected parts of the control flow among the instructions `within`, in their order."""
        graph = self.graph.subgraph(within)
        parts = map(sorted, nx.strongly_connected_components(graph))
        return sorted(part for part in parts if len(part) > 1 or graph.has_edge(part[0], part[0]))

    def largest(self) -> list[int]:
        """The largest loop with its polls."""
        return max(self.cycles(self.graph), key=len, default=[])

    def loops(self) -> tuple[list[Instruction], list[list[Instruction]]]:
        """The largest loop without its polls, and each of its polls: the loops in it that load strongly, without what they do
        after many tries, which is to look at the clock."""
        inside = set(self.largest())
        entries = {follower for at, follower in self.graph.edges if follower in inside and at not in inside}
        polls = []
        for inner in self.cycles(inside - entries):
            instructions = [self.instructions[at] for at in inner]
            if any(each.is_a("LDG") and each.strong for each in instructions):
                clock = {at for at in inner if "GLOBALTIMER" in self.instructions[at].operands}
                tries = max(self.cycles(set(inner) - clock), key=len) if clock else inner
                polls.append([self.instructions[at] for at in tries])
                inside -= set(inner)
        return [self.instructions[at] for at in sorted(inside)], polls

    def products(self, loop: list[Instruction], warps: int) -> Products:
        instructions = multiplies = read = 0
        constants = {}  # the current constants in uniform registers; UTCHMMA reads its sizes from one
        deep: dict[str, int] = {}  # the instructions so far that add to the accumulator in a register
        for each in loop:
            if constant := re.match(r"(UR\d+), (0x[0-9a-f]+)$", each.operands) if each.is_a("UMOV") else None:
                constants[constant[1]] = int(constant[2], 16)
            if hgmma := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", each.opcode):
                m, n, k = map(int, hgmma.groups())
                multiplies += m * n * k * (warps // 4)
                a_in_registers = re.match(r"R\d+, R\d+", each.operands)
                read += 32 * (n if a_in_registers else m + n) * (warps // 4)
            elif hmma := re.match(r"HMMA\.168(\d+)\b", each.opcode):
                multiplies += 16 * 8 * int(hmma[1]) * warps
                registers = re.findall(r"R\d+|RZ", each.operands)
                deep[registers[0]] = deep.get(registers[-1], 0) + 1
            elif each.is_a("UTCHMMA"):
                # PTX's instruction descriptor: M / 16 from bit 24, N / 8 from bit 17, the type of A from bit 7 (2 is TF32)
                size = constants[re.search(r"idesc\[(UR\d+)\]", each.operands)[1]]
                m, n = (size >> 24 & 31) * 16, (size >> 17 & 63) * 8
                multiplies += m * n * (8 if size >> 7 & 7 == 2 else 16)
                read += 32 * (m + n)
            else:
                continue
            instructions += 1
        if not instructions:
            multiplies = 32 * warps * (tally(loop, "FFMA") + 2 * tally(loop, "FFMA2"))
        return Products(instructions, multiplies, read, max(deep.values(), default=0))


class Ptx(Code):
    """The PTX of a kernel. In PTX each value has a register of its own, so an address can be traced back to its argument."""

    LABEL = r"\s*(\$L__BB\w+):"
    LINE = r"\s+(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s+(.*?)\s*;"
    TARGET = r"(\$L__BB\w+)"

    def loaded(self, argument: int) -> tuple[int, int]:
        """Bytes that the loads in the largest loop bring to a thread, without polls: in all, and of argument `argument`."""
        flow = nx.DiGraph()  # from the argument, and from each 64-bit register, to what is computed from it
        for each in self.instructions:
            written, _, read = each.operands.partition(", ")
            if each.opcode.startswith("ld.param") and read.endswith(f"_param_{argument}]"):
                flow.add_edge("argument", written)
            elif not each.is_a("ld", "st", "cp"):
                flow.add_edges_from((register, written) for register in re.findall(r"%rd\d+", read))
        pointers = nx.descendants(flow, "argument") if "argument" in flow else set()
        of_all = of_argument = 0
        for each in (self.instructions[at] for at in self.largest()):
            if each.opcode.startswith("ld.global"):
                count, width = re.search(r"(?:\.v(\d))?\.[bsuf](\d+)$", each.opcode).groups()
                amount = int(count or 1) * int(width) // 8
            elif each.opcode.startswith("cp.async") and "shared.global" in each.opcode:
                amount = int(re.search(r"\], (\w+)", each.operands)[1], 0)
            else:
                continue
            of_all += amount
            if re.findall(r"\[ ?(%rd\d+)", each.operands)[-1] in pointers:
                of_argument += amount
        return of_all, of_argument


def loaded(instructions: list[Instruction], strong: bool) -> int:
    """Bytes that a thread loads from global memory: by the strong loads, which poll, or by the others."""
    loads = [each for each in instructions if each.is_a("LD", "LDG", "LDGSTS")]
    return sum(each.bytes for each in loads if each.strong == strong)


def tally(instructions: list[Instruction], *names: str) -> int:
    return sum(each.is_a(*names) for each in instructions)
