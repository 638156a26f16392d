"""Plans of the one-program kernels: from sizes and the limits of a GPU to the whole launch, or to the reason why there is none.

Pure functions: nothing here asks a device, so tests need none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rnnfast.kernels.one_program.cost import (
    ProgramTime,
    instructions_estimate,
    program_time,
    special_functions_estimate,
    step_bytes,
    tensor_clocks,
)
from rnnfast.kernels.persistent.cost_model import plain_clocks
from rnnfast.kernels.persistent.plan import GPUS, GpuLimits, NoPlan

__all__ = [
    "OneProgramPlan",
    "largest_hidden",
    "one_program_clocks",
    "one_program_plan",
    "one_program_plans",
    "predicted",
]

BATCH_ROWS = (2, 4, 8)  # of a program: the fewer, the fewer cells a thread computes
PLAIN_ROWS = (2, 4)  # without tensor cores
PLAIN = {16: (1, 1), 32: (4, 2), 64: (8, 4), 128: (8, 2)}  # without tensor cores: warps and parts of the summed axis, by units
MOST_WARPS = 16  # of a program, each of 16 units
MOST_PLAIN = {False: 128, True: 64}  # units without tensor cores, by whether there are several gates
# Registers of a thread for the weights; with 16 warps, whose threads have half as many. Where they take more than half of it,
# backward with more than 2 rows spills with marks (LSTM float16, H = 128: 16 to 24 bytes, Triton 3.9) and with 16 warps (RNN
# float16, H = 256: 8 bytes).
WEIGHTS = {False: 128, True: 64}
AMD_UNITS = 64  # on AMD GPUs, whose products keep more in registers: LSTM and GRU of 128 spilled, as 8 rows did (Triton 3.9)
ROWS = 8192  # time steps x batch rows of all members in a forward launch: the input side is a buffer of its own
SECONDS = 0.25  # that a launch may take by the model: a display's watchdog ends a kernel after two
SLOW_CLOCK = 1e9  # hertz, for that: below what any of these GPUs runs at


@dataclass(frozen=True)
class OneProgramPlan:
    """The whole launch of a one-program kernel, for one direction (forward or backward) and any number of members of a group.

    A program keeps BLOCK_B batch rows of all units, H rounded up to `units`; with tensor cores 16 a warp. Without them the
    summed axis is cut into PARTS, which is 0 with them. At most `steps` time steps a launch.
    """

    BLOCK_B: int
    units: int
    num_warps: int
    steps: int
    PARTS: int = 0

    def grid(self, B: int, members: int = 1) -> tuple[int, int, int]:
        return -(-B // self.BLOCK_B), 1, members

    def launch_words(self, T: int) -> str:
        return f"one launch for {min(self.steps, T)} time steps"

    def words(self, B: int, members: int = 1) -> str:
        """The plan in words, for a batch of `B` rows."""
        programs = f"{members} x " * (members > 1) + f"{self.grid(B)[0]} programs"
        return f"{programs} of up to {self.units} units and {self.BLOCK_B} rows, {self.num_warps} warps"


def warps_for(H: int) -> int:
    """Warps of a program: the least power of two with 16 units each."""
    return max(1, 1 << (-(-H // 16) - 1).bit_length())


def weight_registers(gates: int, H: int, itemsize: int) -> int:
    """Registers of a thread that the weights take, with 16 units a warp."""
    warps = warps_for(H)
    return gates * (16 * warps) ** 2 * itemsize // 4 // (32 * warps)


def plain(itemsize: int, precision: str) -> bool:
    """Whether the products are without tensor cores."""
    return itemsize == 4 and precision == "ieee"


def refusal(gates: int, H: int, itemsize: int, precision: str, limits: GpuLimits) -> str:
    """Why no one-program kernel runs this, or ""."""
    if not limits.arch and limits.capability < 80:
        return f"{limits.name} has compute capability {limits.capability / 10}, and the one-program kernels need 8.0"
    if limits.arch and H > AMD_UNITS:
        return f"on AMD GPUs a program has at most {AMD_UNITS} units, and there are {H}"
    warps = warps_for(H)
    if plain(itemsize, precision) and 16 * warps > (most := MOST_PLAIN[gates > 1]):
        return f"without TF32 a program has at most {most} units of so many gates, and there are {H}"
    if plain(itemsize, precision):
        return ""
    if warps > MOST_WARPS:
        return f"a program has at most {16 * MOST_WARPS} units, and there are {H}"
    registers, most = weight_registers(gates, H, itemsize), WEIGHTS[warps == MOST_WARPS]
    if registers > most:
        return f"the weights of {H} units take {registers} registers of each thread, and there is room for {most}"
    return ""


def exchanged_bytes(H: int, rows: int, itemsize: int, backward: bool) -> int:
    """Shared memory through which the warps hand one another a copy of h each, or in backward a part of the sums each."""
    warps = warps_for(H)
    return 0 if warps == 1 else warps * 16 * warps * rows * (4 if backward else itemsize)


def predicted(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, rows: int, members: int = 1,
    extra: int = 0,
) -> ProgramTime:  # fmt: skip
    """The predicted time of a step of all members with `rows` batch rows a program, from estimates of the counts. Each `extra`
    tile is taken for a carried state."""
    programs = -(-B // rows) * members
    carried = (gates >= 4) + extra
    bytes = step_bytes(gates, gates if gates > 1 else 0, H, B * members, itemsize, backward, True, carried)
    warps = warps_for(H)
    units = 16 * warps
    if plain(itemsize, precision):
        warps, parts = PLAIN[units]
        exchanged = units * rows * 4 * (warps + 2 * parts * (1 if backward else gates))  # h or gate gradients, and sums
        return program_time(
            sms=limits.sms,
            programs=programs,
            warps=warps,
            product=plain_clocks(gates * units * units * rows),
            instructions=instructions_estimate(gates, 2, backward, extra) + (32 if backward else 8) * gates * rows / 2,
            special_functions=special_functions_estimate(gates, 2, backward),
            exchanged_bytes=exchanged,
            barriers=(10 if backward else 6) * rows / 2,
            bytes=bytes,
        )
    return program_time(
        sms=limits.sms,
        programs=programs,
        warps=warps,
        product=tensor_clocks(gates, warps, itemsize, backward),
        instructions=instructions_estimate(gates, rows, backward, extra),
        special_functions=special_functions_estimate(gates, rows, backward),
        exchanged_bytes=2 * exchanged_bytes(H, rows, itemsize, backward),
        # with 8 rows an operand of backward stays in its warp's registers; else it takes a barrier or two a gate
        barriers=(2 + (gates * rows // 2 if backward and rows < 8 else 0)) if warps > 1 else 0,
        bytes=bytes,
    )


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer
def _rank(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits, marked: bool = False,
    members: int = 1, extra: int = 0,
) -> tuple[tuple[float, OneProgramPlan], ...]:  # fmt: skip
    if refusal(gates, H, itemsize, precision, limits):
        return ()
    found = []
    warps, parts = PLAIN[16 * warps_for(H)] if plain(itemsize, precision) else (warps_for(H), 0)
    full = 2 * weight_registers(gates, H, itemsize) > WEIGHTS[warps == MOST_WARPS]
    crowded = backward and full and (marked or warps == MOST_WARPS)
    half = BATCH_ROWS[:1] if crowded else BATCH_ROWS[:2] if limits.arch else BATCH_ROWS
    for rows in PLAIN_ROWS if parts else half:
        if not parts and exchanged_bytes(H, rows, itemsize, backward) > limits.shared_bytes:
            continue
        clocks = predicted(gates, B, H, itemsize, precision, backward, limits, rows, members, extra).total
        steps = int(SECONDS * SLOW_CLOCK / clocks)
        if not backward:
            steps = min(steps, ROWS // (B * members))
        found.append((clocks, OneProgramPlan(rows, 16 * warps_for(H), warps, max(1, steps), parts)))
    return tuple(sorted(found, key=lambda entry: entry[0]))


def one_program_plans(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits | None, most: int = 3,
    marked: bool = False, members: int = 1, extra: int = 0,
) -> list[OneProgramPlan]:  # fmt: skip
    """The launches worth measuring, at most `most`, the fastest by the model first. Arguments as in
    `rnnfast.kernels.persistent.plan.persistent_plans`; on a CPU, which has no limits, those of an H100 count. A group of any
    number of `members` has a plan where one of them has. extra: float32 tiles that a step of the cell keeps in registers beyond
    those of an LSTM."""
    sizes = gates, B, H, itemsize, precision, backward, limits or GPUS["H100"], marked, members, extra
    return [plan for _, plan in _rank(*sizes)[:most]]


def one_program_plan(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits | None, marked: bool = False,
    members: int = 1, extra: int = 0,
) -> OneProgramPlan | NoPlan:  # fmt: skip
    """The first of `one_program_plans`, or why there is none. Arguments as there."""
    plans = one_program_plans(gates, B, H, itemsize, precision, backward, limits, 1, marked, members, extra)
    return plans[0] if plans else NoPlan(refusal(gates, H, itemsize, precision, limits or GPUS["H100"]))


def one_program_clocks(*sizes) -> float | None:
    """Predicted SM clocks of a time step of all members, from the arguments of `one_program_plan`; None where there is no
    plan."""
    ranked = _rank(*sizes)
    return ranked[0][0] if ranked else None


def largest_hidden(gates: int, itemsize: int, precision: str, limits: GpuLimits) -> int:
    """The most hidden units with a plan, or 0. Arguments as above."""
    sizes = (16 << n for n in reversed(range(5)))
    return next((H for H in sizes if not refusal(gates, H, itemsize, precision, limits)), 0)
