"""What a time step of a persistent kernel costs, by a simple model: a pure function from counts to SM clocks, term by term.

Nothing here has been measured. The model is there to compare plans with one another and to say which term is worth halving; its
inputs are estimates while a plan is chosen, and counts from machine code once it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

from rnnfast.kernels.hardware import (
    BARRIER,
    FMAS,
    HMMA_ISSUE,
    HMMA_LATENCY,
    HOP,
    ISSUE,
    L2_BYTES,
    MEMORY_BYTES,
    PORT_BYTES,
    SHARED_BYTES,
    WGMMA,
)

__all__ = ["StepTime", "Terms", "hmma_clocks", "instructions_estimate", "plain_clocks", "step_time", "wgmma_clocks"]


class Terms:
    """A time step in SM clocks, as the sum of terms that follow one another: the fields of a dataclass."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def microseconds(self, gigahertz: float) -> float:
        """The step at an SM clock of `gigahertz`; `rnnfast.kernels.hardware.GHZ` has those of GPUs."""
        return self.total / gigahertz / 1000

    def share(self) -> dict[str, float]:
        """Each term's part of the total, terms of nothing left out."""
        return {name: amount / self.total for name, amount in vars(self).items() if amount}


@dataclass(frozen=True)
class StepTime(Terms):
    """A time step of one program, in SM clocks; the terms follow one another.

    Attributes:
        hop: latency of the exchange, from the store of a word to its arrival at a program that polls for it.
        gather: bytes of the exchange, through L2 or into the SM, the slower.
        product: tensor core (or plain arithmetic), or the weights on their way out of shared memory, the slower.
        partials: partial sums of the warps, to shared memory and back.
        barriers: of a program's warps.
        issue: the instructions that a warp issues one after another on the critical path.
        second_hop: `hop` of the exchange of partial sums, where several programs share the summed axis.
        second_gather: `gather` of that exchange.
        clear: filling a step's exchange buffers with EMPTY, before the launch.
    """

    hop: float
    gather: float
    product: float
    partials: float
    barriers: float
    issue: float
    second_hop: float = 0.0
    second_gather: float = 0.0
    clear: float = 0.0

    def __add__(self, other: StepTime) -> StepTime:
        """The time of two launches one after another, each for a part of the batch."""
        return StepTime(**{name: amount + getattr(other, name) for name, amount in vars(self).items()})


def step_time(
    *,
    sms: int,
    programs: int,
    gathered_bytes: float,
    weight_bytes: float,
    arithmetic: float,
    partial_bytes: float,
    barriers: float,
    instructions: float,
    second_bytes: float = 0.0,
    cleared_bytes: float = 0.0,
) -> StepTime:
    """The time of a step by the model. `rnnfast.kernels.hardware` has the constants and their sources.

    Weights that are not in registers are read from shared memory in each step.

    Args:
        sms: of the GPU.
        programs: that run at once, and so share L2.
        gathered_bytes: of the exchange, by one program.
        weight_bytes: read from shared memory by one program; 0 where they stay in registers.
        arithmetic: clocks of the product: `wgmma_clocks`, `hmma_clocks` or `plain_clocks`.
        partial_bytes: partial sums written to and read from shared memory.
        barriers: of a step.
        instructions: of one warp on the critical path: `instructions_estimate`, or counted without the loop that polls again
            and without what runs beside the tensor cores.
        second_bytes: partial sums that one program gathers; 0 where no other shares its units.
        cleared_bytes: of the exchange buffers of a step, of all programs.
    """

    def gather(amount: float) -> float:
        return max(programs * amount / (L2_BYTES * sms), amount / PORT_BYTES)

    return StepTime(
        hop=HOP,
        gather=gather(gathered_bytes),
        product=max(arithmetic, weight_bytes / SHARED_BYTES),
        partials=partial_bytes / SHARED_BYTES,
        barriers=BARRIER * barriers,
        issue=ISSUE * instructions,
        second_hop=HOP if second_bytes else 0.0,
        second_gather=gather(second_bytes),
        clear=cleared_bytes / (MEMORY_BYTES * sms),
    )


def wgmma_clocks(instructions: float) -> float:
    """Clocks of HGMMA one after another. Each takes 16 for 64 rows of weights at 128 bytes a clock, and 2 more."""
    return WGMMA * instructions


def hmma_clocks(deep: float, accumulators: float, warps: int) -> float:
    """Clocks of HMMA.16816, `deep` in a row on each of a warp's `accumulators`. One that waits for the one before takes 33, one
    that only waits for its turn on its scheduler's tensor core 8, as published for an A100 (an H100's take 6 or 7)."""
    return deep * max(HMMA_LATENCY, HMMA_ISSUE * accumulators * warps / 4)


def plain_clocks(multiplies: float) -> float:
    """Clocks of multiplies without tensor cores: 128 a clock and SM."""
    return multiplies / FMAS


def instructions_estimate(
    backward: bool, gates: int, split: bool, second: bool, words: float, sums: float, cells: float, multiplying: float
) -> float:
    """Instructions of a warp on the critical path, fitted to machine code (Triton 3.9, sm_90, float16, H of 512 to 1024).

    Args:
        backward: the kernel.
        gates: of the cell.
        split: whether the warps share the summed axis.
        second: whether there is an exchange of partial sums.
        words: 32-bit words that a thread gathers.
        sums: accumulators of a thread, partial sums if `split`.
        cells: pairs of unit and batch row that a thread computes.
        multiplying: tensor core instructions of a warp, and loads of weights for them; without `split` (wgmma) these run
            beside everything else.
    """
    cells = max(1.0, cells)
    if not split:
        return 45 + 1.6 * words + 30 * gates * cells
    if backward:
        return 73 + 2.9 * words + 2.75 * sums + 23 * gates * cells + multiplying + (45 if second else 0)
    return 72 + words + 2 * sums + 35 * gates * cells + multiplying
