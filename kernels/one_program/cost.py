"""What a time step of a one-program kernel costs, by a simple model: a pure function from counts to SM clocks, term by term.

Nothing here has been measured. It uses the constants of `rnnfast.kernels.hardware`, as the model of the persistent kernels
does, so that the two can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from rnnfast.kernels.hardware import BARRIER, ISSUE, MEMORY_BYTES, SHARED_BYTES
from rnnfast.kernels.persistent.cost_model import Terms, hmma_clocks

__all__ = ["ProgramTime", "instructions_estimate", "program_time", "special_functions_estimate", "step_bytes", "tensor_clocks"]

SPECIAL = 8  # clocks of a special function of a warp on its scheduler: 16 a clock and SM (CUDA programming guide)


@dataclass(frozen=True)
class ProgramTime(Terms):
    """A time step of all programs of a launch, in SM clocks; the terms follow one another.

    Attributes:
        product: tensor cores, or plain multiply-adds.
        issue: all other instructions.
        special: special functions, where they take longer than the instructions: by how much.
        exchange: what the warps hand one another, to shared memory and back.
        barriers: of a program's warps.
        turns: programs that have no SM to themselves wait for those before.
        memory: what the launch reads and writes of a step, where that takes longer than all else: by how much.
    """

    product: float
    issue: float
    special: float
    exchange: float
    barriers: float
    turns: float = 0.0
    memory: float = 0.0


def program_time(
    *, sms: int, programs: int, warps: int, product: float, instructions: float, special_functions: float,
    exchanged_bytes: float, barriers: float, bytes: float,
) -> ProgramTime:  # fmt: skip
    """The time of a step by the model.

    Args:
        sms: of the GPU.
        programs: of a launch, of all members.
        warps: of a program.
        product: clocks of the product: `tensor_clocks`, or those of plain multiply-adds.
        instructions: of one warp, without those of the product.
        special_functions: of one warp.
        exchanged_bytes: to and from shared memory, of one program.
        barriers: of a step.
        bytes: that all programs read from and write to memory in a step.
    """
    schedulers = max(1.0, warps / 4)  # warps that share one
    issue = max(ISSUE, schedulers) * instructions
    one = ProgramTime(
        product=product,
        issue=issue,
        special=max(0.0, SPECIAL * schedulers * special_functions - issue),
        exchange=exchanged_bytes / SHARED_BYTES,
        barriers=BARRIER * barriers,
    )
    turns = one.total * (-(-programs // sms) - 1)
    memory = max(0.0, bytes / (MEMORY_BYTES * sms) - one.total - turns)
    return ProgramTime(**(vars(one) | {"turns": turns, "memory": memory}))


def tensor_clocks(gates: int, warps: int, itemsize: int, backward: bool) -> float:
    """Clocks of the product of a program of 16 `warps` units: HMMA, which take 32 bytes of the summed axis and up to 8 batch
    rows each."""
    chunk = 32 // itemsize
    deep = 16 * gates // chunk if backward else 16 * warps // chunk
    return hmma_clocks(deep, warps if backward else gates, warps)


def step_bytes(gates: int, saved: int, H: int, B: int, itemsize: int, backward: bool, training: bool, carried: int) -> float:
    """Bytes that a step of B batch rows, those of all members, reads and writes: forward the input side, h and what is saved;
    backward what was saved, dy and the gate gradients; both the carried states. Held tiles are read once a launch."""
    state = 4 * carried if training else 0
    if backward:
        return B * H * (saved * itemsize + state + itemsize + gates * itemsize)
    return B * H * (4 * gates + itemsize + (saved * itemsize if training else 0) + state)


def instructions_estimate(gates: int, rows: int, backward: bool, extra: int = 0) -> float:
    """Instructions of a warp besides those of the product, fitted to machine code (LSTM, GRU and RNN, float16, sm_90, Triton
    3.9). An `extra` tile is taken to need as many as a gate."""
    cells = rows / 2  # of a thread
    return 30 + (gates + extra) * ((16 + 15 * cells) if backward else (10 + 14.5 * cells))


def special_functions_estimate(gates: int, rows: int, backward: bool) -> float:
    """Two for each sigmoid or tanh: one a gate, and one of a cell state, which four gates are taken to have."""
    of_cell = 2 * (gates >= 4) + (0 if backward else 2 * gates)
    return of_cell * rows / 2
