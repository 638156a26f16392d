"""Instructions to closures, once for a kernel, so that running one costs little more than its NumPy calls.

A warp's registers are a list of arrays of 32 lanes. Literals, parameters and special registers have a place in that list too,
so every operand is an index.

An instruction becomes one of three things: `Plain` ones work on the registers alone; a `Turn` touches memory or waits, after
which another warp may go on; a `Jump` goes to a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.ptx.memory import UINTS
from tests.ptx.parse import Address, Instruction, Operand, Program
from tests.ptx.table import BITS, SHAPES, TABLE, TYPES, mma

if TYPE_CHECKING:
    from tests.ptx.machine import Warp

Registers = "list[np.ndarray]"
OF_BITS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
STRONG = {"volatile", "relaxed", "acquire", "release", "cg"}  # .cg: to L2, where every SM looks; see kernels' exchange
LANES = np.arange(32)


class Plain(NamedTuple):
    run: Callable[[Registers], None]


class Turn(NamedTuple):
    run: Callable[[Warp], None]
    instruction: Instruction


class Jump(NamedTuple):
    """`guard`: index of a register, or None; `target`: the number of an instruction."""

    guard: int | None
    negated: bool
    target: int


class Code(NamedTuple):
    """A decoded kernel.

    Attributes:
        steps: one for each instruction.
        instructions: as they were.
        start: the registers at the start, but for those in `special` and `parameters`.
        special: "%tid.x" and the like -> index.
        parameters: name -> index.
        granules: the least bytes that an access of "shared" or "global" memory takes.
    """

    steps: list[Plain | Turn | Jump]
    instructions: list[Instruction]
    start: Registers
    special: dict[str, int]
    parameters: dict[str, int]
    granules: dict[str, int]


class _Decoder:
    def __init__(self, program: Program):
        self.program = program
        self.start: Registers = []
        self.places: dict[tuple, int] = {}
        self.special: dict[str, int] = {}
        self.granules = {"shared": 8, "global": 8}

    def place(self, key: tuple, value: Callable[[], np.ndarray]) -> int:
        if key not in self.places:
            self.places[key] = len(self.start)
            self.start.append(value())
        return self.places[key]

    def family(self, name: str) -> int | None:
        """Bits of a register, or None."""
        return self.program.registers.get(name.rstrip("0123456789"), self.program.registers.get(name))

    def operand(self, text: Operand, kind: str = "b32") -> int:
        """The index of a register, or of a literal as `kind`."""
        assert isinstance(text, str), f"{text} where one operand should be"
        if (bits := self.family(text)) is not None:
            return self.place(
                ("register", text), lambda: np.full(32, 0x5A5A5A5A5A5A5A5A & (1 << bits) - 1).astype(OF_BITS[bits])
            )
        if text.startswith("%"):
            self.special[text] = self.place(("register", text), lambda: np.zeros(32, np.uint32))
            return self.special[text]
        dtype = OF_BITS[BITS[kind]]
        return self.place(("literal", text, dtype), lambda: _literal(text, dtype))

    def guard(self, instruction: Instruction) -> Callable[[Registers], np.ndarray | None]:
        """Gives the lanes that take part, or None for all."""
        if not instruction.guard:
            return lambda R: None
        at, negated = self.operand(instruction.guard, "pred"), instruction.negated

        def lanes(R: Registers) -> np.ndarray | None:
            on = ~R[at] if negated else R[at]
            return None if on.all() else np.flatnonzero(on)

        return lanes

    def address(self, operand: Operand) -> Callable[[Registers], np.ndarray]:
        assert isinstance(operand, Address)
        at, offset = self.operand(operand.base), operand.offset
        return lambda R: R[at].astype(np.int64) + offset

    def decode(self, instruction: Instruction) -> Plain | Turn | Jump:
        op = instruction.op
        head = op.partition(".")[0]
        if head in ("bra", "ret"):
            target = self.program.labels[instruction.operands[0]] if head == "bra" else len(self.program.instructions)
            guard = self.operand(instruction.guard, "pred") if instruction.guard else None
            return Jump(guard, instruction.negated, target)
        if op.startswith("ld.param"):
            return Plain(self.parameter(instruction))
        if head in ("ld", "st"):
            return Turn(self.access(instruction), instruction)
        special = {"ldmatrix": self.ldmatrix, "bar": self.barrier, "cp": self.copy}
        if head in special:
            return Turn(special[head](instruction), instruction)
        if instruction.operands[1:] == ("%globaltimer_hi",):
            return Turn(self.clock(instruction), instruction)
        special = {"mov": self.move, "mma": self.product, "shfl": self.shuffle, "redux": self.reduction, "vote": self.vote}
        return Plain(self.guarded(instruction, special.get(head, self.arithmetic)(instruction)))

    def guarded(self, instruction: Instruction, run: Callable[[Registers], None]) -> Callable[[Registers], None]:
        if not instruction.guard:
            return run
        assert not instruction.op.startswith(("mma", "shfl", "redux", "vote")), f"only some lanes of {instruction}"
        at, negated = self.operand(instruction.guard, "pred"), instruction.negated
        (out,) = self.outputs(instruction)

        def run_some(R: Registers) -> None:
            before = R[out]
            run(R)
            R[out] = np.where(R[at], before, R[out]) if negated else np.where(R[at], R[out], before)

        return run_some

    def outputs(self, instruction: Instruction) -> list[int]:
        first = instruction.operands[0]
        return [self.operand(name) for name in (first if isinstance(first, tuple) else (first,))]

    def arithmetic(self, instruction: Instruction) -> Callable[[Registers], None]:
        if instruction.op not in TABLE:
            raise NotImplementedError(f"no such opcode in tests/ptx/table.py: {instruction}")
        function, kinds, result = TABLE[instruction.op]
        (out,) = self.outputs(instruction)
        pairs = zip(instruction.operands[1:], kinds, strict=True)
        inputs = [(self.operand(text, "b32" if kind == "any" else kind), TYPES.get(kind)) for text, kind in pairs]
        inputs = [(at, dtype or self.start[at].dtype) for at, dtype in inputs]
        dtype, of_register = OF_BITS[BITS[result]], self.start[out].dtype
        if of_register != dtype:
            function = lambda *values, narrow=function: narrow(*values).view(dtype).astype(of_register)  # noqa: E731
        if len(inputs) == 1:
            [(x, of_x)] = inputs

            def run(R: Registers) -> None:
                R[out] = function(R[x].view(of_x)).view(of_register)

        elif len(inputs) == 2:
            (x, of_x), (y, of_y) = inputs

            def run(R: Registers) -> None:
                R[out] = function(R[x].view(of_x), R[y].view(of_y)).view(of_register)

        else:
            (x, of_x), (y, of_y), (z, of_z) = inputs

            def run(R: Registers) -> None:
                R[out] = function(R[x].view(of_x), R[y].view(of_y), R[z].view(of_z)).view(of_register)

        return run

    def parameter(self, instruction: Instruction) -> Callable[[Registers], None]:
        _, source = instruction.operands
        (at,), kind = self.outputs(instruction), TYPES[instruction.op.rpartition(".")[2]]
        source_at = self.place(("parameter", source.base), lambda: np.zeros(32, np.uint64))
        dtype = self.start[at].dtype

        def run(R: Registers) -> None:
            value = R[source_at].astype(kind)
            R[at] = (value.astype(np.int64) if np.issubdtype(kind, np.signedinteger) else value).astype(dtype)

        return run

    def move(self, instruction: Instruction) -> Callable[[Registers], None]:
        kind = instruction.op.rpartition(".")[2]
        target, source = instruction.operands
        if isinstance(target, tuple):
            part = OF_BITS[BITS[kind] // len(target)]
            outs = [(i, self.operand(name)) for i, name in enumerate(target) if name != "_"]
            at, count = self.operand(source, kind), len(target)

            def take_apart(R: Registers) -> None:
                parts = R[at].view(part).reshape(32, count)
                for i, out in outs:
                    R[out] = np.ascontiguousarray(parts[:, i])

            return take_apart
        (out,) = self.outputs(instruction)
        if isinstance(source, tuple):
            part, whole = f"b{BITS[kind] // len(source)}", OF_BITS[BITS[kind]]
            inputs = [self.operand(name, part) for name in source]

            def put_together(R: Registers) -> None:
                R[out] = np.stack([R[at] for at in inputs], 1).view(whole)[:, 0]

            return put_together
        at, dtype = self.operand(source, kind), self.start[out].dtype
        if self.start[at].dtype == dtype:

            def copy(R: Registers) -> None:
                R[out] = R[at]

            return copy

        def convert(R: Registers) -> None:
            R[out] = R[at].astype(dtype)

        return convert

    def product(self, instruction: Instruction) -> Callable[[Registers], None]:
        shape = SHAPES[instruction.op.removeprefix("mma.sync.aligned.")]
        d, a, b, c = ([self.operand(name) for name in names] for names in instruction.operands)

        def run(R: Registers) -> None:
            out = mma(shape, *(np.stack([R[at] for at in places]) for places in (a, b, c)))
            for at, value in zip(d, out, strict=True):
                R[at] = value

        return run

    def shuffle(self, instruction: Instruction) -> Callable[[Registers], None]:
        _, _, kind, _ = instruction.op.split(".")
        target, source, lane, clamp, _ = instruction.operands
        assert clamp == "31" and kind in ("bfly", "idx"), f"not a shuffle that the kernels use: {instruction}"
        out, at, lane_at = self.operand(target), self.operand(source), self.operand(lane)

        def run(R: Registers) -> None:
            which = R[lane_at].astype(np.int64)
            R[out] = R[at][LANES ^ which if kind == "bfly" else which & 31]

        return run

    def reduction(self, instruction: Instruction) -> Callable[[Registers], None]:
        _, _, kind, of = instruction.op.split(".")
        reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}[kind].reduce
        target, source, _ = instruction.operands
        out, at, dtype = self.operand(target), self.operand(source), TYPES[of]

        def run(R: Registers) -> None:
            R[out] = np.full(32, reduce(R[at].view(dtype))).astype(dtype).view(np.uint32)

        return run

    def vote(self, instruction: Instruction) -> Callable[[Registers], None]:
        target, source, lanes = instruction.operands
        assert instruction.op == "vote.sync.any.pred" and lanes == "-1", f"not a vote that the kernels use: {instruction}"
        out, at = self.operand(target), self.operand(source)

        def run(R: Registers) -> None:
            R[out] = np.full(32, R[at].any())

        return run

    def clock(self, instruction: Instruction) -> Callable[[Warp], None]:
        """A clock that stands still as long as anything happens, and then changes whenever a warp looks at it."""
        (out,) = self.outputs(instruction)

        def run(warp: Warp) -> None:
            warp.looks += warp.machine.stands_still()
            warp.registers[out] = np.full(32, warp.looks, np.uint32)

        return run

    def access(self, instruction: Instruction) -> Callable[[Warp], None]:
        kind, *parts, of = instruction.op.split(".")
        space = "shared" if "shared" in parts else "global"
        assert space in parts, f"memory of another kind: {instruction}"
        size = BITS[of] // 8
        self.granules[space] = min(self.granules[space], size)
        where, names = instruction.operands if kind == "st" else instruction.operands[::-1]
        names = names if isinstance(names, tuple) else (names,)
        address, lanes, strong = self.address(where), self.guard(instruction), int(not STRONG.isdisjoint(parts))
        places = [self.operand(name, of) for name in names]
        count, uint, signed = len(names), UINTS[size], of.startswith("s")

        def load(warp: Warp) -> None:
            R = warp.registers
            on = lanes(R)
            if on is not None and not len(on):
                return
            at = address(R) if on is None else address(R)[on]
            values = warp.load(space, at, size, count, strong, on)
            for place, value in zip(places, values, strict=True):
                value = value.view(TYPES[of]).astype(np.int64) if signed else value
                if on is None:
                    R[place] = value.astype(R[place].dtype)
                else:
                    R[place] = R[place].copy()
                    R[place][on] = value

        def store(warp: Warp) -> None:
            R = warp.registers
            on = lanes(R)
            if on is not None and not len(on):
                return
            values = np.stack([R[place].astype(uint) for place in places])
            at = address(R)
            if on is not None:
                at, values = at[on], values[:, on]
            warp.store(space, at, size, values, strong, on)

        return store if kind == "st" else load

    def ldmatrix(self, instruction: Instruction) -> Callable[[Warp], None]:
        assert ".m8n8." in instruction.op and instruction.op.endswith(".b16"), instruction
        names, where = instruction.operands
        outs, address, transposed = [self.operand(name) for name in names], self.address(where), ".trans" in instruction.op
        row, column = LANES >> 2, LANES & 3

        def run(warp: Warp) -> None:
            R = warp.registers
            rows = warp.load_rows(address(R)[: 8 * len(outs)]).reshape(len(outs), 8, 8)
            for out, matrix in zip(outs, rows, strict=True):
                if transposed:
                    matrix = np.ascontiguousarray(matrix.T)
                R[out] = matrix.view(np.uint32)[row, column]

        return run

    def barrier(self, instruction: Instruction) -> Callable[[Warp], None]:
        if instruction.op == "bar.sync" and instruction.operands == ("0",) and not instruction.guard:
            return lambda warp: warp.arrive()
        if instruction.op == "bar.warp.sync" and instruction.operands == ("-1",) and not instruction.guard:
            return lambda warp: warp.sync()
        raise NotImplementedError(f"not a barrier that the kernels use: {instruction}")

    def copy(self, instruction: Instruction) -> Callable[[Warp], None]:
        if instruction.op == "cp.async.commit_group":
            return lambda warp: warp.commit()
        if instruction.op == "cp.async.wait_group":
            left = int(instruction.operands[0], 0)
            return lambda warp: warp.wait(left)
        assert re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", instruction.op), instruction
        target, source, size, *rest = instruction.operands
        target, source, size = self.address(target), self.address(source), int(size, 0)
        lanes, present = self.guard(instruction), self.operand(rest[0]) if rest else self.operand(str(size))
        self.granules = {space: min(granule, 4) for space, granule in self.granules.items()}

        def run(warp: Warp) -> None:
            R = warp.registers
            on = lanes(R)
            on = LANES if on is None else on
            if len(on):
                warp.copy(target(R)[on], source(R)[on], size, R[present][on], on)

        return run


def _literal(text: str, dtype: type) -> np.ndarray:
    if text == "global_smem":
        return np.zeros(32, dtype)
    if text.startswith("0f"):
        return np.full(32, int(text[2:], 16), np.uint32)
    bits = 1 if dtype is np.bool_ else np.dtype(dtype).itemsize * 8
    return np.full(32, int(text.rstrip("U"), 0) & (1 << bits) - 1).astype(dtype)


def decode(program: Program) -> Code:
    decoder = _Decoder(program)
    steps = [decoder.decode(instruction) for instruction in program.instructions]
    parameters = {key[1]: at for key, at in decoder.places.items() if key[0] == "parameter"}
    return Code(steps, program.instructions, decoder.start, decoder.special, parameters, decoder.granules)
