"""Measures the ceilings of the current GPU (`benchmarks.floor.ceilings`) for a results file, and what an exchange takes there.

No GPU has run this yet. The kernels compile for absent GPUs, and tests run the programs of `hop_kernel` side by side on a CPU.
"""

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.timing.cases import DTYPES
from benchmarks.timing.measure import Call, stopwatch
from benchmarks.timing.problem import tf32
from rnnfast.kernels.persistent.clear import clear_kernel
from rnnfast.kernels.persistent.exchange import FIRST_WAIT, poll, publish
from rnnfast.kernels.persistent.give_up import for_launch, name_of

HOPS = ((2, 32, 1), (2, 512, 4), (16, 32, 4), (64, 64, 8), (64, 128, 8))  # programs, words of each, and warps
STEPS, BUFFER_WORDS = 4096, 1 << 22  # the most steps, and words of all: they have to stay in L2
READ_BLOCK = 4096
CLUSTERS = (2, 4, 8, 16)  # CTAs
CLEARING = {"WORDS": 1, "DIRECTIONS": 1, "OF_CHUNK": False, "BACKWARD": False, "BLOCK": 1024}


@triton.jit(do_not_specialize=["steps", "name", "once"])
def hop_kernel(
    exchange_ptr, out_ptr, give_up_ptrs, steps, name, once,
    PROGRAMS: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Each program sends a row of words to all others, at each of `steps`, and waits for theirs.

    They use the exchange of the persistent kernels and do nothing else. `out` (PROGRAMS, PROGRAMS * WORDS) gets what each
    program saw at the last step: every word is `steps`.
    """
    own = tl.program_id(0)
    words = exchange_ptr.to(tl.pointer_type(tl.int32))
    lanes, everyone = tl.arange(0, WORDS)[None, :], tl.arange(0, PROGRAMS * WORDS)[None, :]
    mask = tl.full((1, WORDS), 1, tl.int1)
    value = tl.zeros((1, WORDS), tl.float32)
    seen = tl.zeros((1, PROGRAMS * WORDS), tl.int32)
    give_up = (give_up_ptrs.flag, give_up_ptrs.told, name)
    for step in range(steps):
        row = words + tl.cast(step, tl.int64) * (PROGRAMS * WORDS)
        value += 1
        publish(row + own * WORDS + lanes, value, mask, 1)
        all_words = tl.full((1, PROGRAMS * WORDS), 1, tl.int1)
        (seen,) = poll(row + everyone, all_words, 1, 1, 1, 1, WARPS, give_up, FIRST_WAIT, once)
    tl.store(out_ptr + own * (PROGRAMS * WORDS) + everyone, seen.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["blocks", "rounds"])
def read_kernel(source_ptr, out_ptr, blocks, rounds, BLOCK: tl.constexpr):
    """Each program reads `rounds` blocks of float32, bypassing L1, and keeps their sum. Each starts at another block."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rounds):
        offs = ((pid * 7 + i) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + offs, cache_modifier=".cg")
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), total)


def _all_of(words: torch.Tensor) -> tuple:
    """The arguments of `clear_kernel` for one step of one member, whose rows these words are."""
    sums, begin, lag, steps, T, flips, sum_words = None, 0, 0, 1, 1, 0, 0
    return sums, begin, lag, steps, T, flips, words.numel(), sum_words


def hop(device: str, steps: int, programs: int = 2, words: int = 32, warps: int = 1) -> torch.Tensor:
    """Run `hop_kernel` on a fresh exchange. Returns what each program saw last."""
    exchange = torch.empty(steps, programs * words, device=device)
    out = torch.zeros(programs, programs * words, device=device)
    clear_kernel[(-(-exchange.numel() // 1024),)](exchange, *_all_of(exchange), **CLEARING)
    hop_kernel[(programs,)](
        exchange, out, for_launch(out), steps, name_of("hop", None, words, out.dtype), 1, programs, words, warps,
        num_warps=warps, num_stages=1, launch_cooperative_grid=True,
    )  # fmt: skip
    return out


def hop_us(only: int | None = None) -> dict[str, float]:
    """Microseconds of a step of `hop_kernel`, by what is handed over, for the first `only` of `HOPS` or all.

    With two programs, a step is the latency of a hop. The median of short runs is subtracted from that of long ones, which
    removes the time of the launch and of clearing the buffer.
    """
    found = {}
    for programs, words, warps in HOPS[:only]:
        most = min(STEPS, BUFFER_WORDS // (programs * words))
        runs = [lambda n=n, kind=(programs, words, warps): hop("cuda", n, *kind) for n in (most, most // 8)]
        long, short = (statistics.median(_seconds(run)) for run in runs)
        found[f"{programs} programs, {4 * words} bytes each"] = (long - short) / (most - most // 8) * 1e6
    return found


def clusters() -> dict[str, int]:
    """How many clusters of `CLUSTERS` CTAs the GPU runs at a time, if each CTA has the shared memory of an SM to itself; none
    before compute capability 9.0."""
    if torch.cuda.get_device_capability() < (9, 0):
        return {}
    utils = triton.runtime.driver.active.utils
    device = torch.cuda.current_device()
    shared = utils.get_device_properties(device)["max_shared_mem"]
    words = torch.empty(1024, device="cuda", dtype=torch.int32)
    found = {}
    for ctas in CLUSTERS:
        built = clear_kernel[(1,)](words, *_all_of(words), **CLEARING, num_ctas=ctas)
        found[f"of {ctas} CTAs"] = utils.cuOccupancyMaxActiveClusters(built.function, shared, ctas)
    return found


def _seconds(function: Callable[[], object], repeats: int = 10) -> list[float]:
    once = stopwatch(Call(lambda _: function()), "cuda")
    once()
    return [once() / 1e6 for _ in range(repeats)]


def _flops(dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, b)))


def measure() -> dict:
    """The ceilings of the current CUDA device, in the form of a results file.

    - HBM: a copy of 1 GiB, read and written.
    - L2: every SM reads a quarter of L2 again and again, bypassing L1.
    - FLOPs: a product of 8192 x 8192 matrices.
    - Exchange: a step of two programs that hand each other 32 words (`hop_us`).

    The first three are the best of ten tries.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    source, target = (torch.zeros(1 << 28, device="cuda") for _ in range(2))
    hbm = 2 * 4 * source.numel() / min(_seconds(lambda: target.copy_(source)))
    programs, rounds = 2 * properties.multi_processor_count, 512
    blocks = properties.L2_cache_size // 4 // (4 * READ_BLOCK)
    l2_seconds = _seconds(lambda: read_kernel[(programs,)](source, target, blocks, rounds, BLOCK=READ_BLOCK, num_warps=8))
    l2 = 4 * READ_BLOCK * programs * rounds / min(l2_seconds)
    flops = {}
    for name, (dtype, allowed) in DTYPES.items():
        with tf32(allowed):
            flops[name] = _flops(dtype)
    (exchange,) = hop_us(1).values()
    return {"hbm_bytes_per_s": hbm, "l2_bytes_per_s": l2, "flops_per_s": flops, "exchange_us": exchange}
