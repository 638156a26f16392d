"""Ways for the programs of a persistent kernel to hand one another a step's result, compiled and compared by count.

    python -m benchmarks.exchange_designs [--arch 90] [--shapes 768x16 1024x32] [--designs data flags] [--json FILE]

One LSTM recurrence in float16 with resident weights, as the persistent forward kernel computes it and in its tiles, four ways:

    data      each word is its own flag: polled until none is EMPTY (what the persistent kernels do)
    sentinel  the same, but one word of each producer is polled first, and all words once these are there
    flags     plain stores, then a release of the producer's step number; polled with acquire loads, then the data loaded once
    tma       flags, but the data comes by asynchronous copies (TMA) straight into shared memory

docs/exchange.md says what follows from the counts. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from benchmarks import machine_code, offline
from rnnfast.kernels.cells import lstm
from rnnfast.kernels.persistent.exchange import add_product, over_parts, over_rows, poll, publish, sum_parts, zero_sums
from rnnfast.kernels.persistent.forward import _load_gates, _split_gates
from rnnfast.kernels.persistent.plan import NoPlan, PersistentPlan, persistent_plan

DESIGNS = ("data", "sentinel", "flags", "tma")
SHAPES = ((768, 16), (1024, 32), (512, 64), (512, 128))  # (H, B)
# Triton 3.6 has no atomic loads and stores: there an exchange releases, and an addition of zero acquires
LOADS_AND_STORES = tl.constexpr(hasattr(tl, "atomic_load"))


@triton.jit
def _all_words_of(pointers, mask):
    """Poll a vector of words, one of each producer, until none is EMPTY."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    while tl.min(words.to(tl.uint32, bitcast=True) ^ 0xFFFFFFFF, axis=0) == 0:
        words = tl.load(pointers, mask=mask, other=0, volatile=True)


@triton.jit
def _release(flag_ptr, value):
    """Every store of this program so far becomes visible before the flag does."""
    tl.debug_barrier()
    if LOADS_AND_STORES:
        tl.atomic_store(flag_ptr, value, sem="release", scope="gpu")
    else:
        tl.atomic_xchg(flag_ptr, value, sem="release", scope="gpu")


@triton.jit
def _load_flags(pointers, mask, value):
    if LOADS_AND_STORES:
        flags = tl.atomic_load(pointers, mask=mask, sem="acquire", scope="gpu")
    else:
        flags = tl.atomic_add(pointers, tl.zeros_like(mask).to(tl.int32), mask=mask, sem="acquire", scope="gpu")
    return tl.where(mask, flags, value)


@triton.jit
def _acquire(pointers, mask, value):
    """Until every flag has `value` or more."""
    while tl.min(_load_flags(pointers, mask, value), axis=0) < value:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["steps", "B"])
def exchange_kernel(
    x_ptr,  # (T, B, 4 * H) float32, W_ih x_t and the biases
    w_ptr,  # (4 * H, H) W_hh
    h_ptr,  # (T, B, H) h_t; EMPTY on entry for "data" and "sentinel"
    flags_ptr,  # (batch tiles, UNITS) int32, steps finished by each program; zero on entry
    steps,
    B,
    H: tl.constexpr,
    DESIGN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRODUCERS: tl.constexpr,
):
    UNITS: tl.constexpr = H // BLOCK_H
    PART: tl.constexpr = H // SPLIT
    CHUNKS: tl.constexpr = PART // BLOCK_K
    ROWS: tl.constexpr = 4 * BLOCK_H
    WORDS: tl.constexpr = H // 2
    offs_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_word = tl.program_id(0) * (BLOCK_H // 2) + tl.arange(0, BLOCK_H // 2)
    offs_row = tl.arange(0, ROWS)
    producers = tl.arange(0, PRODUCERS)
    mask = (offs_b < B)[:, None]
    batch = B.to(tl.int64)
    words_ptr = h_ptr.to(tl.pointer_type(tl.int32))
    flags_ptr += tl.program_id(1) * UNITS
    if DESIGN == "tma":
        shape = [steps, B, SPLIT, PART]
        blocks = tl.make_tensor_descriptor(h_ptr, shape, [batch * H, H, PART, 1], [1, BLOCK_B, SPLIT, BLOCK_K])

    w_rows = (offs_row % 4 * H + tl.program_id(0) * BLOCK_H + offs_row // 4).to(tl.int64) * H
    w = ()
    chunks = ()
    empty = tl.zeros_like(over_parts(offs_b, PART, tl.arange(0, BLOCK_K), SPLIT)).to(h_ptr.dtype.element_ty)
    for j in tl.static_range(CHUNKS):
        w = w + (tl.load(w_ptr + over_parts(w_rows, PART, tl.arange(0, BLOCK_K), SPLIT) + j * BLOCK_K),)
        chunks = chunks + (empty,)
    h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    row_first = (tl.program_id(1) * BLOCK_B).to(tl.int64)  # of this tile, at the step
    row = offs_b.to(tl.int64)
    x_gates = _load_gates(x_ptr + row[:, None] * (4 * H) + offs_h[None, :], mask, H, 4)
    for step in range(steps):
        mask_next = offs_b < tl.where(step + 1 < steps, B, 0)
        x_next = x_ptr + (row + batch)[:, None] * (4 * H) + offs_h[None, :]
        x_gates_next = _load_gates(x_next, mask_next[:, None], H, 4)
        sums = add_product(zero_sums(1, ROWS, BLOCK_B, SPLIT), w, chunks, 0, CHUNKS, SPLIT, "ieee", False)
        h_rows = sum_parts(sums, ROWS, BLOCK_B, SPLIT)
        states, _ = lstm.forward(x_gates, _split_gates(h_rows, BLOCK_B, BLOCK_H, 4), (h, c))
        c = states[1]
        rounded = states[0].to(h_ptr.dtype.element_ty)
        h = rounded.to(tl.float32)

        if DESIGN == "data" or DESIGN == "sentinel":
            publish(words_ptr + row[:, None] * WORDS + offs_word[None, :], rounded, mask, 2)
            if DESIGN == "sentinel":
                first_words = words_ptr + row_first * WORDS + producers * (BLOCK_H // 2)
                _all_words_of(first_words, producers < tl.where(step + 1 < steps, UNITS, 0))
            words = words_ptr + over_parts(row * WORDS, PART // 2, tl.arange(0, BLOCK_K // 2), SPLIT)
            chunks = poll(words, over_rows(mask_next, SPLIT), CHUNKS, BLOCK_K // 2, 1, h_ptr.dtype.element_ty, 2, SPLIT)
        else:
            tl.store(h_ptr + row[:, None] * H + offs_h[None, :], rounded, mask=mask)
            _release(flags_ptr + tl.program_id(0), step + 1)
            _acquire(flags_ptr + producers, producers < UNITS, step + 1)
            chunks = ()
            for j in tl.static_range(CHUNKS):
                if DESIGN == "tma":
                    block = blocks.load([step, tl.program_id(1) * BLOCK_B, 0, j * BLOCK_K])
                    if SPLIT == 1:
                        tile = block.reshape(BLOCK_B, BLOCK_K)
                    else:
                        tile = block.reshape(BLOCK_B, SPLIT, BLOCK_K).permute(1, 0, 2)
                else:
                    pointers = h_ptr + over_parts(row * H, PART, tl.arange(0, BLOCK_K), SPLIT) + j * BLOCK_K
                    tile = tl.load(pointers, mask=over_rows(mask_next, SPLIT), other=0.0)
                chunks = chunks + (tile,)
        x_gates = x_gates_next
        row_first += batch
        row += batch


def launch(x: torch.Tensor, w: torch.Tensor, design: str, plan: PersistentPlan, **options) -> torch.Tensor:
    """h (T, B, H) of the recurrence over x (T, B, 4 * H), from zeros; `plan` without padding, for one launch."""
    T, B, H = x.shape[0], x.shape[1], w.shape[1]
    h = torch.full((T * B * H // 2,), -1, dtype=torch.int32).view(w.dtype).view(T, B, H)
    ((grid, _),) = plan.launches(B)
    exchange_kernel[grid](
        x, w, h, torch.zeros(grid[1], grid[0], dtype=torch.int32), T, B, H=H, DESIGN=design,
        BLOCK_B=plan.BLOCK_B, BLOCK_H=plan.BLOCK_H, BLOCK_K=plan.BLOCK_K, SPLIT=plan.SPLIT,
        PRODUCERS=triton.next_power_of_2(grid[0]), **options,
    )  # fmt: skip
    return h


TRIP = 0.35e-6  # seconds of a load's way to L2 and back
HOP = 0.65e-6  # from the store of a word to its arrival at a program whose load comes just in time
L2_BYTES = 5.5e12  # a second, of all SMs together
PORT_BYTES = 64 * 1.755e9  # a second, of one SM
SECTOR = 32  # bytes that L2 hands out at least


@dataclass(frozen=True)
class Counted:
    """One design at one shape, and what it does in a time step.

    Attributes:
        registers, stack_bytes, shared_bytes: of a program.
        instructions, barriers: in the loop over time steps, the loops that poll included once.
        strong_loads, strong_stores, atomics, fences, async_copies: likewise; fences are those of GPU scope, and one
            asynchronous copy is waited for before the next.
        polled_bytes: read in vain by all programs together in one try.
        gathered_bytes: read by all programs together by the tries that succeed.
        vain: tries in vain that are expected, by the times above, if all programs keep step.
        trips: ways to L2 and back, one after another, from the product of a step to that of the next.
        microseconds: predicted for all of these, without instructions and barriers.
    """

    design: str
    arch: int
    hidden: int
    batch: int
    programs: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    barriers: int
    strong_loads: int
    strong_stores: int
    atomics: int
    fences: int
    async_copies: int
    polled_bytes: int
    gathered_bytes: int
    vain: int
    trips: int
    microseconds: float


def predict(design: str, units: int, tiles: int, tile_bytes: int, copies: int) -> dict[str, int | float]:
    """Bytes, tries and time of the exchange of one step, see `Counted`.

    A program polls from the moment that it has published. Its words reach L2 in HOP - TRIP / 2, as do those of the others,
    which keep step with it; a load gets there in TRIP / 2. So a try has to begin HOP - TRIP after the first, and each try lasts
    a trip and the time to transfer what it reads.

    Args:
        design: one of `DESIGNS`.
        units, tiles: the grid.
        tile_bytes: that one program gathers.
        copies: asynchronous copies of a program, each waited for before the next.
    """
    programs = units * tiles

    def transfer(of_program: int) -> float:
        return max(programs * of_program / L2_BYTES, of_program / PORT_BYTES)

    small = units * SECTOR if design == "sentinel" else math.ceil(units * 4 / SECTOR) * SECTOR
    polled = tile_bytes if design == "data" else small
    one_try = TRIP + transfer(polled)
    vain = math.ceil((HOP - TRIP) / one_try)
    trips = vain + 1
    seconds = (vain + 1) * one_try
    if design != "data":  # and then the data
        loads = max(1, copies)
        trips += loads
        seconds += loads * TRIP + transfer(tile_bytes)
    if design in ("flags", "tma"):  # the fence: the data has to be in L2 before the flag goes out
        trips += 1
        seconds += TRIP
    return {
        "polled_bytes": programs * polled,
        "gathered_bytes": programs * (tile_bytes + (0 if design == "data" else small)),
        "vain": vain,
        "trips": trips,
        "microseconds": round(seconds * 1e6, 2),
    }


def count_design(design: str, arch: int, H: int, B: int) -> Counted:
    """Compile a design for sm_`arch`, in the tiles of the persistent forward kernel, and count."""
    plan = persistent_plan(4, B, H, 2, "ieee", False, offline.limits_of(arch))
    if isinstance(plan, NoPlan) or plan.H_PAD != H:
        raise SystemExit(f"H={H}, B={B} on sm_{arch}: a plan without padding is needed, this is: {plan}")
    (((units, tiles, _), _),) = plan.launches(B)
    x, w = torch.zeros(2, B, 4 * H), torch.zeros(4 * H, H, dtype=torch.float16)
    with offline.pretend_gpu(arch):
        exchange_kernel.device_caches.clear()
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))  # of TMA descriptors
        launch(
            x, w, design, plan,
            num_warps=plan.num_warps, num_stages=1, maxnreg=255, launch_cooperative_grid=True, enable_fp_fusion=True,
        )  # fmt: skip
    (cache,) = exchange_kernel.device_caches.values()
    (built,) = cache[0].values()
    usage, text = machine_code.disassemble(built.asm["cubin"])
    registers, stack_bytes = machine_code.resources(usage)
    body, polls = machine_code.Code(text).loops()
    loop = [*body, *itertools.chain(*polls)]
    opcodes = Counter(instruction.opcode for instruction in loop)

    def matching(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    copies = matching(r"UTMALDG|UBLKCP|LDGSTS")
    return Counted(
        design=design,
        arch=arch,
        hidden=H,
        batch=B,
        programs=units * tiles,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=built.metadata.shared,
        instructions=len(loop),
        barriers=matching(r"BAR\b"),
        strong_loads=matching(r"LDG\..*STRONG"),
        strong_stores=matching(r"STG\..*STRONG"),
        atomics=matching(r"(ATOMG?|REDG?)\b"),
        fences=matching(r"MEMBAR\..*(GPU|SYS)"),
        async_copies=copies,
        **predict(design, units, tiles, plan.BLOCK_B * H * 2, copies),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange_designs", description="Compares exchanges by count.")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=[90, 100], help="TMA needs 9.0")
    parser.add_argument("--shapes", nargs="+", default=[f"{H}x{B}" for H, B in SHAPES], help="hidden size x batch")
    parser.add_argument("--designs", nargs="+", default=DESIGNS, choices=DESIGNS)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}; times are predicted: {TRIP * 1e6:.2f} us a trip to L2, {HOP * 1e6:.2f} us a hop")
    head = "sm   H     B   design    programs regs stack shared instr barriers loads stores atomics fences copies"
    print(head + "  in vain: tries MB a try  gathered MB  trips  us")
    rows = []
    for arch, shape, design in itertools.product(args.arch, args.shapes, args.designs):
        H, B = (int(size) for size in shape.split("x"))
        row = count_design(design, arch, H, B)
        rows.append(row)
        print(
            f"{arch:<4} {H:<5} {B:<3} {design:9} {row.programs:8} {row.registers:4} {row.stack_bytes:5} {row.shared_bytes:6} "
            f"{row.instructions:5} {row.barriers:8} {row.strong_loads:5} {row.strong_stores:6} {row.atomics:7} {row.fences:6} "
            f"{row.async_copies:6} {row.vain:15} {row.polled_bytes / 1e6:8.2f} {row.gathered_bytes / 1e6:12.2f} {row.trips:6} "
            f"{row.microseconds:5.2f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
