"""Computes the least time that any program needs for a case on a GPU (`floor`), from the work that it has to do (`work`)."""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from benchmarks.floor.ceilings import Ceilings
from benchmarks.timing.cases import Case
from rnnfast.reference import GATES, SAVED


class Work(NamedTuple):
    """The work that every program has to do for one call of a case."""

    flops: float  # FLOPs of the products, input side and recurrence; backward has twice as many
    loop_flops: float  # the part that runs step by step: W_hh h, and in backward W_hh^T times the gate gradients
    # moved between the program and the memory outside: x, y and all parameters once, in backward dy, dx and the gradients of
    # the parameters too. y and dy count only if the case returns y. Activations kept for backward do not count: they could be
    # computed again
    bytes: float
    saved: float  # bytes that rnnfast keeps for backward, no part of any floor
    weight_bytes: int  # W_hh of one layer and direction
    chain: int  # steps that have to follow one another: a layer can start a step behind the one below it
    passes: int  # 1, or 2 for forward and backward


def work(case: Case) -> Work:
    """The work of `case`. Padding of packed sequences does not count."""
    gates, itemsize = GATES[case.cell_name], case.torch_dtype.itemsize
    rows = sum(case.lengths)
    inputs = [case.I] + [case.H * case.directions] * (case.layers - 1)
    recurrent = 2 * rows * gates * case.H * case.H * case.layers * case.directions
    input_side = sum(2 * rows * gates * case.H * width for width in inputs) * case.directions
    parameters = sum(gates * case.H * (width + case.H + 2) for width in inputs) * case.directions * itemsize
    x, y = rows * case.I * itemsize, rows * case.H * case.directions * itemsize
    y *= case.around.returns in ("all", "output")
    forward, backward = case.mode != "backward", case.mode in ("backward", "training")
    moved = x + parameters + (y if forward else 0) + (y + x + parameters if backward else 0)
    unit = SAVED[case.cell_name] * itemsize + (4 if case.cell == "LSTM" else 0)
    return Work(
        flops=(recurrent + input_side) * (forward + 2 * backward),
        loop_flops=recurrent * (forward + backward),
        bytes=moved,
        saved=0 if case.mode == "inference" else rows * case.H * case.layers * case.directions * unit,
        weight_bytes=gates * case.H * case.H * itemsize,
        chain=case.T + case.layers - 1,
        passes=forward + backward,
    )


@dataclass(frozen=True)
class Floor:
    """The least seconds of one call that each limit allows. Nothing is faster than the largest of them.

    The terms can overlap (one batch tile waits while another computes), so the floor is their maximum. `no_overlap` is their
    sum, which a program that does one after another cannot beat.
    """

    compute: float  # the FLOPs at the peak rate
    hbm: float  # the bytes that cannot have stayed in L2
    l2: float  # at each step, what SMs have to get from one another and, of weights too large for all SMs, from L2
    exchange: float  # a hop from SM to SM for each step of the chain, where one SM cannot hold W_hh

    @property
    def terms(self) -> dict[str, float]:
        return asdict(self)

    @property
    def seconds(self) -> float:
        return max(self.terms.values())

    @property
    def no_overlap(self) -> float:
        return sum(self.terms.values())


def _words_per_element(gates: int, sms: int) -> float:
    """The least number of words that SMs send to one another per element of h and step, if `sms` SMs share W_hh.

    They divide W_hh into `rows` groups of units and `sms` / `rows` parts of the summed axis. h goes to the other groups, and
    partial sums of each gate go to the other parts.
    """
    return min((rows - 1) + gates * (sms / rows - 1) for rows in range(1, sms + 1))


def floor(case: Case, gpu: Ceilings, cold: bool = False) -> Floor:
    """The floor of one call of `case` on `gpu`. `cold`: L2 holds nothing at its begin."""
    todo, itemsize = work(case), case.torch_dtype.itemsize
    sms = math.ceil(todo.weight_bytes / gpu.sm_bytes)
    steps = case.T * todo.passes * case.layers * case.directions
    exchanged = _words_per_element(GATES[case.cell_name], min(sms, gpu.sms)) * sum(case.lengths) * case.H * itemsize
    beyond_chip = todo.weight_bytes - gpu.sms * gpu.sm_bytes
    reread, from_hbm = max(0, beyond_chip) * steps, max(0, beyond_chip - gpu.l2_size) * steps
    outside = todo.bytes if cold else max(0, todo.bytes - gpu.l2_size)
    return Floor(
        compute=todo.flops / gpu.flops_per_s[case.dtype],
        hbm=(outside + from_hbm) / gpu.hbm_bytes_per_s,
        l2=(exchanged * todo.passes * case.layers * case.directions + reread) / gpu.l2_bytes_per_s,
        exchange=todo.chain * todo.passes * gpu.exchange_us * 1e-6 if sms > 1 else 0.0,
    )
