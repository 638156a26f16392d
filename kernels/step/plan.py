"""Launch plans: pure functions from sizes to tiles, warps and stages. Nothing here asks a device, so tests need none."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from rnnfast.kernels.hardware import FMAS, HMMA_ISSUE, L2_BYTES, L2_TRIP, LAUNCH, PORT_BYTES

__all__ = ["StepPlan", "row_tiles", "step_clocks", "step_plan"]


@dataclass(frozen=True)
class StepPlan:
    """Tiles of one launch of a step kernel.

    A program computes BLOCK_H units of BLOCK_B batch rows, walking the sum over hidden units (forward) or gates (backward)
    in chunks of BLOCK_K. None depends on T or B, so neither ever causes a recompile.
    `steps` is 0: one call of `forward` runs any number of them.
    """

    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    steps: int = field(default=0, init=False, repr=False, compare=False)

    def grid(self, B: int, H: int, members: int = 1) -> tuple[int, int, int]:
        return -(-B // self.BLOCK_B), -(-H // self.BLOCK_H), members

    def of_rows(self, H: int) -> StepPlan:
        """The launch that runs a cell which needs whole rows: a row a program."""
        block_h, warps = row_tiles(H)
        return replace(self, BLOCK_B=1, BLOCK_H=block_h, num_warps=warps, num_stages=1)

    def launch_words(self, T: int) -> str:
        return "one launch a time step"

    def words(self, B: int, members: int = 1) -> str:
        """The plan in words, the same for any batch and any number of members at once."""
        return (
            f"a program computes {self.BLOCK_H} units of {self.BLOCK_B} rows in chunks of {self.BLOCK_K}, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


def row_tiles(H: int) -> tuple[int, int]:
    """Units and warps of a program that has a whole row. A warp takes 128 units, 16 bytes a thread, up to 16 warps."""
    block_h = 1 << (H - 1).bit_length()
    return block_h, min(16, max(1, block_h // 128))


def step_plan(H: int, itemsize: int, precision: str, extra: int = 0, amd: bool = False) -> StepPlan:
    """The tiles for hidden size `H` and elements of `itemsize` bytes, for every cell, forward and backward.

    `extra`: float32 tiles that a program keeps in registers beyond those of an LSTM. Where 64 rows meet more than 10, 8 warps
    share them: a cell with 20 spilled with 4 warps, and one with 9 did not. `amd`: whether the GPU is one of AMD.

    16 units, so that a layer of H = 768 spreads over 48 SMs even at a small batch: a step is bound by how fast the SMs pull the
    weights out of L2, not by the arithmetic. 64 batch rows: Triton lays the warps of a sum over several gates along the rows,
    so 4 warps cover 64 rows without repeating a product (with 32 rows each product was counted twice in the machine code), and
    64 is the least for wgmma. Without tensor cores (float32 in "ieee" `precision`) the sums of 64 rows overflow the registers;
    there 8 warps share 32 rows, since with 4 some spilled all the same, and a step waits for instructions to be issued.
    Chunks of 256 bytes (half precision: 128 elements, float32: 64) keep the loads wide and three of them in flight; a small
    layer takes the smallest power of two that holds it, at least 16, the least that ``tl.dot`` accepts. Where rows are not
    aligned to 16 bytes every element is a load of its own, and chunks of 32 keep those in registers. On AMD GPUs a chunk is
    128 bytes, a line of their cache: twice that takes all of 64 KiB of shared memory, and spilled on gfx1100. There 4 warps
    have the registers of any cell tried, and 8 spilled.
    """
    aligned = H * itemsize % 16 == 0
    widest = (128 if amd else 256) // itemsize if aligned else 32
    block_k = min(widest, max(16, 1 << (H - 1).bit_length()))
    block_b, warps = (32, 8) if itemsize == 4 and precision == "ieee" else (64, 8 if extra > 10 and not amd else 4)
    return StepPlan(BLOCK_B=block_b, BLOCK_H=16, BLOCK_K=block_k, num_warps=warps, num_stages=3)


def step_clocks(
    gates: int, B: int, H: int, itemsize: int, precision: str, backward: bool, sms: int, members: int = 1, extra: int = 0
) -> float:  # fmt: skip
    """Predicted SM clocks of one launch on a GPU with `sms` SMs, without what it costs the host: a step of each of `members`.

    A launch takes its start, the trips to L2 one after another, and the slower of the bytes that it loads and its product. The
    counts of `benchmarks.static` take the place of these estimates once a kernel is compiled. `extra`: tiles that each program
    loads besides what an LSTM does, as in `step_plan`.
    """
    plan = step_plan(H, itemsize, precision, extra)
    rows = plan.BLOCK_H * (1 if backward else gates)
    chunks = -(-H * (gates if backward else 1) // plan.BLOCK_K)
    programs = math.prod(plan.grid(B, H, members))
    sharing = -(-programs // sms)  # programs that one SM runs, at once or in turn
    loaded = (rows + min(B, plan.BLOCK_B)) * plan.BLOCK_K * chunks * itemsize
    loaded += extra * min(B, plan.BLOCK_B) * plan.BLOCK_H * 4
    multiplies = rows * plan.BLOCK_B * plan.BLOCK_K * chunks
    if itemsize == 4 and precision == "ieee":
        product = multiplies / FMAS
    else:  # an HMMA multiplies 16 rows by 8 batch rows and 32 bytes of the sum, on each of 4 tensor cores
        product = multiplies / (16 * 8 * 32 // itemsize) * HMMA_ISSUE / 4
    loads = max(programs * loaded / (L2_BYTES * sms), sharing * loaded / PORT_BYTES)
    trips = -(-chunks // (plan.num_stages - 1)) + 1
    return LAUNCH + L2_TRIP * trips + max(loads, sharing * product)
