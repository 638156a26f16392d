"""Plans of the persistent kernels: from sizes and the limits of a GPU to the whole launch, or to the reason why there is none.

Pure functions: nothing here asks a device, so tests need none.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rnnfast.kernels.persistent.cost_model import (
    StepTime,
    hmma_clocks,
    instructions_estimate,
    plain_clocks,
    step_time,
    wgmma_clocks,
)
from rnnfast.kernels.persistent.limits import GPUS, GpuLimits, NoPlan

__all__ = [
    "GPUS",
    "GpuLimits",
    "NoPlan",
    "PersistentPlan",
    "largest_hidden",
    "persistent_clocks",
    "persistent_plan",
    "persistent_plans",
]


@dataclass(frozen=True)
class PersistentPlan:
    """The whole launch of a persistent kernel, for one direction (forward or backward).

    A program keeps BLOCK_H units of BLOCK_B batch rows. The hidden size is padded to H_PAD, a multiple of BLOCK_H * PARTS. In
    backward PARTS programs share their units' sums: each takes a part of the summed axis. What a program sums over is cut again
    into SPLIT parts, for the warps to share, a multiple of BLOCK_K each; up to JOIN chunks are one operand of a product. The
    weights of IN_REGISTERS operands are kept there, the others in shared memory.
    At most `steps` time steps a launch, so that none lasts for seconds and no buffer grows with T, and at most `programs`
    programs of all members of a group, so that all are resident.
    """

    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    SPLIT: int
    H_PAD: int
    num_warps: int
    steps: int
    programs: int
    JOIN: int = 1
    IN_REGISTERS: int = 0
    PARTS: int = 1

    @property
    def tiles(self) -> PersistentPlan:
        """The plan as a kernel's constant: without `steps` and `programs`, which its code does not depend on."""
        return replace(self, steps=0, programs=0)

    def launches(self, B: int, members: int = 1) -> Iterator[tuple[tuple[int, int, int], int]]:
        """Grid and first batch row of each launch: as many batch tiles of all members at a time as `programs` allows. The first
        is the largest."""
        units = self.H_PAD // self.BLOCK_H
        tiles = -(-B // self.BLOCK_B)
        at_once = self.programs // (units * members)
        for tile in range(0, tiles, at_once):
            yield (units, min(at_once, tiles - tile), members), tile * self.BLOCK_B

    def launch_words(self, T: int) -> str:
        return f"one launch for {min(self.steps, T)} time steps"

    def words(self, B: int, members: int = 1) -> str:
        """The plan in words, for a batch of `B` rows of each of `members`."""
        times = f" x {members}" if members > 1 else ""
        grids = " then ".join(f"{units} x {tiles}{times} programs" for (units, tiles, _), _ in self.launches(B, members))
        parts = f"{self.PARTS} programs share their units' sums, " if self.PARTS > 1 else ""
        parts += f"weights of {self.IN_REGISTERS} operands in registers, " if self.IN_REGISTERS else ""
        parts += f"the sum cut into {self.SPLIT} parts, " if self.SPLIT > 1 else ""
        return (
            f"{grids} of {self.BLOCK_H} units and {self.BLOCK_B} rows, {self.num_warps} warps, {parts}chunks of "
            f"{self.BLOCK_K}, hidden size padded to {self.H_PAD}"
        )


ROWS = 8192  # members x time steps x batch rows of a launch whose input side or exchange is a buffer of its own
SUM_BYTES = 64 << 20  # the largest buffer of partial sums of a launch
SECONDS = 0.25  # that a launch may take by the model: a display's watchdog ends a kernel after two
SLOW_CLOCK = 1e9  # hertz, for that: below what any of these GPUs runs at
MOST_LAUNCHES = 4  # launches one after another for the batch; beyond, the step kernels spread it over the GPU at once

# What a thread can hold without spilling, seen in the machine code of many sizes, with Triton 3.6 and 3.9. Words of a step's
# exchange, for (backward, on tensor cores); with the sum in parts words and accumulators together, for backward or not; and
# `_Candidate.registers` where some of them are weights, likewise.
WORDS_PER_THREAD = {(False, True): 40, (True, True): 128, (False, False): 16, (True, False): 64}
WORDS_AND_SUMS = {False: 112, True: 96}
REGISTERS = {False: 196, True: 210}
TIGHT = 0.8  # a part of WORDS_AND_SUMS: beyond it, some large products with all weights from shared memory spilled
UNSPLIT = 160  # `_Candidate.registers` where the warps do not share the sum: with more, Triton 3.6 spilled on sm_80
INPUTS = {False: 8, True: 12}  # registers that the cell's inputs take, for a unit and batch row
MOST_CHUNKS = 24  # chunks of a part: each is code of its own. Larger sizes are tried with more padding instead
MARKS = 24  # registers that marks take of each of these limits, in backward on tensor cores; elsewhere there is room
MEMBERS = 24  # registers that the addresses of a member take likewise, where there are several
EXTRA = 2  # registers that a tile of `extra` takes of each limit, for each pair of unit and batch row of a thread
OPERAND_BYTES = 32 << 10  # shared memory that joined chunks may take


@dataclass(frozen=True)
class _Candidate:
    """One choice of tiles, with what it takes and what it costs."""

    plan: PersistentPlan
    rows: int  # weight rows of a program
    columns: int  # weight columns of a program, which it sums over
    itemsize: int
    reserve: int  # registers of a thread that are to be left
    members: int

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.columns * self.itemsize

    @property
    def gathered_bytes(self) -> int:
        """By one program, a step."""
        return self.plan.BLOCK_B * self.columns * self.itemsize

    @property
    def shared_bytes(self) -> int:
        """The weights, and beside them one operand of the exchange or the partial sums, whichever is larger."""
        plan = self.plan
        operand = plan.SPLIT * plan.BLOCK_B * plan.JOIN * plan.BLOCK_K * self.itemsize
        return self.weight_bytes + max(operand, self.partial_bytes) + 1024

    @property
    def partial_bytes(self) -> int:
        """Shared memory that the sums of the warps take, 64 rows at a time, and the rest as a power of two."""
        whole, rest = divmod(self.rows, 64)
        return self.plan.SPLIT * (64 * whole + (1 << (rest - 1).bit_length()) * (rest > 0)) * self.plan.BLOCK_B * 4

    @property
    def words_per_thread(self) -> int:
        return self.gathered_bytes // 4 // (32 * self.plan.num_warps)

    @property
    def sums_per_thread(self) -> int:
        plan = self.plan
        return plan.SPLIT * self.rows * plan.BLOCK_B // (32 * plan.num_warps)

    @property
    def cells_per_thread(self) -> float:
        """Pairs of unit and batch row."""
        return self.plan.BLOCK_B * self.plan.BLOCK_H / (32 * self.plan.num_warps)

    @functools.cached_property
    def operands(self) -> list[int]:
        """Chunks in each operand, as `exchange.joined` has it."""
        chunks = self.columns // self.plan.SPLIT // self.plan.BLOCK_K
        rest = chunks % self.plan.JOIN
        return [self.plan.JOIN] * (chunks // self.plan.JOIN) + [1 << bit for bit in reversed(range(5)) if rest >> bit & 1]

    @property
    def reread_bytes(self) -> int:
        """Weights that are read from shared memory in each step."""
        operands = self.operands
        return self.weight_bytes * sum(operands[self.plan.IN_REGISTERS :]) // sum(operands)

    def registers(self, backward: bool, number: int) -> float:
        """Registers of a thread that keeps the weights of `number` operands, at the fuller of two moments: before the product
        with these, with all that it gathered; or before the product with one operand from shared memory, with what is left of
        the gathered words, while the next step's inputs arrive. An operand takes an eighth of its size for addresses, and
        joined chunks are a copy."""
        plan, operands = self.plan, self.operands
        threads = 32 * plan.num_warps
        kept, rest = sum(operands[:number]), operands[number:]
        weights = self.weight_bytes / sum(operands) / 4 / threads  # registers that the weights of a chunk take
        inputs = INPUTS[backward] * self.cells_per_thread
        operand = plan.SPLIT * plan.BLOCK_B * operands[0] * plan.BLOCK_K * self.itemsize / 4 / threads
        first = self.words_per_thread + inputs
        second = self.words_per_thread * sum(rest) / sum(operands) + weights * sum(rest[:1]) + 2 * inputs
        return self.sums_per_thread + weights * kept + operand * (0.125 if plan.JOIN == 1 else 1.125) + max(first, second)

    def tuned(self, backward: bool, tensor_cores: bool) -> Iterator[_Candidate]:
        """With each way to cut the sum into operands, the smallest first, and as many weights in registers as fit. Where
        registers are short anyway, larger operands with no weights there, or joined, are passed over for smaller with some."""
        plan = self.plan
        if plan.SPLIT == 1 or not tensor_cores:
            halved = tensor_cores and self.registers(backward, 0) + self.reserve > UNSPLIT
            yield replace(self, plan=replace(plan, BLOCK_K=plan.BLOCK_K // 2)) if halved else self
            return
        chunks = sum(self.operands)
        most = OPERAND_BYTES // (plan.SPLIT * plan.BLOCK_B * plan.BLOCK_K * self.itemsize)
        cuts = [(plan.BLOCK_K >> bit, 1) for bit in (2, 1, 0) if plan.BLOCK_K >> bit >= 32]
        # with two or three chunks, the barriers saved are not worth the instructions that joined ones take
        cuts += [(plan.BLOCK_K, 1 << bit) for bit in range(1, 5) if chunks > 3 and 1 << bit <= min(chunks, most)]
        room = REGISTERS[backward] - self.reserve
        tight = self.words_per_thread + self.sums_per_thread + self.reserve > TIGHT * WORDS_AND_SUMS[backward]
        some = False
        for block_k, join in cuts or [(plan.BLOCK_K, 1)]:
            cut = replace(self, plan=replace(plan, BLOCK_K=block_k, JOIN=join))
            numbers = range(len(cut.operands), 0, -1)
            kept = next((number for number in numbers if cut.registers(backward, number) <= room), 0)
            if not (tight and some) or (kept and join == 1):
                yield replace(cut, plan=replace(cut.plan, IN_REGISTERS=kept))
            some = some or kept > 0

    def refusals(self, B: int, backward: bool, tensor_cores: bool, limits: GpuLimits) -> Iterator[tuple[str, float, str]]:
        """Why it does not fit, for each limit that it passes: its name, the amount, and words. Nothing if it fits."""
        plan = self.plan
        units = plan.H_PAD // plan.BLOCK_H
        if self.shared_bytes > limits.shared_bytes:
            has = limits.shared_bytes >> 10
            kib = self.shared_bytes >> 10
            reason = f"{plan.BLOCK_H} units a program take {kib} KiB of shared memory, where a CTA has {has} KiB"
            yield "shared", self.shared_bytes, reason
        if units * self.members > limits.sms:
            all_of_them = f"{units}{f' x {self.members}' if self.members > 1 else ''} programs"
            reason = f"{plan.BLOCK_H} units a program make {all_of_them}, where there are {limits.sms} SMs"
            yield "sms", units * self.members, reason
            return
        words, most = self.words_per_thread, WORDS_PER_THREAD[backward, tensor_cores]
        if tensor_cores and plan.SPLIT > 1:
            most = WORDS_AND_SUMS[backward] - self.sums_per_thread
        most -= self.reserve
        if words > most:
            fit = max(0, most)
            reason = f"{plan.BLOCK_B} batch rows a program are {words} words a thread to gather, where {fit} fit in registers"
            yield "registers", words, reason
        registers = 32 * plan.num_warps * 255
        if registers > limits.registers:
            reason = f"{plan.num_warps} warps take {registers} registers, where an SM has {limits.registers}"
            yield "register file", registers, reason
        launches = len(list(plan.launches(B, self.members)))
        if launches > MOST_LAUNCHES:
            reason = f"{B} batch rows by {plan.BLOCK_B} take {launches} launches in turn, where {MOST_LAUNCHES} is the most"
            yield "launches", launches, reason
        exchange = self.members * B * self.columns * plan.PARTS * self.itemsize
        if exchange > limits.l2_bytes:
            yield "l2", exchange, f"a step's exchange is {exchange >> 20} MiB, where L2 has {limits.l2_bytes >> 20} MiB"

    def step_time(self, B: int, gates: int, backward: bool, tensor_cores: bool, limits: GpuLimits) -> StepTime:
        """By the model, from estimates. 6 barriers, 2 an operand and 2 more in backward were counted before gathered words
        stayed in their registers. There are fewer now, but plans were checked for spills in the order that these give."""
        plan = self.plan
        threads = 32 * plan.num_warps
        deep = self.columns / plan.SPLIT / (32 // self.itemsize)  # tensor core instructions in a row on one accumulator
        tiles = -(-self.rows // 16) * -(-plan.BLOCK_B // 8) * max(1, plan.SPLIT // plan.num_warps)  # accumulators of a warp
        if plan.SPLIT == 1:
            tiles = max(1, tiles // plan.num_warps)
        if not tensor_cores:
            arithmetic = plain_clocks(self.rows * plan.BLOCK_B * self.columns)
        elif plan.SPLIT == 1 and self.rows >= 64 and plan.BLOCK_B >= 16 and limits.capability >= 90:
            arithmetic = wgmma_clocks(deep)
        else:
            arithmetic = hmma_clocks(deep, tiles, plan.num_warps)
        exchanged = self.members * B * self.columns * plan.PARTS * self.itemsize
        sums = self.members * B * plan.PARTS * plan.H_PAD * 4 if plan.PARTS > 1 else 0
        launches = [
            step_time(
                sms=limits.sms,
                programs=math.prod(grid),
                gathered_bytes=self.gathered_bytes,
                weight_bytes=self.reread_bytes,
                arithmetic=arithmetic,
                partial_bytes=0 if plan.SPLIT == 1 else 2 * self.partial_bytes,
                barriers=6 + 2 * len(self.operands) + 2 * backward,
                instructions=instructions_estimate(
                    backward,
                    gates,
                    plan.SPLIT > 1,
                    plan.PARTS > 1,
                    self.words_per_thread,
                    self.sums_per_thread,
                    self.cells_per_thread,
                    deep * tiles + self.reread_bytes / (16 * threads),  # 16 bytes a load
                ),
                second_bytes=plan.PARTS * plan.BLOCK_B * plan.BLOCK_H * 4 if plan.PARTS > 1 else 0,
                cleared_bytes=exchanged + sums if number == 0 else 0,
            )
            for number, (grid, _) in enumerate(plan.launches(B, self.members))
        ]
        return sum(launches[1:], launches[0])


def _candidates(
    gates: int, H: int, itemsize: int, tensor_cores: bool, backward: bool, sms: int, reserve: int, members: int,
    extra: int,
) -> Iterator[_Candidate]:  # fmt: skip
    """Every choice worth a thought, the preferred of equals first."""
    gate_rows = 1 << (gates - 1).bit_length()
    summed_gates = gates if backward else 1
    # units a program, parts of K, warps: 64 rows of weights make an instruction of four warps; fewer leave the warps K to share
    if not tensor_cores:
        shapes = ((8, 8, 8),)
    elif backward or gates == 1:
        shapes = ((16, 8, 8), (16, 16, 8), (32, 8, 8), (16, 4, 4), (8, 2, 2), (8, 8, 8))
    else:
        shapes = ((64 // gate_rows, 1, 4), (16, 8, 8), (8, 8, 8))
    for (block_h, split, warps), parts in itertools.product(shapes, (1, 2, 4)):
        # programs share sums only where that was seen to compile well: their product has 32 or 64 rows
        if parts > 1 and not (backward and tensor_cores and split == 8 and block_h < 32):
            continue
        unit = block_h * parts
        for block_b in (8, 16, 32):
            if backward and block_b == 32 and parts == 1:
                continue  # spills, with 128 words a thread
            least = -(-H // unit) * unit
            kept = math.ceil(EXTRA * extra * max(1.0, block_b * block_h / (32 * warps)))
            for h_pad in range(least, H + H // 4 + 16 * split * parts, unit):
                if h_pad > least and h_pad // block_h * members > sms:
                    break  # padding alone is no reason to run out of SMs
                part, remainder = divmod(summed_gates * h_pad, split * parts)
                block_k = min(part & -part, 256 if tensor_cores else 32)
                if remainder or block_k < 16 or part > MOST_CHUNKS * block_k:
                    continue
                plan = PersistentPlan(block_b, block_h, block_k, split, h_pad, warps, 1, sms, PARTS=parts)
                separate = split > 1 and block_h >= 16  # a product a gate, if they are no power of two
                rows = unit if backward else block_h * (gates if separate else gate_rows)
                yield _Candidate(plan, rows, summed_gates * h_pad // parts, itemsize, reserve + kept, members)


def _steps(plan: PersistentPlan, B: int, H: int, backward: bool, marked: bool, members: int, clocks: float) -> int:
    """Time steps of a launch: as many as take `SECONDS`, and as keep a buffer that they need from growing with T: `ROWS` rows
    of the input side or of an exchange of its own, because it is padded or marked, `SUM_BYTES` of partial sums."""
    rows = members * B
    steps = int(SECONDS * SLOW_CLOCK / clocks)
    if not backward or marked or plan.H_PAD != H:
        steps = min(steps, ROWS // rows)
    if plan.PARTS > 1:
        steps = min(steps, SUM_BYTES // (rows * plan.PARTS * plan.H_PAD * 4))
    return max(1, steps)


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer
def _rank(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, marked: bool,
    members: int = 1, extra: int = 0,
) -> tuple[tuple[tuple[float, PersistentPlan], ...], str]:  # fmt: skip
    """Clocks and tiles of the plans that fit, the fastest by the model first, one for each tile; and why there is none."""
    if limits.arch:
        return (), f"its programs exchange words by PTX, the assembly of NVIDIA GPUs, and {limits.name} is one of AMD"
    if limits.capability < 80:
        return (), f"{limits.name} has compute capability {limits.capability / 10}, and the persistent kernels need 8.0"
    tensor_cores = itemsize == 2 or precision == "tf32"
    fastest: dict[tuple[int, ...], tuple[float, PersistentPlan]] = {}
    nearest: dict[str, tuple[float, str]] = {}  # to each limit, of those that pass it
    reserve = 0
    if backward and tensor_cores:
        reserve = MARKS * marked + MEMBERS * (members > 1)
    for tile in _candidates(gates, H, itemsize, tensor_cores, backward, limits.sms, reserve, members, extra):
        for candidate in tile.tuned(backward, tensor_cores):
            refusals = list(candidate.refusals(B, backward, tensor_cores, limits))
            for limit, excess, reason in refusals:
                nearest[limit] = min(nearest.get(limit, (excess, reason)), (excess, reason))
            if refusals:
                break
            plan = candidate.plan
            clocks = candidate.step_time(B, gates, backward, tensor_cores, limits).total
            key = (plan.BLOCK_B, plan.BLOCK_H, plan.SPLIT, plan.num_warps, plan.PARTS)
            if key not in fastest or clocks < fastest[key][0]:
                fastest[key] = clocks, plan
    ranked = sorted(fastest.values(), key=lambda entry: entry[0])
    return tuple(ranked), "no tiles fit: " + "; ".join(reason for _, reason in nearest.values())


def persistent_plans(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, most: int = 4,
    marked: bool = False, members: int = 1, extra: int = 0,
) -> list[PersistentPlan]:  # fmt: skip
    """The persistent launches worth measuring, at most `most`: each of another tile, the fastest by the model first.

    Args:
        gates: blocks of rows in W_hh, `Cell.gates`.
        B, H: batch rows and hidden units.
        itemsize: bytes of an element, 2 or 4.
        precision: of a float32 product, "ieee" or "tf32"; half-precision products always run on tensor cores.
        backward: for the backward kernel, else forward.
        limits: of the GPU.
        most: plans to return; none are returned where `persistent_plan` gives a `NoPlan`.
        marked: for a call with lengths or resets, whose kernels take more registers.
        members: of the group (`rnnfast.kernels.groups`) that a launch runs, all of them resident at once.
        extra: float32 tiles that a program keeps in registers beyond those of an LSTM: states, held tiles, noise, saved tiles
            and gates.
    """
    ranked, _ = _rank(gates, B, H, itemsize, precision, backward, limits, marked, members, extra)
    return [replace(plan, steps=_steps(plan, B, H, backward, marked, members, clocks)) for clocks, plan in ranked[:most]]


def persistent_plan(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, marked: bool = False,
    members: int = 1, extra: int = 0,
) -> PersistentPlan | NoPlan:  # fmt: skip
    """The first of `persistent_plans`, or why there is none. Arguments as there."""
    plans = persistent_plans(gates, B, H, itemsize, precision, backward, limits, 1, marked, members, extra)
    return plans[0] if plans else NoPlan(_rank(gates, B, H, itemsize, precision, backward, limits, marked, members, extra)[1])


def persistent_clocks(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, marked: bool = False,
    members: int = 1, extra: int = 0,
) -> float | None:  # fmt: skip
    """Predicted SM clocks of a time step of all members by the plan that `persistent_plan` gives; None where it gives none."""
    ranked, _ = _rank(gates, B, H, itemsize, precision, backward, limits, marked, members, extra)
    return ranked[0][0] if ranked else None


def largest_hidden(gates: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits) -> int:
    """The most hidden units, in steps of 8, with a plan for up to 8 batch rows, one tile of them; else 0. Arguments
    as above.

    All SMs together have to hold the gates * H * H weights.
    """
    most = math.isqrt(limits.sms * limits.shared_bytes // (gates * itemsize))
    for H in range(most - most % 8, 0, -8):
        if isinstance(persistent_plan(gates, 8, H, itemsize, precision, backward, limits), PersistentPlan):
            return H
    return 0
