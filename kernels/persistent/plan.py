"""Plans of the persistent kernels: from sizes and the limits of a GPU to the whole launch, or to the reason why there is none.

Pure functions: nothing here asks a device, so tests need none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["GPUS", "GpuLimits", "NoPlan", "PersistentPlan", "persistent_plan"]


@dataclass(frozen=True)
class GpuLimits:
    """What a plan has to keep to on one GPU.

    Attributes:
        name: as people say it.
        capability: compute capability, 90 for 9.0.
        sms: streaming multiprocessors.
        shared_bytes: shared memory that one CTA can have at most.
        registers: 32-bit registers of an SM.
        l2_bytes: size of the L2 cache.
    """

    name: str
    capability: int
    sms: int
    shared_bytes: int
    registers: int
    l2_bytes: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuLimits("A100", 80, 108, 163 << 10, 65536, 40 << 20),
        GpuLimits("H100", 90, 132, 227 << 10, 65536, 50 << 20),
        GpuLimits("H200", 90, 132, 227 << 10, 65536, 50 << 20),
        GpuLimits("RTX 3090", 86, 82, 99 << 10, 65536, 6 << 20),
        GpuLimits("RTX 4090", 89, 128, 99 << 10, 65536, 72 << 20),
        GpuLimits("B200", 100, 148, 227 << 10, 65536, 126 << 20),
    )
}


@dataclass(frozen=True)
class PersistentPlan:
    """The whole launch of a persistent kernel, for one direction (forward or backward).

    A program keeps BLOCK_H units of BLOCK_B batch rows. The hidden size is padded to H_PAD, a multiple of BLOCK_H. The summed
    axis is cut into SPLIT parts, a multiple of BLOCK_K each. At most `steps` time steps a launch of backward, so that none
    lasts for seconds (forward runs the steps of a chunk), and at most `programs` programs, so that all are resident.
    """

    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    SPLIT: int
    H_PAD: int
    num_warps: int
    steps: int
    programs: int

    def launches(self, B: int) -> Iterator[tuple[tuple[int, int, int], int]]:
        """Grid and first batch row of each launch: as many batch tiles at a time as `programs` allows."""
        units = self.H_PAD // self.BLOCK_H
        tiles = -(-B // self.BLOCK_B)
        at_once = self.programs // units
        for tile in range(0, tiles, at_once):
            yield (units, min(at_once, tiles - tile), 1), tile * self.BLOCK_B

    def words(self, B: int) -> str:
        """The plan in words, for a batch of `B` rows."""
        grids = " then ".join(f"{units} x {tiles} programs" for (units, tiles, _), _ in self.launches(B))
        parts = f"the sum cut into {self.SPLIT} parts, " if self.SPLIT > 1 else ""
        return (
            f"{grids} of {self.BLOCK_H} units and {self.BLOCK_B} rows, {self.num_warps} warps, {parts}chunks of "
            f"{self.BLOCK_K}, hidden size padded to {self.H_PAD}"
        )


@dataclass(frozen=True)
class NoPlan:
    """There is no persistent plan; `reason` says why, in words."""

    reason: str


STEPS = 1 << 16  # time steps of a launch: a fraction of a second, where a display's watchdog ends a kernel after two
MOST_LAUNCHES = 4  # launches one after another for the batch; beyond, the step kernels spread it over the GPU at once

# The words of a step's exchange that a thread can hold without spilling, for (backward, on tensor cores): seen in the machine
# code of many sizes, with Triton 3.6 and 3.9.
WORDS_PER_THREAD = {(False, True): 48, (True, True): 128, (False, False): 16, (True, False): 64}


@dataclass(frozen=True)
class _Candidate:
    """One choice of tiles, with what it takes and what it costs."""

    plan: PersistentPlan
    rows: int  # of weights, in a program
    columns: int  # of weights: the summed axis
    itemsize: int

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.columns * self.itemsize

    @property
    def gathered_bytes(self) -> int:
        """By one program, a step."""
        return self.plan.BLOCK_B * self.columns * self.itemsize

    @property
    def shared_bytes(self) -> int:
        """The weights, and beside them one chunk of the exchange or the partial sums, whichever is larger."""
        plan = self.plan
        chunk = plan.SPLIT * plan.BLOCK_B * plan.BLOCK_K * self.itemsize
        partial = plan.SPLIT * self.rows * plan.BLOCK_B * 4
        return self.weight_bytes + max(chunk, partial) + 1024

    @property
    def words_per_thread(self) -> int:
        return self.gathered_bytes // 4 // (32 * self.plan.num_warps)

    def refusals(self, B: int, backward: bool, tensor_cores: bool, limits: GpuLimits) -> Iterator[tuple[str, float, str]]:
        """Why it does not fit, for each limit that it passes: its name, the amount, and words. Nothing if it fits."""
        plan = self.plan
        units = plan.H_PAD // plan.BLOCK_H
        if self.shared_bytes > limits.shared_bytes:
            has = limits.shared_bytes >> 10
            kib = self.shared_bytes >> 10
            reason = f"{plan.BLOCK_H} units a program take {kib} KiB of shared memory, where a CTA has {has} KiB"
            yield "shared", self.shared_bytes, reason
        if units > limits.sms:
            yield "sms", units, f"{plan.BLOCK_H} units a program make {units} programs, where there are {limits.sms} SMs"
            return
        words, most = self.words_per_thread, WORDS_PER_THREAD[backward, tensor_cores]
        if words > most:
            reason = f"{plan.BLOCK_B} batch rows a program are {words} words a thread to gather, where {most} fit in registers"
            yield "registers", words, reason
        registers = 32 * plan.num_warps * 255
        if registers > limits.registers:
            reason = f"{plan.num_warps} warps take {registers} registers, where an SM has {limits.registers}"
            yield "register file", registers, reason
        launches = len(list(plan.launches(B)))
        if launches > MOST_LAUNCHES:
            reason = f"{B} batch rows by {plan.BLOCK_B} take {launches} launches in turn, where {MOST_LAUNCHES} is the most"
            yield "launches", launches, reason
        exchange = B * self.columns * self.itemsize
        if exchange > limits.l2_bytes:
            yield "l2", exchange, f"a step's exchange is {exchange >> 20} MiB, where L2 has {limits.l2_bytes >> 20} MiB"

    def clocks(self, B: int, tensor_cores: bool, limits: GpuLimits) -> float:
        """A step's time in SM clocks, by a simple model, to compare candidates with: an estimate, not a measurement.

        The hop of a word from SM to SM (1100); the gather, bound by L2 for all (24 bytes a clock and SM) or by one SM's port
        (64); the product, bound by the weights' way out of shared memory (128 bytes a clock) or by the arithmetic; the
        partial sums, through shared memory and back; and the barriers (35 each): 7 and 2 a chunk were counted in the machine
        code.
        """
        plan = self.plan
        steps_k = self.columns // plan.SPLIT // (32 // self.itemsize)  # tensor core instructions in a row on one accumulator
        if not tensor_cores:
            arithmetic = self.rows * plan.BLOCK_B * self.columns / 128
        elif plan.SPLIT == 1 and self.rows >= 64 and plan.BLOCK_B >= 16 and limits.capability >= 90:
            arithmetic = 18 * steps_k
        else:
            tiles = -(-self.rows // 16) * -(-plan.BLOCK_B // 8)  # accumulators, of a warp's own or, with SPLIT = 1, of all
            tiles = max(1, tiles // plan.num_warps) if plan.SPLIT == 1 else tiles
            arithmetic = steps_k * max(33, 16 * tiles * plan.num_warps // 4)
        partial = 0 if plan.SPLIT == 1 else 2 * plan.SPLIT * self.rows * plan.BLOCK_B * 4
        barriers = 7 + 2 * (self.columns // plan.SPLIT // plan.BLOCK_K)
        alone = 1100 + max(arithmetic, self.weight_bytes / 128) + partial / 128 + 35 * barriers
        total = 0.0
        for (units, tiles, _), _ in plan.launches(B):
            total += alone + max(units * tiles * self.gathered_bytes / (24 * limits.sms), self.gathered_bytes / 64)
        return total


def _candidates(gates: int, H: int, itemsize: int, tensor_cores: bool, backward: bool, sms: int) -> Iterator[_Candidate]:
    """Every choice worth a thought, the preferred of equals first."""
    gate_rows = 1 << (gates - 1).bit_length()
    summed_gates = gates if backward else 1
    # units a program, parts of K, warps: 64 rows of weights make an instruction of four warps; fewer leave the warps K to share
    if not tensor_cores:
        shapes = ((8, 8, 8),)
    elif backward or gates == 1:
        shapes = ((16, 8, 8), (16, 4, 4), (16, 1, 4), (8, 8, 8))
    else:
        shapes = ((64 // gate_rows, 1, 4), (16, 8, 8), (8, 8, 8))
    for block_h, split, warps in shapes:
        for block_b in (8, 16, 32):
            if backward and block_b == 32:
                continue  # spills, with 128 words a thread
            least = -(-H // block_h) * block_h
            for h_pad in range(least, H + H // 4 + 16 * split, block_h):
                if h_pad > least and h_pad // block_h > sms:
                    break  # padding alone is no reason to run out of SMs
                part, remainder = divmod(summed_gates * h_pad, split)
                block_k = min(part & -part, 256 if tensor_cores else 32)
                if remainder or block_k < 16:
                    continue
                plan = PersistentPlan(block_b, block_h, block_k, split, h_pad, warps, STEPS, sms)
                rows = block_h if backward else block_h * gate_rows
                yield _Candidate(plan, rows, summed_gates * h_pad, itemsize)


def persistent_plan(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, limits: GpuLimits
) -> PersistentPlan | NoPlan:
    """The persistent launch that the model in `_Candidate.clocks` counts fastest, or why there is none.

    Args:
        gates: blocks of rows in W_hh, `Cell.gates`.
        B, H: batch rows and hidden units.
        itemsize: bytes of an element, 2 or 4.
        precision: of a float32 product, "ieee" or "tf32"; half-precision products always run on tensor cores.
        backward: for the backward kernel, else forward.
        limits: of the GPU.
    """
    if limits.capability < 80:
        return NoPlan(f"{limits.name} has compute capability {limits.capability / 10}, and the persistent kernels need 8.0")
    tensor_cores = itemsize == 2 or precision == "tf32"
    best, least = None, float("inf")
    nearest: dict[str, tuple[float, str]] = {}  # to each limit, of those that pass it
    for candidate in _candidates(gates, H, itemsize, tensor_cores, backward, limits.sms):
        refusals = list(candidate.refusals(B, backward, tensor_cores, limits))
        for limit, excess, reason in refusals:
            nearest[limit] = min(nearest.get(limit, (excess, reason)), (excess, reason))
        if not refusals and (clocks := candidate.clocks(B, tensor_cores, limits)) < least:
            best, least = candidate.plan, clocks
    if best is not None:
        return best
    return NoPlan("no tiles fit: " + "; ".join(reason for _, reason in nearest.values()))
